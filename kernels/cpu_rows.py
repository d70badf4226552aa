"""Row kernels of the transformer on CPU: everything between two matrix products, one pass over each row.

Rows are bfloat16 or float32. Sums and products are float32, rounded to the row's type wherever the unfused model
would round, so a fused row equals the unfused one up to the order of a sum. Launchers check shapes and
types and then hand plain addresses to the kernel: a numpy view of each tensor would cost more than a small kernel.
Many rows are shared out to torch's thread team.
"""

import functools
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload

from hmad_kernels import cpu_team
from hmad_kernels.cpu_common import (
    COMPILE,
    DTYPES,
    LOG2_E,
    MAGNITUDE,
    REASSOCIATE,
    bf16_to_f32,
    bits_of,
    f32_to_bf16,
    float_of,
    pointer,
    store_f32,
    to_f32,
)
from hmad_kernels.cpu_team import by_dtype, float_word, share_of, word_float
from hmad_kernels.cpu_turn import turn_block, turn_row, turned

INT8_MAX = 127.0
TINY_ROW = 2.0**-100  # rows below it quantize to zeros: 127 / max|x| must stay finite
LN_2 = np.float32(0.6931471805599453)
PARALLEL_VALUES = 1 << 15  # from here on more threads gain more than their start costs
ADD_RMS_NORM, SILU_MUL, QUANTIZE, QK_NORM_ROPE = range(4)


class Int8Rows(NamedTuple):
    """Rows quantized one by one: row t stands for values[t] * scales[t]."""

    values: torch.Tensor  # [T, K] int8
    scales: torch.Tensor  # [T] float32


class ScaledRows(NamedTuple):
    """A product of quantized rows before their scales: row t stands for values[t] * scales[t]."""

    values: torch.Tensor  # [T, N] bfloat16
    scales: torch.Tensor  # [T] float32


# What a linear layer returns. Whoever reads it next applies the scales on the way, which saves a pass over memory.
Product: TypeAlias = torch.Tensor | ScaledRows


# --- jit helpers ------------------------------------------------------------------------------------------------------


def rounded(value, rows):
    """A float32 rounded to the element type of ``rows``, still float32."""
    raise NotImplementedError("only inside compiled kernels")


@overload(rounded, inline="always")
def _overload_rounded(value, rows):
    if isinstance(rows.dtype, types.Integer):
        return lambda value, rows: bf16_to_f32(f32_to_bf16(value))
    return lambda value, rows: np.float32(value)


@njit(inline="always", **COMPILE)
def exp_f32(x):
    """e^x to about two units in the last place; a polynomial, because libm's exp would not vectorize."""
    x = min(max(x, np.float32(-87.0)), np.float32(87.0))
    n = np.rint(x * LOG2_E)
    r = x - n * LN_2
    p = np.float32(1 / 720)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = p * r + np.float32(coefficient)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(fastmath=REASSOCIATE, **COMPILE)
def sum_of_squares(rows, base, n):
    total = np.float32(0)
    for c in range(n):
        v = to_f32(rows[base + c])
        total += v * v
    return total


@njit(**COMPILE)
def scale_of(scales_address, r):
    """The scale of row r, 1 where rows have none."""
    return pointer(scales_address, np.float32(0))[r] if scales_address else np.float32(1)


@njit(**COMPILE)
def add_row(x, delta, base, n, scale):
    for c in range(n):
        store_f32(x, base + c, to_f32(x[base + c]) + rounded(to_f32(delta[base + c]) * scale, x))


@njit(**COMPILE)
def norm_row(x, base, weight, n, eps, scale, row):
    """RMS norm of one row times ``scale`` into float32 scratch: round the normed value, then times the weight."""
    mean = sum_of_squares(x, base, n) / np.float32(n) * scale * scale
    inverse = scale / np.sqrt(mean + np.float32(eps))
    for c in range(n):
        row[c] = rounded(rounded(to_f32(x[base + c]) * inverse, x) * to_f32(weight[c]), x)


@njit(fastmath={"contract"}, **COMPILE)
def silu_mul_row(gate_up, base, n, scale, row):
    for c in range(n):
        gate = to_f32(gate_up[base + c]) * scale
        silu = rounded(gate / (np.float32(1) + exp_f32(-gate)), gate_up)
        row[c] = rounded(silu * (to_f32(gate_up[base + n + c]) * scale), gate_up)


@njit(**COMPILE)
def store_row(row, n, y, base):
    for c in range(n):
        store_f32(y, base + c, row[c])


