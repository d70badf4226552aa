"""The KV formats in torch: values to blocks of raw bytes and back (docs/formats.md, byte for byte).

These are the reference: plain tensor operations that give the same bytes on every device. The kernels of
``hmad_kernels`` write and read the same bytes faster and are compared with these in the tests.

Each format is a pair of functions over panels: float32 [..., tokens_per_block, head_dim] <-> uint8
[..., panel_bytes].
"""

from collections.abc import Callable

import torch
from torch import Tensor, unflatten

from hmad.facts.errors import NonFiniteKVError
from hmad.facts.formats import SCALE_GROUP, KVFormat

E4M3_MAX = 448.0
E4M3_MAX_EXPONENT = 8  # 448 = 1.75 * 2^8
INT8_MAX = 127.0
SMALLEST_NORMAL = 2.0**-126
FACE = 16  # a bfp8 tile is 2 x 2 faces of 16 x 16 values
TILE_BYTES = 4 * FACE + 4 * FACE * FACE


def encode(fmt: KVFormat, k: Tensor, v: Tensor) -> Tensor:
    """Encode K and V, float32 or bfloat16 [num_tokens, num_kv_heads, head_dim], to uint8 [num_blocks, block_bytes].

    Positions past the end are zeros. Raises NonFiniteKVError, naming the token rows, for what the format cannot
    hold: NaN, infinities, and for ``bf16`` also finite values that would round to infinity.
    """
    _check_shape(fmt, k, v)
    values = torch.stack((k, v), dim=2).float()  # [num_tokens, num_kv_heads, 2, head_dim]
    _check_finite(fmt, values)
    num_blocks = fmt.num_blocks(len(values))
    padded = values.new_zeros(num_blocks * fmt.tokens_per_block, *values.shape[1:])
    padded[: len(values)] = values
    panels = unflatten(padded, 0, (num_blocks, fmt.tokens_per_block)).permute(0, 2, 3, 1, 4)
    return _ENCODERS[fmt.name](panels.contiguous()).flatten(1)


