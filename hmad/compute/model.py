"""Qwen3: one forward for both phases and every device. What attention does with K and V is the caller's business."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hmad.compute.checkpoint import ModelConfig, Weights
from hmad.compute.linears import Linear, activation_dtype


class Backend(Protocol):
    """What a kind of device brings to the model: its linear layers, and its kernels for the rows between them.

    A *product* is what a linear layer returns, an *activation* what it takes; both are the backend's own.
    """

    device: torch.device

    def make_linear(self, *parts: Tensor) -> Linear:
        """A linear layer of a weight that comes in parts [N_i, K], stacked along N."""

    def make_down(self, *parts: Tensor) -> Linear:
        """The same of a layer that takes what ``silu_mul`` gives."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K] by a weight [N, K] that stays in its own type, such as the LM head's."""

    def norm(self, x: Tensor, delta: Any, weight: Tensor, eps: float) -> Any:
        """Add the product ``delta`` (or None) to x [T, K] in place; the RMS norm of that, for a linear layer."""

    def final_norm(self, x: Tensor, delta: Any, weight: Tensor, eps: float) -> Tensor:
        """The same as a tensor [T, K], for the LM head."""

    def silu_mul(self, gate_up: Any) -> Any:
        """silu(gate) * up of a product [T, 2 N], for a linear layer."""

    def angles(self, rope_table: Tensor, positions: Tensor) -> Any:
        """What ``qk_norm_rope`` takes for rows at these positions."""

    def qk_norm_rope(
        self, qkv: Any, q_norm: Tensor, k_norm: Tensor, angles: Any, num_heads: int, num_kv_heads: int, eps: float
    ) -> Tensor:
        """The product [T, (H + 2 Hkv) * D] with q and k normed by head, rotated and turned, as a tensor."""


@dataclass(frozen=True)
class Projected:
    """Rows as attention gets them: q, k and v of one layer in one product, normed and rotated or yet to be.

    Heads that are rotated are also turned: q and k times one orthonormal Hadamard matrix (``cpu_turn.turned``), which
    changes no product of theirs, but spreads what is large in a key over all its values before a format rounds them.
    """

    product: Any  # [T, (H + 2 Hkv) * D]
    q_norm: Tensor  # [D]
    k_norm: Tensor  # [D]
    angles: Any
    is_rotated: bool = False


Attend = Callable[[int, Projected], Tensor]  # (layer_id, rows) -> [T, H, D]


@dataclass(frozen=True)
class Layer:
    """The weights of one transformer layer."""

    input_norm: Tensor  # [hidden]
    qkv: Linear
    q_norm: Tensor  # [D]
    k_norm: Tensor  # [D]
    o: Linear
    post_norm: Tensor  # [hidden]
    gate_up: Linear
    down: Linear


def nothing(layer_id: int) -> None:
    """A layer begins, and nobody wants to know."""