@njit(fastmath=REASSOCIATE, **COMPILE)
def quantize_row(row, n, q, base):
    """Symmetric int8 of one row; returns its scale. The largest magnitude is found on bits, so a NaN is one too."""
    top = np.uint32(0)
    for c in range(n):
        top = max(top, np.uint32(bits_of(row[c]) & MAGNITUDE))  # numba widens what & gives
    largest = float_of(top)
    inverse = np.float32(0) if largest < TINY_ROW else np.float32(INT8_MAX) / largest
    for c in range(n):
        q[base + c] = np.int8(np.int32(np.rint(row[c] * inverse)))
    return np.float32(0) if largest < TINY_ROW else largest / np.float32(INT8_MAX)


@njit(**COMPILE)
def emit_row(row, n, r, out_address, scales_address, tag):
    """One finished row goes out: quantized where there is room for its scale, else in the rows' own type."""
    if scales_address:
        scales = pointer(scales_address, np.float32(0))
        scales[r] = quantize_row(row, n, pointer(out_address, np.int8(0)), r * n)
    else:
        store_row(row, n, pointer(out_address, tag), r * n)


# --- kernels ----------------------------------------------------------------------------------------------------------
# Each takes the addresses its launcher passes, a range of rows, and a ``tag`` of the rows' element type.


@njit(**COMPILE)
def _add_rms_norm(x_address, delta_address, delta_scales_address, weight_address, out_address, scales_address,
                  begin, end, n, eps, tag):  # fmt: skip
    x, delta, weight = pointer(x_address, tag), pointer(delta_address, tag), pointer(weight_address, tag)
    row = np.empty(n, np.float32)
    for r in range(begin, end):
        if delta_address:
            add_row(x, delta, r * n, n, scale_of(delta_scales_address, r))
        norm_row(x, r * n, weight, n, eps, np.float32(1), row)
        emit_row(row, n, r, out_address, scales_address, tag)


@njit(**COMPILE)
def _silu_mul(gate_up_address, gate_up_scales_address, out_address, scales_address, begin, end, n, block, tag):
    """Turned where it is quantized."""
    gate_up = pointer(gate_up_address, tag)
    row = np.empty(n, np.float32)
    for r in range(begin, end):
        silu_mul_row(gate_up, r * 2 * n, n, scale_of(gate_up_scales_address, r), row)
        if scales_address:
            turn_row(row, n, block)
        emit_row(row, n, r, out_address, scales_address, tag)


@njit(**COMPILE)
def _quantize(x_address, out_address, scales_address, begin, end, n, tag):
    x = pointer(x_address, tag)
    row = np.empty(n, np.float32)
    for r in range(begin, end):
        for c in range(n):
            row[c] = to_f32(x[r * n + c])
        emit_row(row, n, r, out_address, scales_address, tag)


@njit(**COMPILE)
def rope_row(row, half, cos_sin, base):
    """Rotate one normed head (float32 scratch); each product is rounded, as the unfused model does."""
    for c in range(half):
        cos, sin = to_f32(cos_sin[base + c]), to_f32(cos_sin[base + half + c])
        low, high = row[c], row[half + c]
        row[c] = rounded(low * cos, cos_sin) - rounded(high * sin, cos_sin)
        row[half + c] = rounded(high * cos, cos_sin) + rounded(low * sin, cos_sin)


