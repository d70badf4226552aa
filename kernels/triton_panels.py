"""How words of raw 8-bit KV become float16 operands, in registers. Bytes as docs/formats.md has them.

Bytes 0 to 3 of word j are dims 4j to 4j + 3. Integer operations on whole words place each value's bits in a float16,
which holds every value of these formats exactly up to a scale per token (but for values that are 2^-19 of the token's
largest and less). The reference twin is ``hmad.compute.codecs.decode``, which kernels must not import: the tests
compare the two.
"""

import triton
import triton.language as tl

from hmad_kernels.triton_common import BFP8, FP8_E4M3, INT8, MXFP8, TILE_BYTES, float_of

WORD_BLOCK_TOKENS = tl.constexpr(32)  # tokens per block of every 8-bit format
LOWEST_BFP8 = tl.constexpr(12)  # below this largest exponent field, a token's scale would be subnormal
LOWEST_MXFP8 = tl.constexpr(7)


@triton.jit
def load_step(
    panels, slot, start, num_tokens, slot_words,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, PANEL_WORDS: tl.constexpr,
):  # fmt: skip
    """Raw words and scales of K and V of the tokens from ``start`` on, one for each slot id."""
    t = start + tl.arange(0, slot.shape[0])
    panel = panels + slot.to(tl.int64) * slot_words
    inside = t % WORD_BLOCK_TOKENS
    k_words, k_scales = _load_panel(panel, inside, t < num_tokens, FORMAT, HEAD_DIM)
    v_words, v_scales = _load_panel(panel + PANEL_WORDS, inside, t < num_tokens, FORMAT, HEAD_DIM)
    return k_words, k_scales, v_words, v_scales


@triton.jit
def _load_panel(panel, t, live, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Tokens t [TOKENS] of the panels that begin at word panel[i]: words uint32 [TOKENS, HEAD_DIM / 4] and what their
    scales are made of: a float32 of each token, an exponent field of each 32 dims (mxfp8), or two of them (bfp8).
    """
    WORDS: tl.constexpr = HEAD_DIM // 4
    j = tl.arange(0, WORDS)
    groups = tl.arange(0, HEAD_DIM // 32)
    place = (t * WORDS)[:, None] + j[None, :]
    if FORMAT == MXFP8:
        scale_place = (t * (HEAD_DIM // 32))[:, None] + groups[None, :]
        scales = _load_bytes((panel + 8 * HEAD_DIM)[:, None], scale_place, live)
    elif FORMAT == BFP8:
        place = (16 + t // 16 * 128 + t % 16 * 4)[:, None] + (j // 8 * (TILE_BYTES // 4) + j // 4 % 2 * 64 + j % 4)
        scale_place = (t // 16 * 32 + t % 16)[:, None] + groups[None, :] * TILE_BYTES
        scales = _load_bytes(panel[:, None], scale_place, live)
        scales |= _load_bytes(panel[:, None] + 4, scale_place, live) << 8
    else:
        scales = tl.load((panel + 8 * HEAD_DIM + t).to(tl.pointer_type(tl.float32)), mask=live, other=0.0)
    words = tl.load(panel[:, None] + place, mask=live[:, None], other=0).to(tl.uint32, bitcast=True)
    return words, scales


@triton.jit
def decode_words(words, scales, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Four planes float16 [TOKENS, HEAD_DIM / 4], and the float32 scale of each token that their values lack."""
    if FORMAT == INT8:
        p0, p1, p2, p3 = _int8_planes(words)
        scale = scales
    elif FORMAT == FP8_E4M3:
        p0, p1, p2, p3 = _e4m3_planes(words)
        scale = scales * 256.0
    elif FORMAT == MXFP8:
        largest = tl.maximum(tl.max(scales, axis=1), LOWEST_MXFP8)
        factor = _as_half(_repeat(_half_power_bits(scales - largest[:, None] + 14), words.shape, 8))
        p0, p1, p2, p3 = _e4m3_planes(words)
        p0, p1, p2, p3 = p0 * factor, p1 * factor, p2 * factor, p3 * factor
        scale = float_of((largest - 6) << 23)
    else:
        left, right = scales & 0xFF, scales >> 8
        largest = tl.maximum(tl.max(tl.maximum(left, right), axis=1), LOWEST_BFP8)
        shift = 5 - largest[:, None]
        bits = tl.join(_half_power_bits(left + shift), _half_power_bits(right + shift))
        factor = _as_half(_repeat(tl.reshape(bits, [words.shape[0], HEAD_DIM // 16]), words.shape, 4))
        p0, p1, p2, p3 = _bfp8_planes(words, factor)
        scale = float_of((largest - 11) << 23)
    return p0, p1, p2, p3, scale


@triton.jit
def _load_bytes(words, place, live):
    """Byte ``place`` counted from a pointer to words, as int32. Read as a word: the compiler takes the narrowest load
    that an operand depends on for the width of its values, and lays it out for that.
    """
    word = tl.load(words + place // 4, mask=live[:, None], other=0)
    return (word >> (place % 4 * 8)) & 0xFF


@triton.jit
def _half_power_bits(exponent):
    """The bits of 2^exponent as float16; 0 where it would be subnormal."""
    return tl.maximum(exponent + 15, 0) << 10


@triton.jit
def _repeat(x, shape: tl.constexpr, TIMES: tl.constexpr):
    """Each column of x TIMES times in a row."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [x.shape[0], x.shape[1], TIMES]), shape)


@triton.jit
def _as_half(bits):
    """The float16 that the low 16 bits are."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _planes(even, odd):
    """Words of two float16 of bytes 0 and 2, and of 1 and 3, as four planes."""
    return _as_half(even), _as_half(odd), _as_half(even >> 16), _as_half(odd >> 16)


@triton.jit
def _int8_planes(words):
    """Signed bytes as float16: with the sign bit flipped they are the low bits of 1024 + 128 + value."""
    words ^= 0x80808080
    p0, p1, p2, p3 = _planes((words & 0x00FF00FF) | 0x64006400, ((words >> 8) & 0x00FF00FF) | 0x64006400)
    return p0 - 1152.0, p1 - 1152.0, p2 - 1152.0, p3 - 1152.0


@triton.jit
def _e4m3_planes(words):
    """E4M3 bytes as float16 times 2^-8: sign, exponent and mantissa moved into place, subnormal numbers too. The byte
    of a NaN, which no encoder writes, reads as 480.
    """
    shifted = words << 8
    even = (shifted & 0x80008000) | ((shifted >> 1) & 0x3F803F80)
    odd = (words & 0x80008000) | ((words >> 1) & 0x3F803F80)
    return _planes(even, odd)


@triton.jit
def _bfp8_planes(words, factor):
    """Sign and magnitude bytes as float16 times factor: as bytes of 128 + value, then as signed bytes are read."""
    negative = words & 0x80808080
    ones = negative >> 7
    words = (words ^ (negative - ones) ^ 0x80808080) + ones  # 128 + m, or 127 - m + 1
    p0, p1, p2, p3 = _planes((words & 0x00FF00FF) | 0x64006400, ((words >> 8) & 0x00FF00FF) | 0x64006400)
    offset = factor * 1152.0
    return p0 * factor - offset, p1 * factor - offset, p2 * factor - offset, p3 * factor - offset
