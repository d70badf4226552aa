"""Pack K and V into blocks of a KV format, on the GPU: one launch for both, any number of sequences.

A program encodes K and V of one head and of a few tokens: so few that many programs are resident and hide each other's
latency, so many that each thread has 16 values of a row and stores their bytes at once. Quotients are correctly rounded
(a plain ``/`` is not), so that the bytes equal those of the reference twin ``hmad.compute.codecs.encode``, which
kernels must not import: the tests compare the two. Limit: bytes read and written over memory bandwidth.
"""

import torch
import triton
import triton.language as tl

from hmad_kernels.triton_common import (
    ALIGN_BYTES,
    BF16,
    BF16_OVERFLOW_BITS,
    BFP8,
    DTYPES,
    FP8_E4M3,
    FP32,
    INFINITY_BITS,
    INT8,
    MXFP8,
    ROUND_TO_INTEGER,
    TILE_BYTES,
    TOKENS_PER_BLOCK,
    bits_of,
    capability_of,
    check_aligned,
    check_head_dim,
    check_metadata,
    check_pinned,
    check_place,
    check_tensor,
    described,
    divide,
    float_of,
    format_code,
    has_e4m3,
    panel_bytes,
    store_rounded,
    to_e4m3,
    to_f32,
)

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
LEAST_PEAK = tl.constexpr(8 << 23)  # bfp8: bits of the least maximum beside which subnormal numbers do not count
# 1 / 127 and 1 / 448 as float32, and what they lack.
INVERSE_127, REST_127 = tl.constexpr(float.fromhex("0x1.020408p-7")), tl.constexpr(float.fromhex("0x1.020408p-35"))
INVERSE_448, REST_448 = tl.constexpr(float.fromhex("0x1.24924ap-9")), tl.constexpr(float.fromhex("-0x1.b6db6ep-34"))


def pack_blocks(
    format_name: str,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    bad_rows: torch.Tensor,
) -> None:
    """Encode K and V into out, uint8 [num_blocks, block_bytes], as ``blocks`` int32 [num_blocks, 2] says.

    k and v are both bfloat16 or both float32 [num_tokens, num_kv_heads, head_dim]; the last dimension is contiguous,
    every row begins at a multiple of 16 bytes. ``blocks`` holds each block's first row of k and v and its number of
    tokens, 1 to the format's tokens per block (0 makes a block of zeros); positions past them are encoded as zeros. It
    is on the device, and not checked here. ``bad_rows`` uint8 [num_tokens] becomes 1 where the format cannot hold a
    row (NaN, infinity, or rounding to one) and is left alone elsewhere; it is on the device or in pinned memory of the
    host, to which nothing goes but what is bad. Raises ValueError on shapes, dtypes and memory that do not fit.
    """
    code = _check(format_name, k, v, blocks, out, bad_rows)
    num_heads, head_dim = k.shape[1:]
    constants = pack_constants(code, head_dim, capability_of(k.device))
    grid = (num_heads * triton.cdiv(len(blocks) * TOKENS_PER_BLOCK[code], constants["NUM_ROWS"]),)
    if not grid[0]:
        return
    _pack_kernel[grid](
        k, v, blocks, out, bad_rows,
        len(blocks), num_heads,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0),
        **constants,
        **pack_options(code),
    )  # fmt: skip


def pack_options(code: int) -> dict[str, int | bool]:
    """What Triton compiles with: no contraction that changes a byte."""
    return {"num_warps": 4 if code == FP32.value else 2, "enable_fp_fusion": False}


def pack_constants(code: int, head_dim: int, capability: tuple[int, int] | None) -> dict[str, int | bool]:
    """The compile-time constants of the kernel for a CUDA compute capability; None stands for AMD."""
    return {
        "FORMAT": code,
        "HEAD_DIM": head_dim,
        "BLOCK_TOKENS": TOKENS_PER_BLOCK[code],
        "PANEL_BYTES": panel_bytes(code, head_dim),
        "NUM_ROWS": (2048 if code == BFP8.value else 1024) // head_dim,
        "HARDWARE_E4M3": has_e4m3(capability),
        "BF16_PAIRS": capability is not None and capability >= (8, 0),
    }


def _check(
    format_name: str,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    bad_rows: torch.Tensor,
) -> int:
    code = format_code(format_name)
    _check_rows(k, v)
    check_head_dim(k.shape[2])
    check_metadata("blocks", blocks, (-1, 2))
    check_tensor("out", out, torch.uint8, (len(blocks), 2 * k.shape[1] * panel_bytes(code, k.shape[2])))
    check_tensor("bad_rows", bad_rows, torch.uint8, (len(k),))
    check_place({"k": k, "v": v, "blocks": blocks, "out": out})
    if bad_rows.device != k.device:
        check_pinned({"bad_rows": bad_rows})
    check_aligned({"bad_rows": bad_rows})
    return code


