"""Row kernels of the transformer on the GPU: everything between two matrix products but rotary embedding.

Rows are bfloat16 or float32. Arithmetic is float32, rounded to the rows' type exactly where the CPU's row kernels
round. A row that feeds quantized linears leaves its kernel quantized, so that it is read once. The reference twins are
the launchers of the same names in ``cpu_rows``, and ``round_e4m3`` and ``round_bfp8`` of ``hmad.compute.linears``,
which kernels must not import: the tests compare them. Results are theirs bit for bit, except that a norm's sum of
squares has another order and silu another exponential, of 2 units in the last place: each may move what is rounded
next by one place. Quantizing, bfp8 and scaling are exact. Limit: bytes read and written over memory bandwidth.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hmad_kernels.cpu_rows import Int8Rows
from hmad_kernels.cpu_turn import turn_block
from hmad_kernels.triton_common import (
    DTYPES,
    ROUND_TO_INTEGER,
    bits_of,
    butterflies,
    capability_of,
    chains,
    check_place,
    check_tensor,
    described,
    divide,
    float_of,
    has_e4m3,
    launch_options,
    narrowed,
    rounded,
    to_e4m3,
    to_f32,
)

# How a finished row goes out: in its own type, or quantized with one scale.
PLAIN, INT8, E4M3, E4M3_FNUZ = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
E4M3_KINDS = {torch.float8_e4m3fn: E4M3.value, torch.float8_e4m3fnuz: E4M3_FNUZ.value}
MAX_WIDTH = 32768
WIDTH_STEP = 16  # widths are multiples of it: every row begins at a 128-bit boundary, every bfp8 group is whole
TINY_ROW = tl.constexpr(2.0**-100)  # rows below it quantize to zeros: 127 / max|x| must stay finite
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
GROUP = tl.constexpr(16)  # values of bfp8 that share an exponent
EAGER_BLOCK = tl.constexpr(16384)  # of a norm: with wider rows, weights loaded early would not fit into registers
PIECE = 1024  # columns of a program where values do not depend on the rest of their row
PIECE_WARPS = 4


class E4M3Rows(NamedTuple):
    """Rows quantized one by one: row t stands for values[t] * scales[t]."""

    values: torch.Tensor  # [T, K] float8_e4m3fn, or float8_e4m3fnuz
    scales: torch.Tensor  # [T, 1] float32


def e4m3_dtype(device: torch.device) -> torch.dtype:
    """The E4M3 that a device multiplies: AMD's own on MI300, the OCP one elsewhere."""
    is_mi300 = torch.version.hip is not None and "gfx94" in torch.cuda.get_device_properties(device).gcnArchName
    return torch.float8_e4m3fnuz if is_mi300 else torch.float8_e4m3fn


# --- checked launchers ------------------------------------------------------------------------------------------------
# None of them synchronizes or reads from the host, so all can be captured in a graph. ValueError on shapes, dtypes and
# memory that do not fit.


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x += delta in place (x, delta [T, K]; None adds nothing), and the RMS norm of the sum, times weight [K].

    The weight is read while kernels before may still run (see ``chains``): none of them may write it.
    """
    out = torch.empty_like(x)
    _launch_norm(x, delta, weight, eps, PLAIN.value, out, None)
    return out


def add_rms_norm_int8(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Int8Rows:
    """``add_rms_norm`` whose result is quantized row by row."""
    out = _room_for_int8(x, *_shape(x))
    _launch_norm(x, delta, weight, eps, INT8.value, *out)
    return out


def add_rms_norm_fp8(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> E4M3Rows:
    """``add_rms_norm`` whose result is quantized row by row to E4M3 (see ``e4m3_dtype``)."""
    out = _room_for_e4m3(x, *_shape(x), dtype)
    _launch_norm(x, delta, weight, eps, E4M3_KINDS[dtype], out.values.view(torch.uint8), out.scales)
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up -> [T, N] of gate_up [T, 2 N]."""
    num_rows, width = _halves(gate_up)
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    _launch_silu_mul(gate_up, PLAIN.value, out, None)
    return out


def silu_mul_int8(gate_up: torch.Tensor) -> Int8Rows:
    """``silu_mul`` whose result is ``turned``, which spreads its outliers, and quantized row by row."""
    out = _room_for_int8(gate_up, *_halves(gate_up))
    _launch_silu_mul(gate_up, INT8.value, *out)
    return out