@njit(**COMPILE)
def _qk_norm_rope(qkv_address, scales_address, q_weight_address, k_weight_address, cos_sin_address,
                  num_heads, num_kv_heads, begin, end, head_dim, block, eps, tag):  # fmt: skip
    qkv, cos_sin = pointer(qkv_address, tag), pointer(cos_sin_address, tag)
    q_weight, k_weight = pointer(q_weight_address, tag), pointer(k_weight_address, tag)
    row = np.empty(head_dim, np.float32)
    num_rotated = num_heads + num_kv_heads
    for r in range(begin, end):
        scale, first = scale_of(scales_address, r), r * (num_rotated + num_kv_heads) * head_dim
        for h in range(num_rotated):
            base = first + h * head_dim
            norm_row(qkv, base, q_weight if h < num_heads else k_weight, head_dim, eps, scale, row)
            rope_row(row, head_dim // 2, cos_sin, r * head_dim)
            turn_row(row, head_dim, block)
            store_row(row, head_dim, qkv, base)
        if scales_address:
            for c in range(num_rotated * head_dim, (num_rotated + num_kv_heads) * head_dim):
                store_f32(qkv, first + c, to_f32(qkv[first + c]) * scale)


@njit(**COMPILE)
def _run_share(job, tag):
    """This thread's rows of a job. Words: type, kernel, rows, n, eps, then what the kernel alone knows."""
    kernel, n, eps = job[1], job[3], word_float(job[4])
    begin, end = share_of(job[2])
    if kernel == ADD_RMS_NORM:
        _add_rms_norm(job[5], job[6], job[7], job[8], job[9], job[10], begin, end, n, eps, tag)
    elif kernel == SILU_MUL:
        _silu_mul(job[5], job[6], job[7], job[8], begin, end, n, job[9], tag)
    elif kernel == QUANTIZE:
        _quantize(job[5], job[6], job[7], begin, end, n, tag)
    elif kernel == QK_NORM_ROPE:
        _qk_norm_rope(job[5], job[6], job[7], job[8], job[9], job[10], job[11], begin, end, n, job[12], eps, tag)


@functools.cache
def _body() -> cpu_team.Body:
    """All kernels for both row types behind one entry, compiled (or read from the cache) at the first call."""

    @cpu_team.body
    def body(job):
        by_dtype(_run_share, job)

    return body


# --- checked launchers ------------------------------------------------------------------------------------------------


def _check(like: torch.Tensor, *tensors: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    """A kernel trusts its addresses, so every tensor must be what the kernel takes it for."""
    for tensor, shape in tensors:
        if tensor.dtype != like.dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"need a contiguous {like.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if like.dtype not in DTYPES:
        raise ValueError(f"rows must be bfloat16 or float32, not {like.dtype}")


def _run(kernel: int, like: torch.Tensor, num_rows: int, n: int, eps: float, *words: int) -> None:
    """Launch on rows of the type of ``like``; ``words`` are the kernel's addresses and counts, 0 for none."""
    job = (like.dtype == torch.bfloat16, kernel, num_rows, n, float_word(eps), *words)
    cpu_team.run(_body(), job, parallel=like.numel() >= PARALLEL_VALUES)


def _room_for_int8(num_rows: int, n: int) -> Int8Rows:
    return Int8Rows(torch.empty((num_rows, n), dtype=torch.int8), torch.empty(num_rows, dtype=torch.float32))


_SCALES_LIKE = torch.empty(0, dtype=torch.float32)


def _addresses(like: torch.Tensor, product: Product, shape: tuple[int, int]) -> tuple[int, int]:
    """Where a product's values and its scales (0 for none) are, after a check of both."""
    if isinstance(product, torch.Tensor):
        _check(like, (product, shape))
        return product.data_ptr(), 0
    _check(like, (product.values, shape))
    _check(_SCALES_LIKE, (product.scales, shape[:1]))
    return product.values.data_ptr(), product.scales.data_ptr()


def _values(product: Product) -> torch.Tensor:
    return product if isinstance(product, torch.Tensor) else product.values


def _launch_add_rms_norm(
    x: torch.Tensor, delta: Product | None, weight: torch.Tensor, eps: float, out: torch.Tensor, scales: int
) -> None:
    num_rows, n = x.shape
    _check(x, (x, (num_rows, n)), (weight, (n,)))
    delta_addresses = (0, 0) if delta is None else _addresses(x, delta, (num_rows, n))
    _run(ADD_RMS_NORM, x, num_rows, n, eps, x.data_ptr(), *delta_addresses, weight.data_ptr(), out.data_ptr(), scales)


def add_rms_norm(x: torch.Tensor, delta: Product | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x += delta in place (x, delta [T, N]; None adds nothing), and the RMS norm of the sum, times weight [N]."""
    out = torch.empty_like(x)
    _launch_add_rms_norm(x, delta, weight, eps, out, 0)
    return out


def add_rms_norm_int8(x: torch.Tensor, delta: Product | None, weight: torch.Tensor, eps: float) -> Int8Rows:
    """``add_rms_norm`` whose result is quantized row by row."""
    out = _room_for_int8(*x.shape)
    _launch_add_rms_norm(x, delta, weight, eps, out.values, out.scales.data_ptr())
    return out


def _launch_silu_mul(gate_up: Product, out: torch.Tensor, scales: int) -> None:
    values, (num_rows, n) = _values(gate_up), out.shape
    addresses = _addresses(values, gate_up, (num_rows, 2 * n))
    _run(SILU_MUL, values, num_rows, n, 0.0, *addresses, out.data_ptr(), scales, turn_block(n))


def silu_mul(gate_up: Product) -> torch.Tensor:
    """silu(gate) * up -> [T, N] of gate_up [T, 2 N]."""
    values = _values(gate_up)
    out = torch.empty((values.shape[0], values.shape[1] // 2), dtype=values.dtype)
    _launch_silu_mul(gate_up, out, 0)
    return out


def silu_mul_int8(gate_up: Product) -> Int8Rows:
    """``silu_mul`` whose result is ``turned``, which spreads its outliers, and quantized row by row."""
    values = _values(gate_up)
    out = _room_for_int8(values.shape[0], values.shape[1] // 2)
    _launch_silu_mul(gate_up, out.values, out.scales.data_ptr())
    return out


def quantize_int8(x: torch.Tensor) -> Int8Rows:
    """Each row of x [T, N] as int8 with one scale, max|x| / 127."""
    num_rows, n = x.shape
    _check(x, (x, (num_rows, n)))
    out = _room_for_int8(num_rows, n)
    _run(QUANTIZE, x, num_rows, n, 0.0, x.data_ptr(), out.values.data_ptr(), out.scales.data_ptr())
    return out


def qk_norm_rope(
    qkv: Product,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> torch.Tensor:
    """RMS norm per head, rotary embedding and ``turned``, in place on the q and k heads of qkv [T, (H + 2 Hkv) * D].

    q_weight, k_weight [D]; cos_sin [T, D] holds each row's D/2 cosines, then its D/2 sines. Returns qkv, scaled.
    """
    values, head_dim = _values(qkv), q_weight.shape[0]
    num_rows, width = values.shape[0], (num_heads + 2 * num_kv_heads) * head_dim
    _check(values, (q_weight, (head_dim,)), (k_weight, (head_dim,)), (cos_sin, (num_rows, head_dim)))
    addresses = *_addresses(values, qkv, (num_rows, width)), q_weight.data_ptr(), k_weight.data_ptr()
    words = *addresses, cos_sin.data_ptr(), num_heads, num_kv_heads, turn_block(head_dim)
    _run(QK_NORM_ROPE, values, num_rows, head_dim, eps, *words)
    return values


# --- reference twins --------------------------------------------------------------------------------------------------


def wide(product: Product) -> torch.Tensor:
    """A product in float32, its scales applied."""
    if isinstance(product, torch.Tensor):
        return product.float()
    return product.values.float() * product.scales.unsqueeze(1)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of float32 x, rounded to the type of the weight before and after it is applied."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype)


def add_rms_norm_reference(x: torch.Tensor, delta: Product | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``add_rms_norm``, unfused."""
    if delta is not None:
        x += wide(delta).to(x.dtype)
    return _normed(x.float(), weight, eps)


def silu_mul_reference(gate_up: Product) -> torch.Tensor:
    """``silu_mul``, unfused."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    dtype = _values(gate_up).dtype
    return (torch.nn.functional.silu(gate).to(dtype) * up).to(dtype)


def quantize_int8_reference(x: torch.Tensor) -> Int8Rows:
    """``quantize_int8``, unfused. The ``_int8`` launchers equal their plain twin (silu's turned) followed by this."""
    rows = x.float()
    largest = rows.abs().amax(-1, keepdim=True)
    tiny = largest < TINY_ROW
    # A full tensor, because torch computes scalar / tensor with a reciprocal.
    inverse = torch.where(tiny, 0.0, torch.full_like(largest, INT8_MAX) / largest)
    scales = torch.where(tiny, 0.0, largest / INT8_MAX)
    return Int8Rows((rows * inverse).round().to(torch.int8), scales.squeeze(-1))


def qk_norm_rope_reference(
    qkv: Product,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> torch.Tensor:
    """``qk_norm_rope``, unfused, and not in place."""
    heads = wide(qkv).view(-1, num_heads + 2 * num_kv_heads, q_weight.shape[0])
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2]
    rotated = []
    for low, high in (_normed(q, q_weight, eps).chunk(2, dim=-1), _normed(k, k_weight, eps).chunk(2, dim=-1)):
        first = (low * cos).float() - (high * sin).float()
        second = (high * cos).float() + (low * sin).float()
        rotated.append(turned(torch.cat((first, second), dim=-1)))
    return torch.cat((*rotated, v), dim=1).flatten(1).to(cos.dtype)


def warm_up() -> None:
    """Compile every kernel for every row type, so that the first request does not wait for it."""
    _body()
