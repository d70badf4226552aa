"""Linear layers in every precision: y = x W^T for rows x [T, K] and a weight W [N, K].

A weight may be given in parts, stacked along N, so that q, k, v (and gate, up) become one product without ever standing
side by side in full precision. Products of two e4m3 or two bfp8 values are exact in float32, and all such values
are exact in bfloat16: a bfloat16 product with float32 accumulation *is* their arithmetic, at full speed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from hmad.facts.errors import ConfigError, ModelError
from hmad_kernels.cpu_rows import Int8Rows, Product, ScaledRows, quantize_int8
from hmad_kernels.cpu_turn import turned

E4M3_MAX = 448.0
BFP8_GROUP = 16  # values that share an exponent
BFP8_DROPPED_BITS = 24 - 7  # float32 significand (with its hidden one) to 7-bit magnitude
SMALLEST_NORMAL = 2.0**-126
CONVERTED_ROWS = 256  # rows of a weight that are converted at a time

Activation: TypeAlias = Tensor | Int8Rows


class Linear(Protocol):
    """One weight, held in its precision."""

    weight_bytes: int  # as held

    def __call__(self, x: Any, /) -> Product:
        """x [T, K] -> [T, N]. Every layer takes a tensor; int8 takes Int8Rows too."""


def stacked(parts: Sequence[Tensor], dtype: torch.dtype, convert: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Parts [N_i, K] as one [sum N_i, K]; uncopied where there is one part of this dtype and nothing to convert.

    Runs of rows are converted one by one: at no time does a second copy of a weight exist in memory.
    """
    if len(parts) == 1 and convert is None and parts[0].dtype == dtype:
        return parts[0]
    whole = torch.empty((sum(len(part) for part in parts), parts[0].shape[1]), dtype=dtype, device=parts[0].device)
    for begin, run in row_runs(parts):
        whole[begin : begin + len(run)] = convert(run) if convert else run
    return whole


def row_runs(parts: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of the stacked parts, a few rows at a time."""
    part_begin = 0
    for part in parts:
        for begin in range(0, len(part), CONVERTED_ROWS):
            yield part_begin + begin, part[begin : begin + CONVERTED_ROWS]
        part_begin += len(part)


class Float32Linear:
    """The reference: float32 all the way."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._weight = stacked(parts, torch.float32)
        self.weight_bytes = self._weight.nbytes

    def __call__(self, x: Tensor, /) -> Tensor:
        return linear(x, self._weight)


class Bfloat16Linear:
    """The baseline. The weight is kept in the blocked order of the CPU's matrix units, where it has any."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        weight = stacked(parts, torch.bfloat16)
        self.weight_bytes = weight.nbytes
        self._product = blocked_product(weight)

    def __call__(self, x: Tensor, /) -> Tensor:
        return self._product(x)


def blocked_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x W^T in bfloat16, accumulated in float32."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda x: linear(x, weight)
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight)
    run = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor) -> Tensor:
        y: Tensor = run(x, blocked, None, "none", [], "")
        return y

    return product


class Int8Linear:
    """W8A8: symmetric weights per output channel, symmetric activations per token, exact int32 sums.

    ``turns``: x and the weight are ``turned`` along K before each is quantized. Their product stays what it is, but an
    outlier is spread over its block, so that it takes less of the others' only scale. Rows that come quantized have
    been turned.
    """

    def __init__(self, parts: Sequence[Tensor], *, turns: bool = False) -> None:
        check_integer_products()
        self._turns = turns
        values, self._scales = quantize_weight_int8(parts, turns=turns)
        self.weight_bytes = values.nbytes + self._scales.nbytes
        self._zeros = torch.zeros(len(values), dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack(values, None)

    def __call__(self, x: Activation, /) -> ScaledRows:
        rows = x if isinstance(x, Int8Rows) else quantize_int8(turned(x) if self._turns else x)
        return ScaledRows(
            int8_product(rows.values, self._packed, self._scales, self._zeros, torch.bfloat16), rows.scales
        )


def int8_product(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x [T, K] int8 times a packed int8 weight, each output channel times its scale -> [T, N].

    AMX multiplies signed bytes. VNNI wants one side unsigned, and oneDNN is thousands of times slower without: x goes
    in as 128 more, which oneDNN takes off the int32 sums again, so that they are the same.
    """
    run = torch.ops.onednn.qlinear_pointwise.default
    zero_point = 0 if has_amx() else 128
    x = x if zero_point == 0 else (x ^ -128).view(torch.uint8)
    y: Tensor = run(x, 1.0, zero_point, packed, scales, zeros, None, 1.0, 0, out_dtype, "none", [], "")
    return y


@functools.cache
def has_amx() -> bool:
    """Whether this CPU has matrix units, which multiply bytes of either sign."""
    return torch.cpu._is_amx_tile_supported()


def quantize_weight_int8(parts: Sequence[Tensor], *, turns: bool) -> tuple[Tensor, Tensor]:
    """Parts [N_i, K], turned or not -> int8 [N, K] and float32 scales [N], a run of rows at a time."""
    num_channels, k = sum(len(part) for part in parts), parts[0].shape[1]
    values, scales = torch.empty((num_channels, k), dtype=torch.int8), torch.empty(num_channels)
    for begin, run in row_runs(parts):
        rows = quantize_int8(turned(run) if turns else run.float() if run.dtype == torch.float16 else run)
        values[begin : begin + len(run)], scales[begin : begin + len(run)] = rows
    return values, scales


@functools.cache
def check_integer_products() -> None:
    """ConfigError unless this torch and CPU multiply int8 exactly (without VNNI, sums can saturate)."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        raise ConfigError("precision int8 needs a torch built with oneDNN; choose another --precision")
    k = 256
    x, weight = torch.full((4, k), 127, dtype=torch.int8), torch.full((16, k), -127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    y = int8_product(x, packed, torch.ones(16), torch.zeros(16, dtype=torch.int32), torch.float32)
    if not bool((y == -127 * 127 * k).all()):
        raise ConfigError("precision int8: this CPU cannot multiply int8 exactly; choose another --precision")


class Float8Linear:
    """e4m3 weights and activations, one scale per row of each. Emulated: the values are held as bfloat16."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        weight = stacked(parts, torch.bfloat16, lambda run: round_e4m3(run)[0])
        self._scales = torch.cat([e4m3_scales(run) for _, run in row_runs(parts)]).T  # [1, N]
        self.weight_bytes = weight.nbytes + self._scales.nbytes
        self._product = blocked_product(weight)

    def __call__(self, x: Tensor, /) -> Tensor:
        values, scales = round_e4m3(x)
        return (self._product(values) * (scales * self._scales)).to(x.dtype)


def round_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, K] -> its e4m3 values as bfloat16 [R, K], and float32 scales [R, 1] = max|x| / 448."""
    scales = e4m3_scales(x)
    return (x.float() / scales).to(torch.float8_e4m3fn).bfloat16(), scales


def e4m3_scales(x: Tensor) -> Tensor:
    """[R, 1] float32 of x [R, K]. Rows too small for a normal scale get 1, which rounds them to zeros."""
    scales = x.abs().amax(-1, keepdim=True).float() / E4M3_MAX
    return torch.where(scales < SMALLEST_NORMAL, 1.0, scales)


class Bfp8Linear:
    """Both operands block float: 7-bit magnitudes, groups of 16 along K share an exponent. Emulated in bfloat16."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        weight = stacked(parts, torch.bfloat16, round_bfp8)
        self.weight_bytes = weight.nbytes
        self._product = blocked_product(weight)

    def __call__(self, x: Tensor, /) -> Tensor:
        return self._product(round_bfp8(x))


