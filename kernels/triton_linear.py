"""Linear layers over few rows on the GPU, where reading the weight is all the time there is.

A program multiplies a run of the weight's rows with every row of x: one row by sums of products, more by the tensor
cores. The reference twin is ``torch.nn.functional.linear``: the same sums in float32, in another order, rounded once.
Limit: the weight's bytes over memory bandwidth. Libraries come to between six and nine tenths of that at these shapes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hmad_kernels.triton_common import (
    capability_of,
    chains,
    check_place,
    check_tensor,
    described,
    interprets,
    store_rounded,
    to_f32,
)

TUNED_ROWS = (1, 8, 16)  # that the kernel is compiled for
MOST_ROWS = TUNED_ROWS[-1]  # beyond, libraries are as good
WIDE = 16384  # output columns from which on programs of 64 are enough to keep every multiprocessor reading


@dataclass(frozen=True)
class Tuning:
    """How the kernel is compiled for a number of rows and a width."""

    rows: int  # to which x is padded; 1: no tensor cores
    columns: int  # of the output, for each program
    depth: int  # of the sums, for each step
    num_stages: int
    num_warps: int = 4

    def constants(self, capability: tuple[int, int] | None) -> dict[str, int | bool]:
        """The compile-time constants for a device, by its CUDA compute capability."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "STAGES": self.num_stages,
                "INTERPRETED": interprets(), "CHAINED": chains(capability)}  # fmt: skip

    def options(self) -> dict[str, int | bool]:
        """What Triton compiles with."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


def tuning_for(num_rows: int, num_columns: int) -> Tuning:
    """The configuration for x [num_rows, K] and a weight [num_columns, K]."""
    if num_rows == 1:
        return Tuning(rows=1, columns=8, depth=512, num_stages=3)
    rows = next(rows for rows in TUNED_ROWS if rows >= num_rows)
    if num_columns >= WIDE:
        return Tuning(rows, columns=64, depth=128, num_stages=3)
    return Tuning(rows, columns=32, depth=256, num_stages=4)


def takes(weight: torch.Tensor) -> bool:
    """Whether the kernel multiplies with this weight: bfloat16, of whole runs, on an NVIDIA GPU or interpreted."""
    if weight.dtype != torch.bfloat16 or weight.shape[0] % 64 or weight.shape[1] % 512:
        return False
    return interprets() or (weight.device.type == "cuda" and torch.version.hip is None)


def linear_few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] by weight [N, K] to [M, N], all bfloat16; M from 1 to MOST_ROWS.

    Raises ValueError on shapes, dtypes and memory that do not fit.
    """
    num_columns, depth = weight.shape
    check_tensor("x", x, torch.bfloat16, (-1, depth))
    check_tensor("weight", weight, torch.bfloat16, (-1, -1))
    if not 1 <= len(x) <= MOST_ROWS or not takes(weight):
        raise ValueError(
            f"x must have 1 to {MOST_ROWS} rows and the weight multiples of [64, 512], "
            f"not {described(x)} and {described(weight)}"
        )
    check_place({"x": x, "weight": weight})
    out = torch.empty((len(x), num_columns), dtype=x.dtype, device=x.device)
    tuned = tuning_for(len(x), num_columns)
    _linear_kernel[(num_columns // tuned.columns,)](
        x, weight, out, len(x), num_columns, depth, **tuned.constants(capability_of(x.device)), **tuned.options()
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x, weight, out, num_rows, num_columns, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """A run of columns of the output."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    weights = weight + column.to(tl.int64)[:, None] * depth + k[None, :]
    if ROWS == 1:
        sums = tl.zeros([COLUMNS, DEPTH], tl.float32)
        for start in tl.range(0, depth, DEPTH, num_stages=STAGES):
            w = to_f32(tl.load(weights + start, eviction_policy="evict_first"))
            sums += w * to_f32(tl.load(x + start + k))[None, :]
        store_rounded(out + column, tl.sum(sums, axis=1), column < num_columns)
    else:
        row = tl.arange(0, ROWS)
        is_row = (row < num_rows)[None, :]
        sources = x + row[None, :] * depth + k[:, None]
        acc = tl.zeros([COLUMNS, ROWS], tl.float32)
        for start in tl.range(0, depth, DEPTH, num_stages=STAGES):
            w = tl.load(weights + start, eviction_policy="evict_first")
            values = tl.load(sources + start, mask=is_row, other=0.0)
            if INTERPRETED:  # which has no product of bfloat16
                acc += tl.dot(to_f32(w), to_f32(values), input_precision="ieee")
            else:
                acc = tl.dot(w, values, acc)
        store_rounded(out + row[None, :] * num_columns + column[:, None], acc, is_row)
