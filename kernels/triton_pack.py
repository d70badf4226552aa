"""Pack K and V into blocks of a KV format, on the GPU: one launch for both, any number of sequences.

A program encodes the K and V panels of one head, 32 tokens at a time. Division is correctly rounded (a plain ``/`` is
not), so that the bytes equal those of the reference twin ``hmad.compute.codecs.encode``, which kernels must not
import: the tests compare the two. Limit: bytes read and written over memory bandwidth.
"""

import torch
import triton
import triton.language as tl

from hmad_kernels.triton_common import (
    ALIGN_BYTES,
    BF16,
    BF16_OVERFLOW_BITS,
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
    check_head_dim,
    check_metadata,
    check_place,
    check_tensor,
    divide,
    float_of,
    format_code,
    has_e4m3,
    panel_bytes,
    store_rounded,
    to_e4m3,
    to_f32,
)

ROWS = 32  # tokens of a program: one block of the 8-bit formats, several of the others
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


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
    row (NaN, infinity, or rounding to one) and is left alone elsewhere, so one fill serves all layers. Raises
    ValueError on shapes, dtypes and memory that do not fit.
    """
    code = _check(format_name, k, v, blocks, out, bad_rows)
    num_heads, head_dim = k.shape[1:]
    blocks_per_program = ROWS // TOKENS_PER_BLOCK[code]
    grid = (num_heads * triton.cdiv(len(blocks), blocks_per_program),)
    if not grid[0]:
        return
    _pack_kernel[grid](
        k, v, blocks, out, bad_rows,
        len(blocks), num_heads,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0),
        **pack_constants(code, head_dim, hardware_e4m3=has_e4m3(k.device)),
        **pack_options(code),
    )  # fmt: skip


def pack_options(code: int) -> dict[str, int | bool]:
    """What Triton compiles with: enough warps that no thread spills, and no contraction that would change a byte."""
    return {"num_warps": 8 if code == FP32.value else 4, "enable_fp_fusion": False}


def pack_constants(code: int, head_dim: int, *, hardware_e4m3: bool) -> dict[str, int | bool]:
    """The compile-time constants of the kernel."""
    return {
        "FORMAT": code,
        "HEAD_DIM": head_dim,
        "BLOCK_TOKENS": TOKENS_PER_BLOCK[code],
        "PANEL_BYTES": panel_bytes(code, head_dim),
        "NUM_ROWS": ROWS,
        "HARDWARE_E4M3": hardware_e4m3,
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
    check_place({"k": k, "v": v, "blocks": blocks, "out": out, "bad_rows": bad_rows})
    return code


def _check_rows(k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError unless K and V are what the kernel reads."""
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.shape != k.shape or x.dtype != k.dtype or x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float32 or bfloat16 [num_tokens, num_kv_heads, head_dim], as k is, "
                f"not {x.dtype} {list(x.shape)}"
            )
        if x.stride(2) != 1 or any(stride * x.element_size() % ALIGN_BYTES for stride in x.stride()[:2]):
            raise ValueError(
                f"{name} {list(x.shape)} must be contiguous in its last dimension and its rows aligned to "
                f"{ALIGN_BYTES} bytes, not of strides {x.stride()}"
            )


