"""What a CUDA device brings to the model: linear layers at its own precisions, and Triton kernels between them.

AMD's GPUs come through the same torch interface. Which numerics a precision has is the business of
``hmad.compute.linears``; here are the same numerics by the device's matrix units.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from hmad.compute.linears import Linear, activation_dtype, row_runs, stacked
from hmad.facts.errors import ConfigError
from hmad_kernels import triton_linear, triton_rope, triton_rows
from hmad_kernels.cpu_rows import Int8Rows
from hmad_kernels.cpu_turn import turned
from hmad_kernels.triton_rows import E4M3Rows, e4m3_dtype

INT8_MIN_ROWS = 32  # torch's int8 product takes no fewer than 17
FP8_CAPABILITY = (8, 9)  # Ada is the first with E4M3 products


class Angles(NamedTuple):
    """Where the rotary kernels find the angles of each row."""

    table: Tensor  # [max positions, D]
    positions: Tensor  # [T] int64


Activation: TypeAlias = Tensor | Int8Rows | E4M3Rows


class CudaBackend:
    """Linear layers and row kernels of one CUDA device, in one precision."""

    def __init__(self, precision: str, device: torch.device) -> None:
        check_precision(precision, device)
        self.device = device
        self._precision = precision
        self._e4m3 = e4m3_dtype(device)

    def make_linear(self, *parts: Tensor) -> Linear:
        placed = [part.to(self.device) for part in parts]
        match self._precision:
            case "int8":
                return Int8Linear(placed)
            case "fp8":
                return Float8Linear(placed, self._e4m3)
            case "bfp8":
                return Bfp8Linear(placed)
        return PlainLinear(placed, activation_dtype(self._precision))

    def make_down(self, *parts: Tensor) -> Linear:
        if self._precision == "int8":
            return Int8Linear([part.to(self.device) for part in parts], turns=True)
        return self.make_linear(*parts)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return product(x, weight)

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Activation:
        match self._precision:
            case "int8":
                return triton_rows.add_rms_norm_int8(x, delta, weight, eps)
            case "fp8":
                return triton_rows.add_rms_norm_fp8(x, delta, weight, eps, self._e4m3)
        return triton_rows.add_rms_norm(x, delta, weight, eps)

    def final_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        return triton_rows.add_rms_norm(x, delta, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Activation:
        match self._precision:
            case "int8":
                return triton_rows.silu_mul_int8(gate_up)
            case "fp8":
                return triton_rows.silu_mul_fp8(gate_up, self._e4m3)
        return triton_rows.silu_mul(gate_up)

    def angles(self, rope_table: Tensor, positions: Tensor) -> Angles:
        return Angles(rope_table, positions)

    def qk_norm_rope(
        self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, angles: Angles, num_heads: int, num_kv_heads: int, eps: float
    ) -> Tensor:
        return triton_rope.qk_norm_rope(
            qkv, q_norm, k_norm, angles.table, angles.positions, num_heads, num_kv_heads, eps
        )


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ConfigError where the device lacks what the precision needs."""
    if torch.version.hip is not None or precision != "fp8":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ConfigError(
            f"precision fp8 needs a GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or more, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: choose another --precision"
        )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] by weight [N, K]: few rows by our own kernel, which reads the weight faster than libraries do."""
    if len(x) <= triton_linear.MOST_ROWS and triton_linear.takes(weight):
        return triton_linear.linear_few_rows(x, weight)
    return linear(x, weight)


class PlainLinear:
    """bf16, the baseline; or fp32, the reference."""

    def __init__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._weight = stacked(parts, dtype)
        self.weight_bytes = self._weight.nbytes

    def __call__(self, x: Tensor, /) -> Tensor:
        return product(x, self._weight)


class Bfp8Linear:
    """Both operands block float, emulated: their values are exact in bfloat16, and so are their products in float32."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._weight = stacked(parts, torch.bfloat16, triton_rows.round_bfp8)
        self.weight_bytes = self._weight.nbytes

    def __call__(self, x: Tensor, /) -> Tensor:
        return linear(triton_rows.round_bfp8(x), self._weight)


class Int8Linear:
    """W8A8: symmetric weights per output channel, symmetric activations per token, exact int32 sums; both ``turned``
    before that, where it ``turns``."""

    def __init__(self, parts: Sequence[Tensor], *, turns: bool = False) -> None:
        self._quantize = quantize_turned if turns else triton_rows.quantize_int8
        values, self._scales = quantized(parts, torch.int8, self._quantize)
        self.weight_bytes = values.nbytes + self._scales.nbytes
        self._weight = values.t()

    def __call__(self, x: Tensor | Int8Rows, /) -> Tensor:
        values, scales = x if isinstance(x, Int8Rows) else self._quantize(x)
        num_rows = len(values)
        if num_rows < INT8_MIN_ROWS:
            values = pad(values, (0, 0, 0, INT8_MIN_ROWS - num_rows))
        sums = torch._int_mm(values, self._weight)[:num_rows]
        return triton_rows.scale_int32(sums, scales, self._scales)


def quantize_turned(x: Tensor) -> Int8Rows:
    """Rows turned, then quantized, as they leave ``silu_mul_int8``."""
    return triton_rows.quantize_int8(turned(x))


class Float8Linear:
    """E4M3 weights and activations, one scale per row of each, native."""

    def __init__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> None:
        values, scales = quantized(parts, dtype, lambda run: triton_rows.quantize_fp8(run, dtype))
        self.weight_bytes = values.nbytes + scales.nbytes
        self._weight, self._scales = values.t(), scales.view(1, -1)
        self._dtype = dtype

    def __call__(self, x: Tensor | E4M3Rows, /) -> Tensor:
        values, scales = x if isinstance(x, E4M3Rows) else triton_rows.quantize_fp8(x, self._dtype)
        product: Tensor = torch._scaled_mm(
            values, self._weight, scales, self._scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product


def quantized(
    parts: Sequence[Tensor], dtype: torch.dtype, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Parts [N_i, K] as values [N, K] and float32 scales [N], a run of rows at a time."""
    num_rows, k = sum(len(part) for part in parts), parts[0].shape[1]
    values = torch.empty((num_rows, k), dtype=dtype, device=parts[0].device)
    scales = torch.empty(num_rows, device=parts[0].device)
    for begin, run in row_runs(parts):
        run_values, run_scales = quantize(run.float() if run.dtype == torch.float16 else run)
        values[begin : begin + len(run)], scales[begin : begin + len(run)] = run_values, run_scales.view(-1)
    return values, scales
