"""Qwen3: one forward for both phases. What attention does with K and V is the caller's business."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from hmad.compute.checkpoint import ModelConfig, Weights, open_weights, read_config
from hmad.compute.linears import Activation, Linear, activation_dtype, make_linear
from hmad_kernels import cpu_rows
from hmad_kernels.cpu_rows import Product

# (layer_id, q [T, H, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, H, D]. The three are views of one buffer: heads are
# contiguous, tokens are (H + 2 Hkv) * D values apart.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RowOps:
    """What happens to rows between linear layers; another device brings its own."""

    norm: Callable[[Tensor, Product | None, Tensor, float], Activation]  # feeds linears
    final_norm: Callable[[Tensor, Product | None, Tensor, float], Tensor]  # feeds the LM head
    silu_mul: Callable[[Product], Activation]
    qk_norm_rope: Callable[[Product, Tensor, Tensor, Tensor, int, int, float], Tensor]


def cpu_row_ops(precision: str) -> RowOps:
    """In int8 each row leaves its kernel quantized, ready for the linear that follows."""
    if precision == "int8":
        norm, silu_mul = cpu_rows.add_rms_norm_int8, cpu_rows.silu_mul_int8
        return RowOps(norm, cpu_rows.add_rms_norm, silu_mul, cpu_rows.qk_norm_rope)
    return RowOps(cpu_rows.add_rms_norm, cpu_rows.add_rms_norm, cpu_rows.silu_mul, cpu_rows.qk_norm_rope)


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
    """A dense Qwen3 on CPU, its linear layers in one precision, all else in bfloat16 (float32 for fp32)."""

    def __init__(self, config: ModelConfig, precision: str, weights: Weights) -> None:
        self.config = config
        self.precision = precision
        self.dtype = activation_dtype(precision)
        self._rows = cpu_row_ops(precision)
        self._embedding = weights.read("model.embed_tokens.weight").to(self.dtype)  # [vocab, hidden]
        self._head = self._embedding if config.tied else weights.read("lm_head.weight").to(self.dtype)
        self._final_norm = weights.read("model.norm.weight").to(self.dtype)
        self._layers = [self._load_layer(weights, i) for i in range(config.num_layers)]
        self._rope = rope_table(config, self.dtype)  # [max positions, D]

    def _load_layer(self, weights: Weights, layer_id: int) -> Layer:
        def read(name: str) -> Tensor:
            return weights.read(f"model.layers.{layer_id}.{name}.weight")

        def make(*names: str) -> Linear:
            return make_linear(self.precision, *(read(name) for name in names))

        return Layer(
            input_norm=read("input_layernorm").to(self.dtype),
            qkv=make("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            q_norm=read("self_attn.q_norm").to(self.dtype),
            k_norm=read("self_attn.k_norm").to(self.dtype),
            o=make("self_attn.o_proj"),
            post_norm=read("post_attention_layernorm").to(self.dtype),
            gate_up=make("mlp.gate_proj", "mlp.up_proj"),
            down=make("mlp.down_proj"),
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
        residual = self._embedding.index_select(0, token_ids)  # [T, hidden]
        cos_sin = self._rope.index_select(0, positions)  # [T, D]
        delta: Product | None = None  # what the layer before adds to the residual
        for layer_id, layer in enumerate(self._layers):
            before_layer(layer_id)
            q, k, v = self._project(layer, residual, delta, cos_sin)
            attended = attend(layer_id, q, k, v).reshape(len(residual), -1)  # [T, H * D]
            delta = self._mlp(layer, residual, layer.o(attended))
        return self._rows.final_norm(residual, delta, self._final_norm, self.config.rms_norm_eps)

    def _project(
        self, layer: Layer, residual: Tensor, delta: Product | None, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        num_heads, num_kv_heads, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
        product = layer.qkv(self._rows.norm(residual, delta, layer.input_norm, eps))
        qkv = self._rows.qk_norm_rope(product, layer.q_norm, layer.k_norm, cos_sin, num_heads, num_kv_heads, eps)
        heads = qkv.view(len(qkv), -1, config.head_dim)  # [T, H + 2 Hkv, D]
        num_rotated = num_heads + num_kv_heads
        return heads[:, :num_heads], heads[:, num_heads:num_rotated], heads[:, num_rotated:]

    def _mlp(self, layer: Layer, residual: Tensor, attention_out: Product) -> Product:
        normed = self._rows.norm(residual, attention_out, layer.post_norm, self.config.rms_norm_eps)
        return layer.down(self._rows.silu_mul(layer.gate_up(normed)))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, hidden] -> float32 [N, vocab]."""
        return linear(hidden, self._head).float()


def rope_table(config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """[max positions, D]: the D/2 cosines of each position, then its D/2 sines; angles are float32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), 1.0 / config.rope_theta**half)
    table = torch.empty((config.max_position_embeddings, config.head_dim), dtype=dtype)
    table[:, : config.head_dim // 2] = angles.cos()
    table[:, config.head_dim // 2 :] = angles.sin_()
    return table


def load_model(model_dir: Path, precision: str, load_format: str = "safetensors", seed: int = 0) -> Qwen3:
    """The model of a directory; ``load_format`` is safetensors or dummy (random weights of ``seed``)."""
    config = read_config(model_dir)
    return Qwen3(config, precision, open_weights(model_dir, config, load_format, seed))
