"""The turn: blocks of a row times Sylvester's orthonormal Hadamard matrix, before the row is rounded.

Two rows that are turned alike have the product that they had, but a value that stood out is spread over its block, and
values of like size lose less to a scale that they share. Keys and queries are turned by the head (docs/formats.md), the
input of `down` in int8 by blocks of its width. The transform is the fast one; its sums have one order on every device.
"""

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from hmad_kernels.cpu_common import COMPILE, pointer

MOST_VALUES = 256  # that are turned together
SIZES = tuple(1 << i for i in range(1, MOST_VALUES.bit_length()))  # of blocks that are not left as they are
VECTOR = 16  # values that the compiler is given together
FUSED = ("contract",)  # into one instruction: the product is exact, so nothing is rounded otherwise


def turn_block(width: int) -> int:
    """How many consecutive values of a row are turned together: a power of two that divides its width."""
    return min(width & -width, MOST_VALUES)


def turned(rows: torch.Tensor) -> torch.Tensor:
    """Rows [..., N] in float32, each block of them times Sylvester's orthonormal Hadamard matrix: its own inverse.

    The definition for every device, and the reference twin of what kernels do with rows on their way: both halves of a
    block are added and subtracted, results interleaved, once for each bit of an index, which takes every bit in turn
    to the top and around; the scale is last. No sum may be written in another order.
    """
    block = turn_block(rows.shape[-1])
    scale: float = block**-0.5
    values = rows.float().reshape(-1, block)
    for _ in range(block.bit_length() - 1):
        low, high = values.chunk(2, dim=-1)
        values = torch.stack((low + high, low - high), dim=-1).flatten(1)
    return (values * scale).view(rows.shape)


@intrinsic
def turn_block_at(typingctx, row, base, block):
    """``turned`` of the ``block`` values from ``base`` on, in place. A block stays in registers from its loads to its
    stores: LLVM makes vectors of none of the loops that say the same."""

    def codegen(context, builder, signature, args):
        row, base, block = args
        first = builder.gep(row, [base])
        for size in SIZES:
            with builder.if_then(builder.icmp_signed("==", block, block.type(size))):
                _turn_vectors(builder, first, size)
        return context.get_dummy_value()

    return types.void(row, base, block), codegen


def _turn_vectors(builder, first, size):
    """LLVM code that turns ``size`` float32 values in memory."""
    lanes = min(size, VECTOR)
    vector = ir.VectorType(ir.FloatType(), lanes)
    places = [builder.gep(first, [ir.IntType(64)(at)]) for at in range(0, size, lanes)]
    places = [builder.bitcast(place, vector.as_pointer()) for place in places]
    values = [builder.load(place, align=4) for place in places]
    apart = len(values) // 2
    while apart:
        for low in (i for i in range(len(values)) if not i & apart):
            one, other = values[low], values[low + apart]
            values[low], values[low + apart] = builder.fadd(one, other), builder.fsub(one, other)
        apart //= 2
    values = [_turn_lanes(builder, value, lanes) for value in values]
    scale = ir.Constant(vector, [size**-0.5] * lanes)
    for value, place in zip(values, places, strict=True):
        builder.store(builder.fmul(value, scale), place, align=4)


def _turn_lanes(builder, value, lanes):
    """The last sums and differences: of values in one vector."""
    apart = lanes // 2
    while apart:
        order = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [i ^ apart for i in range(lanes)])
        sign = ir.Constant(value.type, [-1.0 if i & apart else 1.0 for i in range(lanes)])
        signed = builder.fmul(value, sign, flags=FUSED)
        value = builder.fadd(builder.shuffle_vector(value, value, order), signed, flags=FUSED)
        apart //= 2
    return value


@njit(**COMPILE)
def turn_row(row, n, block):
    """``turned`` of one row of float32 scratch, in place."""
    values = pointer(row.ctypes.data, np.float32(0))
    for base in range(0, n, block):
        turn_block_at(values, base, block)