def round_bfp8(x: Tensor) -> Tensor:
    """x [R, K] rounded to bfp8 (docs/formats.md), as bfloat16 [R, K]. A group with a NaN or infinity is all NaN."""
    if x.shape[1] % BFP8_GROUP:
        raise ModelError(f"precision bfp8 needs linear layers of a width that {BFP8_GROUP} divides, not {x.shape[1]}")
    bits = x.float().reshape(x.shape[0], -1, BFP8_GROUP).view(torch.int32)  # [R, K / 16, 16]
    exponent = (bits >> 23) & 0xFF
    shared = exponent.amax(-1, keepdim=True)  # [R, K / 16, 1]
    significand = torch.where(exponent > 0, (bits & 0x7FFFFF) | 0x800000, 0)
    aligned = significand >> (shared - exponent).clamp_(max=31)
    magnitude = _drop_bits_to_even(aligned, BFP8_DROPPED_BITS).clamp_(max=127)
    unit = torch.where(shared == 0xFF, torch.nan, torch.exp2(shared.float() - (127 + 6)))
    signed = torch.where(bits < 0, -magnitude, magnitude)
    return (signed * unit).view(x.shape).bfloat16()


def _drop_bits_to_even(value: Tensor, bits: int) -> Tensor:
    """value / 2^bits of non-negative int32, rounded half to even."""
    kept = value >> bits
    return (value + (1 << (bits - 1)) - 1 + (kept & 1)) >> bits


_LINEARS: dict[str, Callable[[Sequence[Tensor]], Linear]] = {
    "fp32": Float32Linear,
    "bf16": Bfloat16Linear,
    "int8": Int8Linear,
    "fp8": Float8Linear,
    "bfp8": Bfp8Linear,
}
PRECISIONS = tuple(_LINEARS)


def make_linear(precision: str, *parts: Tensor) -> Linear:
    """A linear layer of weight ``parts`` [N_i, K] (float32, float16 or bfloat16), stacked along N."""
    return _LINEARS[precision](parts)


def make_down(precision: str, *parts: Tensor) -> Linear:
    """The linear layer whose input is silu(gate) * up. Its outliers are what int8 loses most by; the other precisions
    have an exponent for each value or for a few."""
    return Int8Linear(parts, turns=True) if precision == "int8" else make_linear(precision, *parts)


def activation_dtype(precision: str) -> torch.dtype:
    """What flows between the linear layers."""
    return torch.float32 if precision == "fp32" else torch.bfloat16