def decode(fmt: KVFormat, blocks: Tensor, num_tokens: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Decode uint8 [num_blocks, at least block_bytes] to K and V, each float32 [num_tokens, num_kv_heads, head_dim]."""
    num_blocks = fmt.num_blocks(num_tokens)
    block_bytes = 2 * num_kv_heads * fmt.panel_bytes(head_dim)
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or len(blocks) < num_blocks or blocks.shape[1] < block_bytes:
        raise ValueError(
            f"{num_tokens} tokens of {fmt.name} want uint8 [{num_blocks}, {block_bytes}], "
            f"not {blocks.dtype} {list(blocks.shape)}"
        )
    panels = blocks[:num_blocks, :block_bytes].reshape(num_blocks, num_kv_heads, 2, fmt.panel_bytes(head_dim))
    values = _DECODERS[fmt.name](panels, head_dim)  # [num_blocks, num_kv_heads, 2, tokens_per_block, head_dim]
    k, v = values.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :num_tokens]
    return k, v


def _check_shape(fmt: KVFormat, k: Tensor, v: Tensor) -> None:
    if k.dim() != 3 or k.shape != v.shape or k.dtype != v.dtype or k.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            "K and V must both be float32 or both bfloat16 [num_tokens, num_kv_heads, head_dim], "
            f"not {k.dtype} {list(k.shape)} and {v.dtype} {list(v.shape)}"
        )
    if not fmt.fits(k.shape[-1]):
        raise ValueError(f"format {fmt.name} is not defined for head_dim {k.shape[-1]}")


def _check_finite(fmt: KVFormat, values: Tensor) -> None:
    held = values.bfloat16() if fmt.name == "bf16" else values
    finite = held.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        rows = tuple((~finite).nonzero().flatten().tolist())
        raise NonFiniteKVError(f"K or V cannot be encoded as {fmt.name}: not finite in token rows {rows}", rows)


def _bytes_of(values: Tensor) -> Tensor:
    """[..., rows, columns] of any dtype -> uint8 [..., bytes]."""
    return values.contiguous().flatten(-2).view(torch.uint8)


def _encode_fp32(panels: Tensor) -> Tensor:
    return _bytes_of(panels)


def _decode_fp32(panels: Tensor, head_dim: int) -> Tensor:
    return unflatten(panels.contiguous().view(torch.float32), -1, (-1, head_dim))


def _encode_bf16(panels: Tensor) -> Tensor:
    return _bytes_of(panels.bfloat16())


def _decode_bf16(panels: Tensor, head_dim: int) -> Tensor:
    return unflatten(panels.contiguous().view(torch.bfloat16), -1, (-1, head_dim)).float()


def _scale_tokens(panels: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Each token's values over its scale, and the scale [..., tokens, 1] that maps its largest value to ``largest``."""
    peak = panels.abs().amax(dim=-1, keepdim=True)
    # A tensor divisor: division by a Python number may become a multiplication by its rounded reciprocal.
    scale = peak / torch.full_like(peak, largest)
    tiny = scale < SMALLEST_NORMAL
    scale = scale.masked_fill(tiny, 1.0)
    return (panels / scale).masked_fill(tiny, 0.0), scale


def _split_token_scales(panels: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """uint8 [..., panel_bytes] -> values' bytes [..., 32, head_dim] and float32 scales [..., 32, 1]."""
    values, scales = torch.split(panels, [32 * head_dim, 32 * 4], dim=-1)
    return unflatten(values.contiguous(), -1, (32, head_dim)), scales.contiguous().view(torch.float32).unsqueeze(-1)


def _encode_int8(panels: Tensor) -> Tensor:
    scaled, scale = _scale_tokens(panels, INT8_MAX)
    return torch.cat((_bytes_of(scaled.round().to(torch.int8)), _bytes_of(scale)), dim=-1)


def _decode_int8(panels: Tensor, head_dim: int) -> Tensor:
    values, scales = _split_token_scales(panels, head_dim)
    return values.view(torch.int8) * scales


def _to_e4m3(values: Tensor) -> Tensor:
    # Clamped first: whether the cast itself saturates or overflows to NaN depends on the version of torch.
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _encode_fp8_e4m3(panels: Tensor) -> Tensor:
    scaled, scale = _scale_tokens(panels, E4M3_MAX)
    return torch.cat((_bytes_of(_to_e4m3(scaled)), _bytes_of(scale)), dim=-1)


def _decode_fp8_e4m3(panels: Tensor, head_dim: int) -> Tensor:
    values, scales = _split_token_scales(panels, head_dim)
    return values.view(torch.float8_e4m3fn).float() * scales


def _encode_mxfp8(panels: Tensor) -> Tensor:
    groups = unflatten(panels, -1, (-1, SCALE_GROUP))
    peak = groups.abs().amax(dim=-1, keepdim=True)
    # Floor scaling is the peak's exponent field; zeros and subnormals have field 0, which the clamp leaves at 0.
    scale = ((peak.view(torch.int32) >> 23) - E4M3_MAX_EXPONENT).clamp(min=0)
    inverse = ((254 - scale) << 23).view(torch.float32)
    values = _to_e4m3(groups * inverse).flatten(-2)
    return torch.cat((_bytes_of(values), _bytes_of(scale.squeeze(-1).to(torch.uint8))), dim=-1)


def _decode_mxfp8(panels: Tensor, head_dim: int) -> Tensor:
    values, scales = torch.split(panels, [32 * head_dim, head_dim], dim=-1)
    field = unflatten(scales, -1, (32, -1, 1)).int()
    scale = torch.where(field == 0, 1 << 22, field << 23).view(torch.float32)  # 2^-127 is subnormal
    groups = unflatten(values.contiguous().view(torch.float8_e4m3fn), -1, (32, -1, SCALE_GROUP))
    return (groups.float() * scale).flatten(-2)


def _encode_bfp8(panels: Tensor) -> Tensor:
    # [..., 32, head_dim] -> [..., tiles, face rows, face columns, 16, 16]
    split = unflatten(unflatten(panels, -1, (-1, 2, FACE)), -4, (2, FACE))
    bits = split.movedim((-3, -5, -2, -4, -1), (-5, -4, -3, -2, -1)).contiguous().view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    shared = exponent.amax(dim=-1, keepdim=True)
    significand = ((bits & 0x7FFFFF) | 0x800000) >> (shared - exponent).clamp(max=31)
    magnitude = ((significand + 0xFFFF + ((significand >> 17) & 1)) >> 17).clamp(max=127)
    magnitude = magnitude.masked_fill((bits & 0x7FFFFFFF) == 0, 0)
    sign = torch.where((bits < 0) & (magnitude > 0), 0x80, 0)
    tiles = torch.cat((shared.flatten(-4), (magnitude | sign).flatten(-4)), dim=-1)
    return _bytes_of(tiles.to(torch.uint8))


def _decode_bfp8(panels: Tensor, head_dim: int) -> Tensor:
    tiles = unflatten(panels, -1, (head_dim // SCALE_GROUP, TILE_BYTES))
    exponents, values = torch.split(tiles, [4 * FACE, 4 * FACE * FACE], dim=-1)
    field = unflatten(exponents, -1, (2, 2, FACE, 1)).int()
    # 2^(field - 133), which is subnormal for fields up to 6.
    scale = torch.where(field > 6, (field - 6) << 23, 1 << (field + 16).clamp(max=22)).view(torch.float32)
    bits = unflatten(values, -1, (2, 2, FACE, FACE)).int()
    faces = torch.where(bits >= 0x80, -scale, scale) * (bits & 0x7F)
    # [..., tiles, face rows, face columns, 16, 16] -> [..., 32, head_dim]
    return faces.movedim((-5, -4, -3, -2, -1), (-3, -5, -2, -4, -1)).flatten(-3).flatten(-3, -2)


_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp32": _encode_fp32,
    "bf16": _encode_bf16,
    "int8": _encode_int8,
    "fp8_e4m3": _encode_fp8_e4m3,
    "mxfp8": _encode_mxfp8,
    "bfp8": _encode_bfp8,
}
_DECODERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "fp32": _decode_fp32,
    "bf16": _decode_bf16,
    "int8": _decode_int8,
    "fp8_e4m3": _decode_fp8_e4m3,
    "mxfp8": _decode_mxfp8,
    "bfp8": _decode_bfp8,
}
