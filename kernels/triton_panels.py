"""How words of raw 8-bit KV become float16 operands, in registers. Bytes as docs/formats.md has them.

Bytes 0 to 3 of word j are dims 4j to 4j + 3. Operations on whole words make two float16 at a time, which hold every
value of these formats exactly: int8 and fp8_e4m3 up to a scale per token, the others up to one *unit* per block of 32
tokens (but for what is 2^-22 of the block's largest value and less). Where the device has instructions that permute
bytes or convert E4M3 (``CAPABILITY``, NVIDIA's compute capability as a number of two or three digits, 0 elsewhere),
they take the place of shifts and masks: a third fewer instructions to a value. Operands of int8 and bfp8 begin as
subnormal numbers, which NVIDIA's matrix units take as they are, and AMD's from gfx940 on.

Rows of the loads are in the order in which an operand of the tensor cores lies in the lanes, so that what a lane reads
in 16 bytes stays in its registers. Only where a value's token and dim are matters for correctness, and that is plain
indexing; if a compiler lays operands out otherwise, it moves the values, and the result is the same. The reference twin
is ``hmad.compute.codecs.decode``, which kernels must not import: the tests compare the two.
"""

import triton
import triton.language as tl

from hmad_kernels.triton_common import BFP8, FP8_E4M3, INT8, MXFP8, TILE_BYTES

WORD_BLOCK_TOKENS = tl.constexpr(32)  # tokens per block of every 8-bit format
# How far the exponent field of a block's unit is below that of the block's largest values, and the float16 exponent
# field that these are scaled with: no value overflows, and the unit is never an infinity.
MXFP8_DEPTH, MXFP8_TOP = tl.constexpr(7), tl.constexpr(22)
BFP8_DEPTH, BFP8_TOP = tl.constexpr(11), tl.constexpr(30)
E4M3_CAPABILITY = tl.constexpr(89)  # the first that converts E4M3 itself
# What operands are too small by, on top of their token's scale or their block's unit.
INT8_SCALE, E4M3_PLACED_SCALE, BFP8_SCALE = tl.constexpr(2.0**24), tl.constexpr(2.0**8), tl.constexpr(2.0**14)