@triton.jit
def _pack_kernel(
    k, v, blocks, out, bad_rows,
    num_blocks, num_heads,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride, out_stride,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PANEL_BYTES: tl.constexpr,
    NUM_ROWS: tl.constexpr, HARDWARE_E4M3: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program % num_heads  # neighbours read neighbouring memory
    rows = tl.arange(0, NUM_ROWS)
    block = program // num_heads * (NUM_ROWS // BLOCK_TOKENS) + rows // BLOCK_TOKENS
    exists = block < num_blocks
    first = tl.load(blocks + 2 * block, mask=exists, other=0)
    count = tl.load(blocks + 2 * block + 1, mask=exists, other=0)
    t = rows % BLOCK_TOKENS
    live = t < count
    token = (first + t).to(tl.int64)
    columns = tl.arange(0, HEAD_DIM)
    source = k + head * k_head_stride + token * k_token_stride
    k_rows = tl.load(source[:, None] + columns[None, :], mask=live[:, None], other=0.0)
    source = v + head * v_head_stride + token * v_token_stride
    v_rows = tl.load(source[:, None] + columns[None, :], mask=live[:, None], other=0.0)
    panel = out + block.to(tl.int64) * out_stride + head * (2 * PANEL_BYTES)
    _encode(k_rows, panel, t, exists, bad_rows + token, FORMAT, HEAD_DIM, HARDWARE_E4M3)
    _encode(v_rows, panel + PANEL_BYTES, t, exists, bad_rows + token, FORMAT, HEAD_DIM, HARDWARE_E4M3)


@triton.jit
def _encode(
    values, panel, t, exists, bad_row,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, HARDWARE_E4M3: tl.constexpr,
):  # fmt: skip
    """Encode rows [rows, HEAD_DIM]: row r is token t[r] of the panel that begins at panel[r]."""
    x = to_f32(values)
    magnitude = bits_of(x) & 0x7FFFFFFF
    peak = tl.max(magnitude.to(tl.int32), axis=1)  # bits order as values do, and every NaN is above infinity
    LIMIT: tl.constexpr = BF16_OVERFLOW_BITS if FORMAT == BF16 else INFINITY_BITS
    tl.store(bad_row, tl.full(t.shape, 1, tl.uint8), mask=peak >= LIMIT)
    columns = tl.arange(0, HEAD_DIM)
    place = t[:, None] * HEAD_DIM + columns[None, :]
    stored = exists[:, None]
    if FORMAT == FP32:
        tl.store(panel.to(tl.pointer_type(tl.float32))[:, None] + place, x, mask=stored)
    elif FORMAT == BF16:
        target = panel.to(tl.pointer_type(tl.bfloat16))[:, None] + place
        if values.dtype == tl.bfloat16:
            tl.store(target, values, mask=stored)
        else:
            store_rounded(target, x, stored)
    elif FORMAT == INT8 or FORMAT == FP8_E4M3:  # noqa: SIM109 (compiled code knows no tuples of constants)
        LARGEST: tl.constexpr = 127.0 if FORMAT == INT8 else 448.0
        scale = tl.div_rn(float_of(peak), tl.full(t.shape, LARGEST, tl.float32))
        tiny = scale < SMALLEST_NORMAL
        scale = tl.where(tiny, 1.0, scale)
        scaled = divide(x, scale[:, None])
        if FORMAT == INT8:  # of a tiny row, everything rounds to zero
            encoded = (bits_of(scaled + ROUND_TO_INTEGER) & 0xFF).to(tl.uint8)
        else:
            signed = float_of((bits_of(scaled) & 0x7FFFFFFF) | (bits_of(x) & 0x80000000))  # -0 lost its sign
            encoded = to_e4m3(tl.where(tiny[:, None], 0.0, signed), HARDWARE_E4M3)
        tl.store(panel[:, None] + place, encoded, mask=stored)
        tl.store((panel + 32 * HEAD_DIM).to(tl.pointer_type(tl.float32)) + t, scale, mask=exists)
    elif FORMAT == MXFP8:
        grouped = tl.reshape(magnitude.to(tl.int32), [t.shape[0], HEAD_DIM // 32, 32])
        exponent = tl.max(grouped, axis=2) >> 23
        field = tl.maximum(exponent - 8, 0)  # 448 = 1.75 * 2^8; subnormals have field 0
        inverse = tl.broadcast_to(float_of((254 - field) << 23)[:, :, None], grouped.shape)
        encoded = to_e4m3(x * tl.reshape(inverse, x.shape), HARDWARE_E4M3)
        tl.store(panel[:, None] + place, encoded, mask=stored)
        groups = tl.arange(0, HEAD_DIM // 32)
        scales = panel[:, None] + 32 * HEAD_DIM + t[:, None] * (HEAD_DIM // 32) + groups[None, :]
        tl.store(scales, field.to(tl.uint8), mask=stored)
    else:
        face_rows = tl.reshape((magnitude >> 23).to(tl.int32), [t.shape[0], HEAD_DIM // 16, 16])
        shared = tl.max(face_rows, axis=2)
        spread = tl.reshape(tl.broadcast_to(shared[:, :, None], face_rows.shape), x.shape)
        if values.dtype == tl.bfloat16:
            encoded = _bf16_to_bfp8(bits_of(x), spread)
        else:
            encoded = _to_bfp8(bits_of(x), spread.to(tl.uint32))
        face = columns // 32 * TILE_BYTES + columns // 16 % 2 * 256 + columns % 16
        inside = t // 16 * 512 + t % 16 * 16
        tl.store(panel[:, None] + 64 + inside[:, None] + face[None, :], encoded, mask=stored)
        halves = tl.arange(0, HEAD_DIM // 16)
        exponents = halves // 2 * TILE_BYTES + halves % 2 * 16
        inside = t // 16 * 32 + t % 16
        tl.store(panel[:, None] + inside[:, None] + exponents[None, :], shared.to(tl.uint8), mask=stored)


@triton.jit
def _to_bfp8(bits, shared):
    """Sign and 7-bit magnitude of float32 bits relative to an exponent: cut to 24 bits, then rounded to even."""
    shift = tl.minimum(shared - ((bits >> 23) & 0xFF), 31)
    significand = ((bits & 0x7FFFFF) | 0x800000) >> shift
    rounded = (significand + 0xFFFF + ((significand >> 17) & 1)) >> 17
    magnitude = tl.where((bits & 0x7FFFFFFF) == 0, 0, tl.minimum(rounded, 127))
    return (magnitude | tl.where(magnitude == 0, 0, (bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _bf16_to_bfp8(bits, shared):
    """The same of bfloat16 values, in fewer steps: they have so few bits that what is cut can never break a tie.

    The magnitude is the value times 2^(133 - shared). That is added to the exponent field, which gives subnormal
    numbers the hidden one that the format's encoder reads into them.
    """
    magnitude = (bits & 0x7FFFFFFF).to(tl.int32)
    size = float_of(tl.maximum(magnitude + ((133 - shared) << 23), 0))
    size = tl.where(magnitude == 0, 0.0, tl.minimum(size, 127.0))
    rounded = (bits_of(size + ROUND_TO_INTEGER) & 0xFF).to(tl.int32)
    sign = (bits >> 24).to(tl.int32) & -rounded & 0x80  # none where the magnitude is zero
    return (rounded | sign).to(tl.uint8)
