"""How one panel of raw KV bytes becomes float32, on its way into attention. Bytes as docs/formats.md has them.

The reference twin is ``hmad.compute.codecs.decode``, which kernels must not import: the tests compare the two.
"""

import numpy as np
from numba import njit

from hmad_kernels.cpu_common import (
    BF16,
    FACE,
    FP8_E4M3,
    FP32,
    GROUP,
    HELPER,
    INT8,
    MXFP8,
    TILE_ROWS,
    array_at,
    bits_of,
    fill,
    float_of,
    to_f32,
)

UNROLL = 4  # tokens that attention takes in one pass; every tokens_per_block is a multiple
E4M3_SUBNORMAL_STEP = np.float32(2.0**-9)


def spare_values(head_dim: int) -> int:
    """Float32 values that decode_panel needs beside the panel: one token's scales, and room for its bytes."""
    return head_dim + head_dim // 4


@njit(**HELPER)
def spare_views(memory, memory_u8, first, head_dim):
    """The spare memory that begins at value ``first`` of a worker's scratch, seen as float32 and as bytes.

    Scales [head_dim], again by mxfp8 groups and by bfp8 face rows; then a token's bytes [head_dim], gathered where
    they are not contiguous, again as words by face rows.
    """
    end = first + head_dim
    num_groups, num_faces = head_dim // GROUP, head_dim // FACE
    return (
        memory[first:end],
        memory[first : first + num_groups * GROUP].reshape(num_groups, GROUP),
        memory[first : first + num_faces * FACE].reshape(num_faces, FACE),
        memory_u8[4 * end : 4 * end + head_dim],
        memory[end : end + num_faces * (FACE // 4)].reshape(num_faces, FACE // 4),
    )


@njit(**HELPER)
def slot_views(address, num_slots, slot_bytes):
    """One layer's slots as bytes, bfloat16 bits and float32, then in rows of 16 bytes as bytes and as words."""
    return (
        array_at(address, (num_slots, slot_bytes), np.uint8(0)),
        array_at(address, (num_slots, slot_bytes // 2), np.uint16(0)),
        array_at(address, (num_slots, slot_bytes // 4), np.float32(0)),
        array_at(address, (num_slots, slot_bytes // FACE, FACE), np.uint8(0)),
        array_at(address, (num_slots, slot_bytes // FACE, FACE // 4), np.float32(0)),
    )


@njit(**HELPER)
def decode_panel(code, views, slot, start, tokens, panel, spare):
    """Decode one panel that starts at byte ``start`` of a slot, rounded up to whole UNROLLs of tokens.

    The rows past the end repeat the last token, so that nothing undefined enters a sum. ``views`` are of slot_views,
    ``spare`` of spare_views.
    """
    memory_u8, memory_u16, memory_f32 = views[0][slot], views[1][slot], views[2][slot]
    scales, scales_32, scales_16, gathered_u8, gathered_f32 = spare
    head_dim = panel.shape[1]
    for t in range(-(-tokens // UNROLL) * UNROLL):
        token = min(t, tokens - 1)
        row = panel[t]
        source = memory_u8[start + token * head_dim : start + (token + 1) * head_dim]
        if code == FP32:
            _load_values(memory_f32[start // 4 + token * head_dim : start // 4 + (token + 1) * head_dim], row)
        elif code == BF16:
            _load_values(memory_u16[start // 2 + token * head_dim : start // 2 + (token + 1) * head_dim], row)
        elif code == INT8:
            _load_int8(source, memory_f32[start // 4 + 8 * head_dim + token], row)
        elif code == FP8_E4M3:
            fill(scales, memory_f32[start // 4 + 8 * head_dim + token])
            _load_e4m3(source, scales, row)
        elif code == MXFP8:
            _spread_mxfp8(memory_u8[start + 32 * head_dim : start + 33 * head_dim], token, scales_32)
            _load_e4m3(source, scales, row)
        else:
            first = start // FACE
            _gather_bfp8(views[3][slot, first:], views[4][slot, first:], token, scales_16, gathered_f32)
            _load_bfp8(gathered_u8, scales, row)


@njit(**HELPER)
def _load_values(source, row):
    for i in range(row.shape[0]):
        row[i] = to_f32(source[i])


@njit(**HELPER)
def _load_int8(source, scale, row):
    for i in range(row.shape[0]):
        row[i] = np.float32(np.int8(source[i])) * scale


@njit(**HELPER)
def _load_e4m3(source, scales, row):
    for i in range(row.shape[0]):
        byte = np.uint32(source[i])
        magnitude = byte & np.uint32(0x7F)
        normal = float_of((magnitude << np.uint32(20)) + np.uint32(120 << 23))  # exponent bias 7 -> 127
        value = normal if magnitude >= np.uint32(8) else np.float32(magnitude) * E4M3_SUBNORMAL_STEP
        value = value if magnitude < np.uint32(0x7F) else np.float32(np.nan)
        row[i] = float_of(bits_of(value) | ((byte & np.uint32(0x80)) << np.uint32(24))) * scales[i]


@njit(**HELPER)
def _load_bfp8(source, scales, row):
    for i in range(row.shape[0]):
        byte = np.uint32(source[i])
        size = np.float32(byte & np.uint32(0x7F)) * scales[i]
        row[i] = float_of(bits_of(size) | ((byte & np.uint32(0x80)) << np.uint32(24)))


@njit(**HELPER)
def _spread_mxfp8(fields, token, scales):
    """One token's scales [head_dim / 32, 32], each repeated for the dims that share it."""
    for g in range(scales.shape[0]):
        fill(scales[g], _power_of_two(np.int64(fields[token * scales.shape[0] + g]) - 127))


@njit(forceinline=True, **HELPER)
def _gather_bfp8(rows_u8, rows_f32, token, scales, gathered):
    """One token's values, gathered from the faces of a panel in rows of 16 bytes, and their scales spread alike."""
    for h in range(scales.shape[0]):
        face = 2 * (token // FACE) + h % 2
        tile = (h // 2) * TILE_ROWS
        fill(scales[h], _power_of_two(np.int64(rows_u8[tile + face, token % FACE]) - 133))
        for i in range(FACE // 4):
            gathered[h, i] = rows_f32[tile + 4 + FACE * face + token % FACE, i]


@njit(**HELPER)
def _power_of_two(exponent):
    """2^exponent as float32, for -149..128 (128: infinity)."""
    if exponent < -126:
        return float_of(np.uint32(1) << np.uint32(exponent + 149))
    return float_of(np.uint32(exponent + 127) << np.uint32(23))