def silu_mul_fp8(gate_up: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> E4M3Rows:
    """``silu_mul`` whose result is quantized row by row to E4M3 (see ``e4m3_dtype``)."""
    out = _room_for_e4m3(gate_up, *_halves(gate_up), dtype)
    _launch_silu_mul(gate_up, E4M3_KINDS[dtype], out.values.view(torch.uint8), out.scales)
    return out


def quantize_int8(x: torch.Tensor) -> Int8Rows:
    """Each row of x [T, K] as int8 with one scale, max|x| / 127."""
    out = _room_for_int8(x, *_shape(x))
    _launch_quantize(x, INT8.value, *out)
    return out


def quantize_fp8(x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> E4M3Rows:
    """Each row of x [T, K] as E4M3 with one scale, max|x| over the largest number of ``dtype``."""
    out = _room_for_e4m3(x, *_shape(x), dtype)
    _launch_quantize(x, E4M3_KINDS[dtype], out.values.view(torch.uint8), out.scales)
    return out


def round_bfp8(x: torch.Tensor) -> torch.Tensor:
    """x [T, K] rounded to bfp8 (docs/formats.md), as bfloat16. A group with a NaN or infinity is all NaN."""
    _check_rows(x, x=(x, _shape(x)))
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    if x.numel():
        _round_bfp8_kernel[(triton.cdiv(x.numel(), PIECE),)](x, out, x.numel(), BLOCK=PIECE, **row_options(PIECE_WARPS))
    return out


def scale_int32(acc: torch.Tensor, row_scales: torch.Tensor, column_scales: torch.Tensor) -> torch.Tensor:
    """acc int32 [T, N] times row_scales [T], then times column_scales [N] (both float32), as bfloat16."""
    num_rows, width = _shape(acc)
    check_tensor("acc", acc, torch.int32, (num_rows, width))
    check_tensor("row_scales", row_scales, torch.float32, (num_rows,))
    check_tensor("column_scales", column_scales, torch.float32, (width,))
    check_place({"acc": acc, "row_scales": row_scales, "column_scales": column_scales})
    out = torch.empty((num_rows, width), dtype=torch.bfloat16, device=acc.device)
    if num_rows:
        grid = num_rows, triton.cdiv(width, PIECE)
        _scale_int32_kernel[grid](
            acc, row_scales, column_scales, out, WIDTH=width, BLOCK=PIECE, **row_options(PIECE_WARPS)
        )
    return out


def row_constants(width: int, emit: int, capability: tuple[int, int] | None) -> dict[str, int | bool]:
    """The compile-time constants of a kernel whose program needs its whole row; ``capability`` as for chains."""
    return {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "EMIT": emit,
            "HARDWARE_E4M3": has_e4m3(capability), "CHAINED": chains(capability)}  # fmt: skip


def row_warps(width: int) -> int:
    """Warps of a program that holds a row: 16 values to a thread, until there are enough threads."""
    block: int = triton.next_power_of_2(width)
    return min(16, max(1, block // 512))


def row_options(num_warps: int) -> dict[str, int | bool]:
    """What Triton compiles with: no contraction, which would change where sums are rounded."""
    return {"num_warps": num_warps, "enable_fp_fusion": False}


def _launch_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float,
    emit: int, out: torch.Tensor, scales: torch.Tensor | None,
) -> None:  # fmt: skip
    num_rows, width = _shape(x)
    added = {} if delta is None else {"delta": (delta, (num_rows, width))}
    _check_rows(x, x=(x, (num_rows, width)), weight=(weight, (width,)), **added)
    capability = capability_of(x.device)
    if num_rows:
        _add_rms_norm_kernel[(num_rows,)](
            x, delta, weight, out, scales, eps,
            **row_constants(width, emit, capability), **row_options(row_warps(width)), **launch_options(capability),
        )  # fmt: skip


def _launch_silu_mul(gate_up: torch.Tensor, emit: int, out: torch.Tensor, scales: torch.Tensor | None) -> None:
    num_rows, width = out.shape
    _check_rows(gate_up, gate_up=(gate_up, (num_rows, 2 * width)))
    capability = capability_of(gate_up.device)
    if num_rows:
        constants = silu_constants(width, emit, capability)
        warps = PIECE_WARPS if emit == PLAIN.value else row_warps(width)
        grid = num_rows, triton.cdiv(width, constants["BLOCK"])
        _silu_mul_kernel[grid](
            gate_up, out, scales, **constants, **row_options(warps), **launch_options(capability)
        )  # fmt: skip


def silu_constants(width: int, emit: int, capability: tuple[int, int] | None) -> dict[str, int | bool]:
    """The compile-time constants of ``silu_mul``, whose program needs its whole row only for a scale."""
    constants = row_constants(width, emit, capability) | {"TURN": turn_block(width)}
    return constants | {"BLOCK": PIECE} if emit == PLAIN.value else constants


def _launch_quantize(x: torch.Tensor, emit: int, out: torch.Tensor, scales: torch.Tensor) -> None:
    num_rows, width = _shape(x)
    _check_rows(x, x=(x, (num_rows, width)))
    capability = capability_of(x.device)
    if num_rows:
        _quantize_kernel[(num_rows,)](
            x, out, scales,
            **row_constants(width, emit, capability), **row_options(row_warps(width)), **launch_options(capability),
        )  # fmt: skip


def _room_for_int8(x: torch.Tensor, num_rows: int, width: int) -> Int8Rows:
    values = torch.empty((num_rows, width), dtype=torch.int8, device=x.device)
    return Int8Rows(values, torch.empty(num_rows, dtype=torch.float32, device=x.device))


def _room_for_e4m3(x: torch.Tensor, num_rows: int, width: int, dtype: torch.dtype) -> E4M3Rows:
    if dtype not in E4M3_KINDS:
        raise ValueError(f"the dtype must be float8_e4m3fn or float8_e4m3fnuz, not {dtype}")
    values = torch.empty((num_rows, width), dtype=dtype, device=x.device)
    return E4M3Rows(values, torch.empty((num_rows, 1), dtype=torch.float32, device=x.device))


def _shape(x: torch.Tensor) -> tuple[int, int]:
    """(T, K) of rows of a width that the kernels can hold."""
    if x.dim() != 2 or x.shape[1] % WIDTH_STEP or not 0 < x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"rows must be [T, K] with K a multiple of {WIDTH_STEP} up to {MAX_WIDTH}, not {described(x)}")
    return x.shape[0], x.shape[1]


def _halves(gate_up: torch.Tensor) -> tuple[int, int]:
    """(T, N) of gate_up [T, 2 N]."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2 N], not {described(gate_up)}")
    return _shape(gate_up[:, : gate_up.shape[1] // 2])


def _check_rows(like: torch.Tensor, **tensors: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    """Raise ValueError unless all tensors are contiguous, of these shapes, and of one type that rows may have."""
    if like.dtype not in DTYPES:
        raise ValueError(f"rows must be float32 or bfloat16, not {described(like)}")
    for name, (tensor, shape) in tensors.items():
        check_tensor(name, tensor, like.dtype, shape)
    check_place({name: tensor for name, (tensor, _) in tensors.items()})


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _add_rms_norm_kernel(
    x, delta, weight, out, scales,
    eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EMIT: tl.constexpr, HARDWARE_E4M3: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    exists = columns < WIDTH
    place = r * WIDTH + columns
    DTYPE: tl.constexpr = x.dtype.element_ty
    weights = tl.load(weight + columns, mask=exists, other=0.0)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    row = to_f32(tl.load(x + place, mask=exists, other=0.0))
    if delta is not None:
        row = rounded(row + to_f32(tl.load(delta + place, mask=exists, other=0.0)), DTYPE)
        tl.store(x + place, narrowed(row, DTYPE), mask=exists)
    mean = tl.div_rn(tl.sum(row * row, axis=0), tl.full([], WIDTH, tl.float32))
    inverse = tl.div_rn(tl.full([], 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    if BLOCK > EAGER_BLOCK:
        weights = tl.load(weight + columns, mask=exists, other=0.0)
    row = rounded(rounded(row * inverse, DTYPE) * to_f32(weights), DTYPE)
    _emit_row(row, r, columns, exists, out, scales, WIDTH, EMIT, HARDWARE_E4M3)


@triton.jit
def _silu_mul_kernel(
    gate_up, out, scales,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TURN: tl.constexpr, EMIT: tl.constexpr, HARDWARE_E4M3: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """One row, or a piece of one where nothing asks for its largest value. Turned where it becomes int8."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    r = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = columns < WIDTH
    DTYPE: tl.constexpr = gate_up.dtype.element_ty
    gate = to_f32(tl.load(gate_up + r * (2 * WIDTH) + columns, mask=exists, other=0.0))
    up = to_f32(tl.load(gate_up + r * (2 * WIDTH) + WIDTH + columns, mask=exists, other=0.0))
    row = rounded(rounded(gate / (1.0 + tl.exp(-gate)), DTYPE) * up, DTYPE)
    if EMIT == INT8:
        SCALE: tl.constexpr = TURN**-0.5
        row = butterflies(row, TURN) * SCALE
    _emit_row(row, r, columns, exists, out, scales, WIDTH, EMIT, HARDWARE_E4M3)


@triton.jit
def _quantize_kernel(
    x, out, scales,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EMIT: tl.constexpr, HARDWARE_E4M3: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    r = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    exists = columns < WIDTH
    row = to_f32(tl.load(x + r * WIDTH + columns, mask=exists, other=0.0))
    _emit_row(row, r, columns, exists, out, scales, WIDTH, EMIT, HARDWARE_E4M3)


@triton.jit
def _emit_row(
    row, r, columns, exists, out, scales,
    WIDTH: tl.constexpr, EMIT: tl.constexpr, HARDWARE_E4M3: tl.constexpr,
):  # fmt: skip
    """One finished row goes out. Its largest magnitude is found on bits, so a NaN makes the scale one too."""
    target = out + r * WIDTH + columns
    if EMIT == PLAIN:
        tl.store(target, narrowed(row, out.dtype.element_ty), mask=exists)
    else:
        peak = float_of(tl.max((bits_of(row) & 0x7FFFFFFF).to(tl.int32), axis=0))
        if EMIT == INT8:
            LARGEST: tl.constexpr = tl.constexpr(127.0)
            tiny = peak < TINY_ROW
            inverse = tl.where(tiny, 0.0, tl.div_rn(tl.full([], LARGEST, tl.float32), peak))
            scale = tl.where(tiny, 0.0, tl.div_rn(peak, tl.full([], LARGEST, tl.float32)))
            values = (bits_of(row * inverse + ROUND_TO_INTEGER) & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True)
        else:
            TOP: tl.constexpr = 448.0 if EMIT == E4M3 else 240.0
            scale = tl.div_rn(peak, tl.full([], TOP, tl.float32))
            scale = tl.where(scale < SMALLEST_NORMAL, 1.0, scale)
            quotient = (bits_of(divide(row, scale)) & 0x7FFFFFFF) | (bits_of(row) & 0x80000000)  # -0 lost its sign
            values = to_e4m3(float_of(quotient), HARDWARE_E4M3, 7 if EMIT == E4M3 else 8)
        tl.store(target, values, mask=exists)
        tl.store(scales + r, scale)


@triton.jit
def _round_bfp8_kernel(x, out, num_values, BLOCK: tl.constexpr):
    """Groups of 16 values share the largest exponent field E; a value becomes m * 2^(E - 133), of 7 bits."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < num_values
    bits = bits_of(to_f32(tl.load(x + place, mask=exists, other=0.0)))
    field = ((bits >> 23) & 0xFF).to(tl.int32)
    groups = tl.reshape(field, [BLOCK // GROUP, GROUP])
    peak = tl.max(groups, axis=1)
    shared = tl.reshape(tl.broadcast_to(peak[:, None], groups.shape), field.shape)
    significand = tl.where(field > 0, (bits & 0x7FFFFF) | 0x800000, 0)  # subnormal numbers are zeros
    aligned = significand >> tl.minimum(shared - field, 31).to(tl.uint32)
    magnitude = tl.minimum((aligned + 0xFFFF + ((aligned >> 17) & 1)) >> 17, 127).to(tl.int32)
    signed = tl.where((bits >> 31) != 0, -magnitude, magnitude).to(tl.float32)
    # Below a field of 1, 2^(shared - 133) is a subnormal number; both kinds have bfloat16's few bits.
    unit = tl.where(shared > 6, (shared - 6) << 23, 1 << (shared + 16))
    unit = tl.where(shared == 0xFF, 0x7FC00000, unit)
    tl.store(out + place, narrowed(signed * float_of(unit), tl.bfloat16), mask=exists)


@triton.jit
def _scale_int32_kernel(acc, row_scales, column_scales, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = columns < WIDTH
    values = tl.load(acc + r * WIDTH + columns, mask=exists, other=0).to(tl.float32)
    values = values * tl.load(row_scales + r) * tl.load(column_scales + columns, mask=exists, other=0.0)
    tl.store(out + r * WIDTH + columns, narrowed(values, tl.bfloat16), mask=exists)
