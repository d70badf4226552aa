"""Pack K and V into blocks of a KV format, straight into the memory that leaves for the wire.

One launch encodes K and V of all heads; the format is a branch on one panel's rows. Bytes as docs/formats.md has them.
The reference twin is ``hmad.compute.codecs.encode``, which kernels must not import: the tests compare the two.
"""

import functools

import numpy as np
import torch
from numba import njit

from hmad_kernels import cpu_team
from hmad_kernels.cpu_common import (
    BF16,
    BF16_OVERFLOW_BITS,
    COMPILE,
    DTYPES,
    FACE,
    FORMAT_NAMES,
    FP8_E4M3,
    FP32,
    GROUP,
    HELPER,
    INFINITY_BITS,
    INT8,
    MAGNITUDE,
    MXFP8,
    ROUND_TO_INTEGER,
    TILE_ROWS,
    TOKENS_PER_BLOCK,
    array_at,
    bits_of,
    check_kv,
    f32_to_bf16,
    fill,
    float_of,
    is_defined,
    panel_bytes,
    to_f32,
)
from hmad_kernels.cpu_team import by_dtype, share_of

PARALLEL_VALUES = 1 << 14  # from here on more threads gain more than their start costs
SMALLEST_NORMAL = np.float32(2.0**-126)
ONE = np.float32(1.0)
INT8_MAX = np.float32(127.0)
E4M3_MAX = np.float32(448.0)
E4M3_MAX_EXPONENT = 8  # 448 = 1.75 * 2^8
# As ROUND_TO_INTEGER, in steps of 2^-9, the spacing of E4M3 subnormals.
ROUND_TO_E4M3_SUBNORMAL = np.float32(16384.0)
E4M3_MIN_NORMAL = np.float32(2.0**-6)