def _check_rows(k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError unless K and V are what the kernel reads."""
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.shape != k.shape or x.dtype != k.dtype or x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float32 or bfloat16 [num_tokens, num_kv_heads, head_dim], as k is, not {described(x)}"
            )
        if x.stride(2) != 1 or any(stride * x.element_size() % ALIGN_BYTES for stride in x.stride()[:2]):
            raise ValueError(
                f"{name} must be contiguous in its last dimension and its rows aligned to {ALIGN_BYTES} bytes, "
                f"not {described(x)}"
            )


@triton.jit(do_not_specialize=["num_blocks"])  # or a request with another number would wait for the compiler
def _pack_kernel(
    k, v, blocks, out, bad_rows,
    num_blocks, num_heads,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride, out_stride,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PANEL_BYTES: tl.constexpr,
    NUM_ROWS: tl.constexpr, HARDWARE_E4M3: tl.constexpr, BF16_PAIRS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program % num_heads  # neighbours read neighbouring memory
    position = program // num_heads * NUM_ROWS + tl.arange(0, NUM_ROWS)
    block = position // BLOCK_TOKENS
    exists = block < num_blocks
    first = tl.load(blocks + 2 * block, mask=exists, other=0)
    count = tl.load(blocks + 2 * block + 1, mask=exists, other=0)
    t = position % BLOCK_TOKENS
    live = t < count
    token = (first + t).to(tl.int64)
    columns = tl.arange(0, HEAD_DIM)
    k_source = (k + head * k_head_stride + token * k_token_stride)[:, None] + columns[None, :]
    v_source = (v + head * v_head_stride + token * v_token_stride)[:, None] + columns[None, :]
    panel = out + block.to(tl.int64) * out_stride + head * (2 * PANEL_BYTES)
    least = _encode_both(
        k_source, v_source, live, panel, t, exists, bad_rows + token,
        FORMAT, HEAD_DIM, PANEL_BYTES, HARDWARE_E4M3, BF16_PAIRS, False,
    )  # fmt: skip
    if FORMAT == BFP8 and k.dtype.element_ty == tl.bfloat16:  # noqa: SIM102 (one condition is compiled)
        if least < LEAST_PEAK:
            # Rare, so read and written again: kept until here, the values would take registers from every program.
            tl.debug_barrier()  # the bytes of before are written first
            _encode_both(
                k_source, v_source, live, panel, t, exists, bad_rows + token,
                FORMAT, HEAD_DIM, PANEL_BYTES, HARDWARE_E4M3, BF16_PAIRS, True,
            )  # fmt: skip


@triton.jit
def _encode_both(
    k_source, v_source, live, panel, t, exists, bad_row,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, PANEL_BYTES: tl.constexpr, HARDWARE_E4M3: tl.constexpr,
    BF16_PAIRS: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """Read rows of K and V and encode them. Returns the least of the bits of all pieces' maxima that are not zero;
    0xFFFFFFFF if all are.
    """
    k_rows = tl.load(k_source, mask=live[:, None], other=0.0)
    v_rows = tl.load(v_source, mask=live[:, None], other=0.0)
    k_peak = _encode(k_rows, panel, t, exists, bad_row, FORMAT, HEAD_DIM, HARDWARE_E4M3, BF16_PAIRS, TINY)
    panel += PANEL_BYTES
    v_peak = _encode(v_rows, panel, t, exists, bad_row, FORMAT, HEAD_DIM, HARDWARE_E4M3, BF16_PAIRS, TINY)
    peaks = tl.minimum((k_peak - 1).to(tl.uint32, bitcast=True), (v_peak - 1).to(tl.uint32, bitcast=True))
    return tl.min(tl.min(peaks, axis=1), axis=0)


@triton.jit
def _encode(
    rows, panel, t, exists, bad_row,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, HARDWARE_E4M3: tl.constexpr, BF16_PAIRS: tl.constexpr,
    TINY: tl.constexpr,
):  # fmt: skip
    """Encode rows [rows, HEAD_DIM]: row r is token t[r] of the panel that begins at panel[r]. Returns the bits of the
    maximum of each piece; bfp8 of bfloat16 is right where they are LEAST_PEAK or more, or else with ``TINY``.

    Arithmetic is over [rows, pieces, PIECE], where a piece is what a thread loads and stores at once: then the maximum
    of a piece, all that bfp8 needs, stays in its thread.
    """
    PIECE: tl.constexpr = 16 if FORMAT >= INT8 else 8
    values = tl.reshape(rows, [t.shape[0], HEAD_DIM // PIECE, PIECE])
    x = to_f32(values)
    magnitude = bits_of(x) & 0x7FFFFFFF
    peak = tl.max(magnitude.to(tl.int32), axis=2)  # bits order as values do, and every NaN is above infinity
    pieces = tl.arange(0, HEAD_DIM // PIECE)
    LIMIT: tl.constexpr = BF16_OVERFLOW_BITS if FORMAT == BF16 else INFINITY_BITS
    tl.store(bad_row[:, None] + 0 * pieces[None, :], tl.full(peak.shape, 1, tl.uint8), mask=peak >= LIMIT)
    columns = tl.arange(0, HEAD_DIM)
    place = t[:, None] * HEAD_DIM + columns[None, :]
    stored = exists[:, None]
    if FORMAT == FP32:
        target = panel.to(tl.pointer_type(tl.float32))[:, None] + place
        tl.store(target, tl.reshape(x, place.shape), mask=stored)
    elif FORMAT == BF16:
        target = panel.to(tl.pointer_type(tl.bfloat16))[:, None] + place
        if values.dtype == tl.bfloat16:
            tl.store(target, rows, mask=stored)
        else:
            store_rounded(target, tl.reshape(x, place.shape), stored)
    elif FORMAT == INT8 or FORMAT == FP8_E4M3:  # noqa: SIM109 (compiled code knows no tuples of constants)
        scale = _over(tl.max(peak, axis=1)[:, None], 127 if FORMAT == INT8 else 448)
        tiny = scale < SMALLEST_NORMAL
        scale = tl.where(tiny, 1.0, scale)
        if values.dtype == tl.bfloat16:
            scaled = _divide_bf16(x, scale, tiny)
        else:
            scaled = divide(x, scale[:, :, None])
            scaled = float_of((bits_of(scaled) & 0x7FFFFFFF) | (bits_of(x) & 0x80000000))  # -0 lost its sign
            scaled = tl.where(tiny[:, :, None], 0.0, scaled)
        if FORMAT == INT8:
            encoded = (bits_of(scaled + ROUND_TO_INTEGER) & 0xFF).to(tl.uint8)
        else:
            encoded = to_e4m3(scaled, HARDWARE_E4M3)
        tl.store(panel[:, None] + place, tl.reshape(encoded, place.shape), mask=stored)
        scales = (panel + 32 * HEAD_DIM).to(tl.pointer_type(tl.float32)) + t
        tl.store(scales[:, None], scale, mask=stored)
    elif FORMAT == MXFP8:
        pairs = tl.reshape(peak, [t.shape[0], HEAD_DIM // 32, 2])
        field = tl.maximum((tl.max(pairs, axis=2) >> 23) - 8, 0)  # 448 = 1.75 * 2^8; subnormals have field 0
        inverse = tl.reshape(tl.broadcast_to(((254 - field) << 23)[:, :, None], pairs.shape), peak.shape)
        encoded = to_e4m3(x * float_of(inverse)[:, :, None], HARDWARE_E4M3)
        tl.store(panel[:, None] + place, tl.reshape(encoded, place.shape), mask=stored)
        groups = tl.arange(0, HEAD_DIM // 32)
        scales = panel[:, None] + 32 * HEAD_DIM + t[:, None] * (HEAD_DIM // 32) + groups[None, :]
        tl.store(scales, field.to(tl.uint8), mask=stored)
    else:
        shared = peak >> 23
        if values.dtype == tl.float32 or TINY:
            encoded = _to_bfp8(bits_of(x), shared.to(tl.uint32)[:, :, None])
        elif BF16_PAIRS:
            encoded = _bf16_pairs_to_bfp8(values, shared)
        else:
            encoded = _bf16_to_bfp8(x, shared)
        face = columns // 32 * TILE_BYTES + columns // 16 % 2 * 256 + columns % 16
        inside = t // 16 * 512 + t % 16 * 16
        place = 64 + inside[:, None] + face[None, :]
        tl.store(panel[:, None] + place, tl.reshape(encoded, place.shape), mask=stored)
        exponents = pieces // 2 * TILE_BYTES + pieces % 2 * 16
        inside = t // 16 * 32 + t % 16
        tl.store(panel[:, None] + inside[:, None] + exponents[None, :], shared.to(tl.uint8), mask=stored)
    return peak


@triton.jit
def _over(bits, LARGEST: tl.constexpr):
    """The number that has these bits over 127 or 448, correctly rounded where that is a normal number, else 0.

    A product with a reciprocal of 48 bits, rounded once: right for every significand, as trying all of them showed.
    """
    INVERSE: tl.constexpr = INVERSE_127 if LARGEST == 127 else INVERSE_448
    REST: tl.constexpr = REST_127 if LARGEST == 127 else REST_448
    significand = float_of((bits & 0x7FFFFF) | 0x3F800000)
    quotient = tl.fma(significand, tl.full(bits.shape, INVERSE, tl.float32), significand * REST)
    quotient_bits = bits_of(quotient).to(tl.int32) + (bits & 0x7F800000) - 0x3F800000
    return float_of(tl.where(quotient_bits < 0x00800000, 0, quotient_bits))


@triton.jit
def _divide_bf16(x, divisors, tiny):
    """bfloat16 values [rows, pieces, PIECE] over divisors [rows, 1], correctly rounded; 0 in rows that are tiny.

    x has 8 bits, so its product with the first 16 of a reciprocal is exact, and the fused product with the rest rounds
    once. The 16 bits are rounded down: the rest is positive, and -0 stays -0.
    """
    inverse = 1.0 / divisors  # a few units in the last place do not matter
    high = float_of((bits_of(inverse) - 0x80) & 0xFFFFFF00)
    error = tl.fma(-divisors, high, tl.full(divisors.shape, 1.0, tl.float32))
    rest = tl.fma(error, error, error)  # 1 / divisors = high * (1 + rest), but for the cube of the error
    high = tl.where(tiny, 0.0, high)
    zero = float_of(tl.where(tiny, 0, 0x80000000))  # what is added to zero: -0 leaves its sign alone
    first = tl.fma(x, tl.broadcast_to(high[:, :, None], x.shape), tl.broadcast_to(zero[:, :, None], x.shape))
    return tl.fma(first, tl.broadcast_to(rest[:, :, None], x.shape), first)


@triton.jit
def _to_bfp8(bits, shared):
    """Sign and 7-bit magnitude of float32 bits relative to an exponent: cut to 24 bits, then rounded to even."""
    shift = tl.minimum(shared - ((bits >> 23) & 0xFF), 31)
    significand = ((bits & 0x7FFFFF) | 0x800000) >> shift
    rounded = (significand + 0xFFFF + ((significand >> 17) & 1)) >> 17
    magnitude = tl.where((bits & 0x7FFFFFFF) == 0, 0, tl.minimum(rounded, 127))
    return (magnitude | tl.where(magnitude == 0, 0, (bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _bf16_to_bfp8(x, shared):
    """The same of bfloat16 values, in fewer steps: they have so few bits that what is cut can never break a tie.

    The magnitude is the value times 2^(133 - shared), rounded. Into subnormal numbers the format's encoder reads a
    hidden one, which this does not: they must be too small to count, as they are from LEAST_PEAK on.
    """
    size = x * float_of((260 - shared) << 23)[:, :, None]
    whole = (size + ROUND_TO_INTEGER) - ROUND_TO_INTEGER  # has no sign where it is zero
    magnitude = bits_of(tl.minimum(tl.abs(whole), 127.0) + ROUND_TO_INTEGER)
    return (magnitude | ((bits_of(whole) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _bf16_pairs_to_bfp8(values, shared):
    """The same, two values an instruction: 128 more than a magnitude, in bfloat16, has it in its low seven bits. A sign
    is kept where the magnitude plus 127 reaches 128.
    """
    scales = tl.broadcast_to(((260 - shared) << 7).to(tl.uint16)[:, :, None], values.shape)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, low_carry, high_carry, low_sign, high_sign, offset, most;
        mov.b32 offset, 0x43004300;
        mov.b32 most, 0x437F437F;
        and.b32 low, $1, 0x7FFF7FFF;
        and.b32 high, $2, 0x7FFF7FFF;
        fma.rn.bf16x2 low, low, $3, offset;
        fma.rn.bf16x2 high, high, $4, offset;
        min.bf16x2 low, low, most;
        min.bf16x2 high, high, most;
        and.b32 low, low, 0x007F007F;
        and.b32 high, high, 0x007F007F;
        add.u32 low_carry, low, 0x007F007F;
        add.u32 high_carry, high, 0x007F007F;
        shr.b32 low_sign, $1, 8;
        shr.b32 high_sign, $2, 8;
        and.b32 low_carry, low_carry, 0x00800080;
        and.b32 high_carry, high_carry, 0x00800080;
        and.b32 low_sign, low_sign, low_carry;
        and.b32 high_sign, high_sign, high_carry;
        or.b32 low, low, low_sign;
        or.b32 high, high, high_sign;
        prmt.b32 $0, low, high, 0x6420;
        }""",
        "=r,r,r,r,r", [values.to(tl.uint16, bitcast=True), scales], tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip
