"""KV formats and geometry: how many bytes a block has and where they lie (docs/formats.md, byte for byte).

A *panel* is ``tokens_per_block`` consecutive positions x head_dim values of one head's K or V. A *block* is one
layer's panels of those positions, K head 0, V head 0, K head 1, ...: any range of heads is one run of bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

SLOT_ALIGN_BYTES = 256
SLOT_BYTES_PER_DIM = 34  # the largest panel of any format is 34 bytes per dim (bfp8)
SCALE_GROUP = 32  # values that share one E8M0 scale in mxfp8; width of a bfp8 tile


@dataclass(frozen=True)
class KVFormat:
    """One KV format: its wire name, tokens per block and panel size."""

    name: str
    tokens_per_block: int
    panel_bytes_of: Callable[[int], int]
    min_head_dim: int = 1

    def panel_bytes(self, head_dim: int) -> int:
        """Bytes of one head's K or V of one block."""
        return self.panel_bytes_of(head_dim)

    def fits(self, head_dim: int) -> bool:
        """Whether the format is defined for this head_dim (``mxfp8`` and ``bfp8`` want multiples of 32)."""
        needs_groups = self.name in ("mxfp8", "bfp8")
        return head_dim >= self.min_head_dim and not (needs_groups and head_dim % SCALE_GROUP)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens``, the last one possibly part full."""
        return -(-num_tokens // self.tokens_per_block)


FORMATS: dict[str, KVFormat] = {
    f.name: f
    for f in (
        KVFormat("fp32", 8, lambda d: 32 * d),
        KVFormat("bf16", 16, lambda d: 32 * d),
        KVFormat("int8", 32, lambda d: 32 * d + 128, min_head_dim=64),
        KVFormat("fp8_e4m3", 32, lambda d: 32 * d + 128, min_head_dim=64),
        KVFormat("mxfp8", 32, lambda d: 33 * d),
        KVFormat("bfp8", 32, lambda d: 34 * d),
    )
}

# What a prefill precision emits when --kv-format is auto; decode writes its own tail in its precision.
NATIVE_FORMAT = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "fp8": "fp8_e4m3", "bfp8": "bfp8"}
# What auto falls back to, in order, when a decode node does not read the native format.
FALLBACK_FORMATS = ("bf16", "int8", "fp8_e4m3", "bfp8", "mxfp8", "fp32")


@dataclass(frozen=True)
class KVGeometry:
    """The shape of a model's KV: what both ends of the wire must agree on."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def slot_bytes(self) -> int:
        """Stride of a slot in one layer of the arena: holds a block of any format."""
        raw = 2 * self.num_kv_heads * SLOT_BYTES_PER_DIM * self.head_dim
        return -(-raw // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES

    def block_bytes(self, fmt: KVFormat, num_heads: int | None = None) -> int:
        """Bytes of one block, or of ``num_heads`` heads of it."""
        heads = self.num_kv_heads if num_heads is None else num_heads
        return 2 * heads * fmt.panel_bytes(self.head_dim)


def preferred_formats(kv_format: str, precision: str) -> list[KVFormat]:
    """The formats a prefill node would offer, best first: the one it was told, or its native one and every other."""
    names = dict.fromkeys((NATIVE_FORMAT[precision], *FALLBACK_FORMATS)) if kv_format == "auto" else (kv_format,)
    return [FORMATS[name] for name in names]


def negotiate(offered: tuple[str, ...], accepted: tuple[str, ...]) -> str | None:
    """The first offered format the decode node reads, or None."""
    return next((name for name in offered if name in accepted), None)