def pack_blocks(format_name: str, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> tuple[int, ...]:
    """Encode k and v [num_tokens, num_kv_heads, head_dim] into out, uint8 [num_blocks, block_bytes].

    k and v are both float32 or both bfloat16; the last dimension is contiguous, the others may have any stride.
    Positions past the end are encoded as zeros. Returns the token rows that the format cannot hold (NaN, infinity, or
    rounding to one): () means all is well, otherwise ``out`` must not be used. Raises ValueError on shapes, dtypes and
    memory that do not fit.
    """
    code = _check(format_name, k, v, out)
    num_tokens, num_heads, head_dim = k.shape
    bad = torch.zeros(num_tokens, dtype=torch.uint8)
    job = (
        k.dtype == torch.bfloat16, code, num_tokens, num_heads, head_dim, *out.shape,
        k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        out.data_ptr(), bad.data_ptr(),
    )  # fmt: skip
    cpu_team.run(_body(), job, parallel=k.numel() >= PARALLEL_VALUES)
    return tuple(bad.nonzero().flatten().tolist()) if bad.any() else ()


def _check(format_name: str, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> int:
    if format_name not in FORMAT_NAMES:
        raise ValueError(f"unknown KV format {format_name!r}")
    code = FORMAT_NAMES.index(format_name)
    check_kv(k, v)
    if not (k.is_cpu and v.is_cpu and out.is_cpu):
        raise ValueError("k, v and out must be in CPU memory")
    num_tokens, num_heads, head_dim = k.shape
    if not is_defined(code, head_dim):
        raise ValueError(f"format {format_name} is not defined for head_dim {head_dim}")
    num_blocks = -(-num_tokens // TOKENS_PER_BLOCK[code])
    shape = (num_blocks, 2 * num_heads * panel_bytes(code, head_dim))
    if out.dtype != torch.uint8 or tuple(out.shape) != shape or not out.is_contiguous() or out.data_ptr() % 4:
        raise ValueError(
            f"out must be contiguous uint8 {list(shape)}, aligned to 4 bytes, not {out.dtype} {list(out.shape)}"
        )
    return code


@functools.cache
def _body() -> cpu_team.Body:
    """The kernel for both element types, compiled (or read from the cache) at the first call."""

    @cpu_team.body
    def pack(job):
        by_dtype(_pack, job)

    return pack


@njit(**COMPILE)
def _pack(job, tag):
    """This thread's share of the panels. Words: those of pack_blocks."""
    code, num_tokens, num_heads, head_dim, num_blocks, block_bytes = job[1], job[2], job[3], job[4], job[5], job[6]
    tokens_per_block = TOKENS_PER_BLOCK[code]
    size = panel_bytes(code, head_dim)
    out_u8 = array_at(job[13], (num_blocks, block_bytes), np.uint8(0))
    out_u16 = array_at(job[13], (num_blocks, block_bytes // 2), np.uint16(0))
    out_u32 = array_at(job[13], (num_blocks, block_bytes // 4), np.uint32(0))
    bad = array_at(job[14], (num_tokens,), np.uint8(0))
    limit = BF16_OVERFLOW_BITS if code == BF16 else INFINITY_BITS
    row = np.empty(head_dim, np.uint32)  # one token's values, as float32 bits
    spare = np.empty(head_dim, np.uint32)
    first_panel, end_panel = share_of(num_blocks * num_heads * 2)
    for panel in range(first_panel, end_panel):
        block, head, is_v = panel // (2 * num_heads), (panel // 2) % num_heads, panel % 2
        source, token_stride, head_stride = job[7 + is_v], job[9 + 2 * is_v], job[10 + 2 * is_v]
        begin, end = (2 * head + is_v) * size, (2 * head + is_v + 1) * size
        target_u8 = out_u8[block, begin:end]
        target_u16 = out_u16[block, begin // 2 : end // 2]
        target_u32 = out_u32[block, begin // 4 : end // 4]
        for t in range(tokens_per_block):
            token = block * tokens_per_block + t
            if token >= num_tokens:
                fill(row, np.uint32(0))
            else:
                first = token * token_stride + head * head_stride
                _load_row(array_at(source, (first + head_dim,), tag)[first:], row)
            peak = _peak(row)
            if peak >= limit:
                bad[token] = 1
            _encode_row(code, t, row, peak, spare, target_u8, target_u16, target_u32)


@njit(**HELPER)
def _load_row(source, row):
    for i in range(row.shape[0]):
        row[i] = bits_of(to_f32(source[i]))


@njit(**HELPER)
def _peak(row):
    """The largest magnitude, as bits: they order as the values do, and every NaN is above infinity."""
    peak = np.uint32(0)
    for i in range(row.shape[0]):
        peak = max(peak, np.uint32(row[i] & MAGNITUDE))  # numba widens what & gives
    return peak


@njit(**HELPER)
def _encode_row(code, t, row, peak, spare, panel_u8, panel_u16, panel_u32):
    """Encode token ``t`` of a panel: row holds its values' bits, peak the largest magnitude among them."""
    head_dim = row.shape[0]
    target = panel_u8[t * head_dim : (t + 1) * head_dim]
    if code == FP32:
        _store_fp32(row, panel_u32[t * head_dim : (t + 1) * head_dim])
    elif code == BF16:
        _store_bf16(row, panel_u16[t * head_dim : (t + 1) * head_dim])
    elif code == INT8:
        scale = _token_scale(peak, INT8_MAX)
        panel_u32[8 * head_dim + t] = bits_of(scale if scale > 0 else ONE)
        _store_int8(row, scale, target)
    elif code == FP8_E4M3:
        scale = _token_scale(peak, E4M3_MAX)
        panel_u32[8 * head_dim + t] = bits_of(scale if scale > 0 else ONE)
        _store_e4m3(row, scale, target)
    elif code == MXFP8:
        num_groups = head_dim // GROUP
        first = 32 * head_dim + t * num_groups
        _scale_groups(row, spare, panel_u8[first : first + num_groups])
        _store_e4m3(row, ONE, target)
    else:
        _store_bfp8(row, spare, t, panel_u8, panel_u32)


@njit(**HELPER)
def _store_fp32(row, target):
    for i in range(row.shape[0]):
        target[i] = row[i]


@njit(**HELPER)
def _store_bf16(row, target):
    for i in range(row.shape[0]):
        target[i] = f32_to_bf16(float_of(row[i]))


@njit(**HELPER)
def _token_scale(peak, largest):
    """The scale that maps the peak to ``largest``; 0 where it would be subnormal: such a token's values are all 0."""
    scale = float_of(peak) / largest
    return scale if scale >= SMALLEST_NORMAL else np.float32(0)


@njit(**HELPER)
def _store_int8(row, scale, target):
    if scale == 0:
        fill(target, np.uint8(0))
        return
    for i in range(row.shape[0]):
        target[i] = np.uint8(bits_of(float_of(row[i]) / scale + ROUND_TO_INTEGER))


@njit(forceinline=True, **HELPER)
def _e4m3(value):
    """The bits of a float32 rounded to E4M3, ties to even, saturating at 448."""
    bits = bits_of(value)
    magnitude = bits & MAGNITUDE
    normal = (magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    normal = min(normal - np.uint32(120 << 3), np.uint32(0x7E))  # exponent bias 127 -> 7
    size = float_of(magnitude)
    subnormal = bits_of(size + ROUND_TO_E4M3_SUBNORMAL) & np.uint32(0xF)
    return np.uint8((subnormal if size < E4M3_MIN_NORMAL else normal) | ((bits >> np.uint32(24)) & np.uint32(0x80)))


@njit(**HELPER)
def _store_e4m3(row, scale, target):
    if scale == 0:
        fill(target, np.uint8(0))
        return
    for i in range(row.shape[0]):
        target[i] = _e4m3(float_of(row[i]) / scale)


@njit(**HELPER)
def _scale_groups(row, inverse, scales):
    """Divide each mxfp8 group by its scale, in place; a scale is the peak's exponent (0 for subnormals) less 8."""
    for g in range(scales.shape[0]):
        peak = _peak(row[g * GROUP : (g + 1) * GROUP])
        exponent = np.int64(peak >> np.uint32(23))
        scale = exponent - E4M3_MAX_EXPONENT if exponent > E4M3_MAX_EXPONENT else np.int64(0)
        scales[g] = np.uint8(scale)
        fill(inverse[g * GROUP : (g + 1) * GROUP], np.uint32(254 - scale) << np.uint32(23))
    for i in range(row.shape[0]):
        row[i] = bits_of(float_of(row[i]) * float_of(inverse[i]))


@njit(**HELPER)
def _store_bfp8(row, shared, t, panel_u8, panel_u32):
    """Store one token's values and exponents into the faces that they belong to.

    The arithmetic runs over the whole row at once, because rows of 16 are too short to vectorize well.
    """
    for h in range(row.shape[0] // FACE):
        exponent = _peak(row[h * FACE : (h + 1) * FACE]) >> np.uint32(23)
        fill(shared[h * FACE : (h + 1) * FACE], exponent)
        face = 2 * (t // FACE) + h % 2
        panel_u8[((h // 2) * TILE_ROWS + face) * FACE + t % FACE] = np.uint8(exponent)
    for i in range(row.shape[0]):
        row[i] = _bfp8(row[i], shared[i])
    for h in range(row.shape[0] // FACE):
        face = 2 * (t // FACE) + h % 2
        first = ((h // 2) * TILE_ROWS + 4 + FACE * face + t % FACE) * (FACE // 4)
        for w in range(FACE // 4):
            i = h * FACE + 4 * w
            low = row[i] | (row[i + 1] << np.uint32(8))
            panel_u32[first + w] = low | (row[i + 2] << np.uint32(16)) | (row[i + 3] << np.uint32(24))


@njit(forceinline=True, **HELPER)
def _bfp8(bits, shared):
    """Sign and 7-bit magnitude of a float32 relative to an exponent: truncated to 24 bits, then rounded to even."""
    shift = min(shared - ((bits >> np.uint32(23)) & np.uint32(0xFF)), np.uint32(31))
    significand = ((bits & np.uint32(0x7FFFFF)) | np.uint32(0x800000)) >> shift
    rounded = (significand + np.uint32(0xFFFF) + ((significand >> np.uint32(17)) & np.uint32(1))) >> np.uint32(17)
    magnitude = min(rounded, np.uint32(127)) if bits & MAGNITUDE else np.uint32(0)
    sign = (bits >> np.uint32(24)) & np.uint32(0x80)
    return magnitude | (sign if magnitude else np.uint32(0))


def warm_up() -> None:
    """Compile what is not in the cache yet."""
    for dtype in DTYPES:
        k = torch.zeros(1, 1, 32, dtype=dtype)
        pack_blocks("bfp8", k, k, torch.empty(1, 2 * 34 * 32, dtype=torch.uint8))