@triton.jit
def load_k(panel, num_tokens, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Words [HEAD_DIM / 64 * 128, 4], rows as _k_rows; without any tokens, nothing is read."""
    t, first = _k_rows(HEAD_DIM)
    return _load_words(panel, t, first, num_tokens, FORMAT, HEAD_DIM)


@triton.jit
def load_v(panel, num_tokens, ODD: tl.constexpr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, K_WIDTH: tl.constexpr):
    """Words [128, HEAD_DIM / 32] of every other token, rows as _v_rows of eighths."""
    t, first = _v_rows(ODD, HEAD_DIM // 16, HEAD_DIM, K_WIDTH)
    words = _load_words(panel, t, first, num_tokens, FORMAT, HEAD_DIM)
    if HEAD_DIM == 64:  # 16 bytes are two of its eighths
        words = tl.permute(tl.reshape(words, [4, 4, 4, 2, 2]), (0, 1, 3, 2, 4))
    return tl.reshape(words, [128, HEAD_DIM // 32])


@triton.jit
def k_exponents(scales, unit, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The ``exponents`` that ``_halves`` takes of the rows of load_k: the same for both values of a pair.

    Exponents come from the lanes that hold ``scales``: where they were read again, the compiler had a step wait for
    them and for the next block's loads together.
    """
    t, first = _k_rows(HEAD_DIM)
    word, shift = _exponent_place(t, first, FORMAT)
    if FORMAT == BFP8:  # a half of the dims has a half of the words: one exchange instead of two
        word = tl.reshape(word % 32, [HEAD_DIM // 64, 128])
        words = tl.reshape(tl.gather(tl.reshape(scales, [HEAD_DIM // 64, 32]), word, 1), [HEAD_DIM * 2])
    else:
        words = tl.gather(scales, word, 0)
    return (_exponent_bits(words, shift, unit, FORMAT) * 0x10001)[:, None]


@triton.jit
def v_exponents(scales, unit, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, K_WIDTH: tl.constexpr):
    """The same of the rows of load_v: a pair is an even and an odd token."""
    even_t, first = _v_rows(0, 8, HEAD_DIM, K_WIDTH)
    even_word, even_shift = _exponent_place(even_t, first, FORMAT)
    odd_word, odd_shift = _exponent_place(even_t + 1, first, FORMAT)
    evens = _exponent_bits(tl.gather(scales, even_word, 0), even_shift, unit, FORMAT)
    odds = _exponent_bits(tl.gather(scales, odd_word, 0), odd_shift, unit, FORMAT)
    return (evens | (odds << 16))[:, None]


@triton.jit
def _k_rows(HEAD_DIM: tl.constexpr):
    """Token and first word of row (h, t, c): words 16 h + 4 c and three more of token t."""
    row = tl.arange(0, HEAD_DIM // 64 * 128)
    return row // 4 % 32, row // 128 * 16 + row % 4 * 4


@triton.jit
def _v_rows(ODD: tl.constexpr, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, K_WIDTH: tl.constexpr):
    """Token and first word of row (half, s, g, c): part g of token 16 half + 4 c + 2 s + ODD (width 2: 2 c + 8 s)."""
    row = tl.arange(0, 16 * PARTS)
    quarter = row // (4 * PARTS)
    t = row % 4 * 4 + quarter // 2 * 16 + quarter % 2 * 2 if K_WIDTH == 4 else row % 4 * 2 + quarter * 8
    return t + ODD, row // 4 % PARTS * (HEAD_DIM // 4 // PARTS)


@triton.jit
def _load_words(panel, t, first, num_tokens, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """16 bytes of every row."""
    source = panel + _word_place(t, first, FORMAT, HEAD_DIM)[:, None] + tl.arange(0, 4)[None, :]
    # Compared after it is spread: the interpreter spreads no truth values.
    return tl.load(source, mask=tl.broadcast_to(num_tokens, source.shape) > 0).to(tl.uint32, bitcast=True)


@triton.jit
def load_scales(panel, num_tokens, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """int8, fp8_e4m3: a float32 of each token. Else bytes of exponents, 0 in place of tokens that are not there."""
    t = tl.arange(0, WORD_BLOCK_TOKENS)
    if FORMAT == MXFP8:
        NUMBER: tl.constexpr = tl.int32 if HEAD_DIM == 128 else tl.uint16  # exponents of all groups of 32 dims
        numbers = (panel + 8 * HEAD_DIM).to(tl.pointer_type(NUMBER)) + t
        return tl.load(numbers, mask=t < num_tokens, other=0).to(tl.int32)
    elif FORMAT == BFP8:
        n = tl.arange(0, 16 * HEAD_DIM // 32)
        token = n % 16 // 8 * 16 + n % 4 * 4
        words = tl.load(panel + n // 16 * (TILE_BYTES // 4) + n % 16, mask=token < num_tokens, other=0)
        return words & ((1 << (tl.minimum(num_tokens - token, 4) * 8 - 1)) * 2 - 1)
    else:
        return tl.load((panel + 8 * HEAD_DIM + t).to(tl.pointer_type(tl.float32)), mask=t < num_tokens, other=0.0)


@triton.jit
def unit_of(exponents, FORMAT: tl.constexpr):
    """The bits of the power of two that the operands of a block are relative to; not subnormal."""
    DEPTH: tl.constexpr = MXFP8_DEPTH if FORMAT == MXFP8 else BFP8_DEPTH
    low = tl.maximum(exponents & 0xFF, (exponents >> 8) & 0xFF)
    high = tl.maximum((exponents >> 16) & 0xFF, (exponents >> 24) & 0xFF)
    largest = tl.max(tl.maximum(low, high), axis=0)
    return (tl.maximum(largest, DEPTH + 1) - DEPTH) << 23


@triton.jit
def _word_place(t, j, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where in a panel word j of token t is."""
    if FORMAT == BFP8:
        return 16 + t // 16 * 128 + t % 16 * 4 + j // 8 * (TILE_BYTES // 4) + j // 4 % 2 * 64 + j % 4
    else:
        return t * (HEAD_DIM // 4) + j


@triton.jit
def _exponent_place(t, first, FORMAT: tl.constexpr):
    """In which word of load_scales, and how many bits up, the exponent of the 16 dims is that word ``first`` begins."""
    if FORMAT == MXFP8:
        return t, first // 8 * 8
    else:
        return first // 8 * 16 + t // 16 * 8 + first // 4 % 2 * 4 + t % 16 // 4, t % 4 * 8


@triton.jit
def _exponent_bits(words, shift, unit, FORMAT: tl.constexpr):
    """The bytes ``shift`` bits up in words of exponents, relative to ``unit``, in the exponent field of a float16."""
    DEPTH: tl.constexpr = MXFP8_DEPTH if FORMAT == MXFP8 else BFP8_DEPTH
    TOP: tl.constexpr = MXFP8_TOP if FORMAT == MXFP8 else BFP8_TOP
    exponents = ((words >> shift) & 0xFF) + (TOP - DEPTH - (unit >> 23))
    return (tl.minimum(tl.maximum(exponents, 0), TOP) << 10).to(tl.uint32)  # in place of no token it may be any


@triton.jit
def k_operand(
    words, exponents, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, K_WIDTH: tl.constexpr, CAPABILITY: tl.constexpr
):
    """[32, HEAD_DIM]: column (h, w, c, e, p) is dim 64 h + 16 c + 4 w + 2 p + e."""
    H: tl.constexpr = HEAD_DIM // 64
    if FORMAT == INT8 and CAPABILITY:
        words ^= 0x80808080
        evens, odds = _permuted(words, 0, 0x4240), _permuted(words, 0, 0x4341)
    elif FORMAT == BFP8 and CAPABILITY:
        evens, odds = _signed(words, words, 0xA280), _signed(words, words, 0xB391)
    elif FORMAT >= FP8_E4M3 and CAPABILITY >= E4M3_CAPABILITY:
        words = _permuted(words, words, 0x3120)
        evens, odds = _converted(words, False), _converted(words, True)
    else:
        evens, odds = _placed(words, False, FORMAT), _placed(words, True, FORMAT)
    p0, p2 = _halves(evens, exponents, FORMAT, CAPABILITY)
    p1, p3 = _halves(odds, exponents, FORMAT, CAPABILITY)
    both = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # h t c w p e
    both = tl.reshape(both, [H, 32, 4, 4, 2, 2])
    both = tl.permute(both, (1, 0, 3, 2, 5, 4) if K_WIDTH == 4 else (1, 0, 3, 5, 2, 4))
    return tl.reshape(both, [32, HEAD_DIM])


@triton.jit
def v_operand(
    evens, odds, exponents, PLANE: tl.constexpr,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, K_WIDTH: tl.constexpr, CAPABILITY: tl.constexpr,
):  # fmt: skip
    """One plane of V^T [HEAD_DIM / 4, 32], 0 to 3: row (w, g) is dim HEAD_DIM / 8 g + 4 w + PLANE.

    ``evens`` and ``odds`` are the same words of an even token and of the odd one next to it.
    """
    HIGH: tl.constexpr = PLANE % 2 == 1
    if FORMAT == INT8 and CAPABILITY:
        words = _permuted(evens, odds, 0x5140 if PLANE < 2 else 0x7362) ^ 0x80808080
        pairs = _permuted(words, 0, 0x4342 if HIGH else 0x4140)
    elif FORMAT == BFP8 and CAPABILITY:
        pairs = _signed(evens, odds, 0xC480 + 0x1111 * PLANE)
    elif FORMAT >= FP8_E4M3 and CAPABILITY >= E4M3_CAPABILITY:
        pairs = _converted(_permuted(evens, odds, 0x5140 if PLANE < 2 else 0x7362), HIGH)
    elif PLANE < 2:
        pairs = _placed((evens & 0xFFFF) | (odds << 16), HIGH, FORMAT)
    else:
        pairs = _placed((evens >> 16) | (odds & 0xFFFF0000), HIGH, FORMAT)
    even, odd = _halves(pairs, exponents, FORMAT, CAPABILITY)
    both = tl.reshape(tl.join(even, odd), [2, 2, 8, 4, HEAD_DIM // 32, 2])  # half s g c w p
    return tl.reshape(tl.permute(both, (4, 2, 0, 3, 1, 5) if K_WIDTH == 4 else (4, 2, 0, 1, 3, 5)), [HEAD_DIM // 4, 32])


@triton.jit
def _placed(words, HIGH: tl.constexpr, FORMAT: tl.constexpr):
    """Bytes 0 and 2 (HIGH: 1 and 3) of words as the bits of two float16, by shifts and masks.

    int8: 2^-24 of 128 more than the value, a subnormal number. bfp8: 2^-24 of the magnitude, too. E4M3: 2^-8 of it.
    """
    low = words >> 8 if HIGH else words
    if FORMAT == INT8:
        return low & 0x00FF00FF ^ 0x00800080
    signs = (words if HIGH else words << 8) & 0x80008000
    if FORMAT == BFP8:
        return low & 0x007F007F | signs
    else:
        return (words >> 1 if HIGH else words << 7) & 0x3F803F80 | signs


@triton.jit
def _signed(x, y, SELECTOR: tl.constexpr):
    """bfp8: two bytes of x and y as ``_placed`` has them: above each stands its sign bit, eight times."""
    return _permuted(x, y, SELECTOR) & 0x807F807F


@triton.jit
def _permuted(x, y, SELECTOR: tl.constexpr):
    """Four of the bytes 0 to 7 that x and y are, a nibble for each, lowest first; 8 more: its sign bit, eight times."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [x, y, SELECTOR], tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _converted(words, HIGH: tl.constexpr):
    """Bytes 0 and 1 (HIGH: 2 and 3) of words, E4M3, as the bits of two float16."""
    if HIGH:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 $0, high; }",
            "=r,r", [words], tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.rn.f16x2.e4m3x2 $0, low; }",
            "=r,r", [words], tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _halves(pairs, exponents, FORMAT: tl.constexpr, CAPABILITY: tl.constexpr):
    """The two float16 that words are the bits of, freed of int8's offset or scaled by their blocks' exponents."""
    if FORMAT == INT8:
        return _as_half(pairs) - 128.0 / INT8_SCALE, _as_half(pairs >> 16) - 128.0 / INT8_SCALE
    elif FORMAT == FP8_E4M3:
        return _as_half(pairs), _as_half(pairs >> 16)
    elif CAPABILITY:  # as one word: of halves, the compiler would make pairs again
        scaled = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [pairs, exponents], tl.uint32, is_pure=True, pack=1
        )
        return _as_half(scaled), _as_half(scaled >> 16)
    else:
        return _as_half(pairs) * _as_half(exponents), _as_half(pairs >> 16) * _as_half(exponents >> 16)


@triton.jit
def _as_half(bits):
    """The float16 that the low 16 bits are."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