class Qwen3:
    """A dense Qwen3, its linear layers in one precision, all else in bfloat16 (float32 for fp32)."""

    def __init__(self, config: ModelConfig, precision: str, weights: Weights, backend: Backend) -> None:
        self.config = config
        self.precision = precision
        self.dtype = activation_dtype(precision)
        self._backend = backend
        self._weights = weights
        self._embedding = self._read("model.embed_tokens.weight")  # [vocab, hidden]
        self._head = self._embedding if config.tied else self._read("lm_head.weight")
        self._final_norm = self._read("model.norm.weight")
        self._layers = [self._load_layer(i) for i in range(config.num_layers)]
        self._rope = rope_table(config, self.dtype).to(backend.device)  # [max positions, D]
        del self._weights

    @property
    def device(self) -> torch.device:
        return self._backend.device

    def _read(self, name: str) -> Tensor:
        return self._weights.read(name).to(self._backend.device, self.dtype)

    def _load_layer(self, layer_id: int) -> Layer:
        prefix = f"model.layers.{layer_id}"

        def read(name: str) -> Tensor:
            return self._read(f"{prefix}.{name}.weight")

        def parts(*names: str) -> Iterator[Tensor]:
            return (self._weights.read(f"{prefix}.{name}.weight") for name in names)

        make = self._backend.make_linear
        return Layer(
            input_norm=read("input_layernorm"),
            qkv=make(*parts("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            q_norm=read("self_attn.q_norm"),
            k_norm=read("self_attn.k_norm"),
            o=make(*parts("self_attn.o_proj")),
            post_norm=read("post_attention_layernorm"),
            gate_up=make(*parts("mlp.gate_proj", "mlp.up_proj")),
            down=self._backend.make_down(*parts("mlp.down_proj")),
        )

    @property
    def weight_bytes(self) -> int:
        """All weights as held, mapped or not."""
        linears = [linear for layer in self._layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        tables = [self._embedding] if self.config.tied else [self._embedding, self._head]
        return sum(linear.weight_bytes for linear in linears) + sum(table.nbytes for table in tables)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, before_layer: Callable[[int], None] = nothing
    ) -> Tensor:
        """Hidden states [T, hidden] of token_ids [T] at positions [T] (both int64), after the final norm.

        ``before_layer`` hears of each layer when its compute begins.
        """
        residual = self.embed(token_ids)
        angles = self.angles(positions)
        delta: Any = None  # the product that the layer before adds to the residual
        for layer_id in range(self.config.num_layers):
            before_layer(layer_id)
            attended = attend(layer_id, self.projected(layer_id, self.project(layer_id, residual, delta), angles))
            delta = self.feed_forward(layer_id, residual, attended.reshape(len(residual), -1))
        return self.finish(residual, delta)

    # --- the pieces of a forward pass, for devices that capture them ---

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T, hidden]"""
        return self._embedding.index_select(0, token_ids)

    def angles(self, positions: Tensor) -> Any:
        """What rotates rows at these positions."""
        return self._backend.angles(self._rope, positions)

    def project(self, layer_id: int, residual: Tensor, delta: Any) -> Any:
        """Before attention: add ``delta`` to the residual in place; q, k and v as one product."""
        layer = self._layers[layer_id]
        return layer.qkv(self._backend.norm(residual, delta, layer.input_norm, self.config.rms_norm_eps))

    def projected(self, layer_id: int, product: Any, angles: Any, *, is_rotated: bool = False) -> Projected:
        layer = self._layers[layer_id]
        return Projected(product, layer.q_norm, layer.k_norm, angles, is_rotated)

    def feed_forward(self, layer_id: int, residual: Tensor, attended: Tensor) -> Any:
        """After attention [T, H * D]: add its projection to the residual in place; what the MLP adds to that."""
        layer = self._layers[layer_id]
        normed = self._backend.norm(residual, layer.o(attended), layer.post_norm, self.config.rms_norm_eps)
        return layer.down(self._backend.silu_mul(layer.gate_up(normed)))

    def finish(self, residual: Tensor, delta: Any) -> Tensor:
        """Hidden states [T, hidden] after the final norm."""
        return self._backend.final_norm(residual, delta, self._final_norm, self.config.rms_norm_eps)

    def heads(self, rows: Projected) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D], k and v [T, Hkv, D], rotated and turned: views of one buffer, whose tokens are
        (H + 2 Hkv) * D values apart and whose heads are contiguous.
        """
        qkv = rows.product if rows.is_rotated else self.rotate(rows)
        heads = qkv.view(len(qkv), -1, self.config.head_dim)  # [T, H + 2 Hkv, D]
        num_heads = self.config.num_heads
        num_rotated = num_heads + self.config.num_kv_heads
        return heads[:, :num_heads], heads[:, num_heads:num_rotated], heads[:, num_rotated:]

    def rotate(self, rows: Projected) -> Tensor:
        """[T, (H + 2 Hkv) * D]: q and k normed by head, rotated and turned."""
        config = self.config
        return self._backend.qk_norm_rope(
            rows.product, rows.q_norm, rows.k_norm, rows.angles, config.num_heads, config.num_kv_heads,
            config.rms_norm_eps,
        )  # fmt: skip

    @torch.inference_mode()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [N, hidden] -> float32 [N, vocab], in ``out`` where that is given."""
        logits = self._backend.product(hidden, self._head)
        return logits.float() if out is None else out.copy_(logits)


def rope_table(config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """[max positions, D]: the D/2 cosines of each position, then its D/2 sines; angles are float32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), 1.0 / config.rope_theta**half)
    table = torch.empty((config.max_position_embeddings, config.head_dim), dtype=dtype)
    table[:, : config.head_dim // 2] = angles.cos()
    table[:, config.head_dim // 2 :] = angles.sin_()
    return table
