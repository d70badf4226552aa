"""What the CPU kernels share: numba settings, memory by its address, element types and the KV formats.

A tensor reaches compiled code as an address, because making a numpy view costs more than a small kernel. bfloat16,
which numpy lacks, is read and written as uint16 bits; all arithmetic is float32.
"""

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic, overload, register_jitable

# Compiled once per machine into __pycache__ (scripts/setup warms it up); nogil so that the event loop's thread runs on.
COMPILE = {"cache": True, "nogil": True, "boundscheck": False, "error_model": "numpy"}
# For what only kernels call: inlined into them and cached with them. Without reference counts, whose atomic operations
# cost more than a row of a block: a helper borrows its caller's arrays, must not allocate one, and may return one only
# to another helper.
HELPER = COMPILE | {"cache": False, "_nrt": False}
# Lets reductions vectorize. Never "nnan"/"ninf": infinities and NaNs must stay visible.
REASSOCIATE = {"reassoc", "contract", "nsz"}


@njit(inline="always", **COMPILE)
def bf16_to_f32(bits):
    """The float32 with the bits of a bfloat16 on top."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(inline="always", **COMPILE)
def f32_to_bf16(value):
    """Round a finite float32 to bfloat16 bits, to nearest even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@intrinsic
def pointer(typingctx, address, tag):
    """A typed pointer of an address; the element type is that of ``tag``."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(tag)(address, tag), codegen


@njit(forceinline=True, **(HELPER | {"_nrt": True}))
def array_at(address, shape, tag):
    """The memory at an address, which somebody else owns, as an array of the type of ``tag``."""
    return carray(pointer(address, tag), shape)


DTYPES = (torch.bfloat16, torch.float32)  # what rows, K, V and queries may be
LOG2_E = np.float32(1.4426950408889634)
ROUND_TO_INTEGER = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits, ties even
INFINITY_BITS = np.uint32(0x7F800000)
BF16_OVERFLOW_BITS = np.uint32(0x7F7F8000)  # from here on a float32 rounds to a bfloat16 infinity
MAGNITUDE = np.uint32(0x7FFFFFFF)  # all but the sign

# Formats by code, their order and layout as docs/formats.md has them: the code is the index of the name.
FORMAT_NAMES = ("fp32", "bf16", "int8", "fp8_e4m3", "mxfp8", "bfp8")
FP32, BF16, INT8, FP8_E4M3, MXFP8, BFP8 = range(6)
TOKENS_PER_BLOCK = (8, 16, 32, 32, 32, 32)
MAX_TOKENS_PER_BLOCK = 32
GROUP = 32  # dims that share an mxfp8 scale; width of a bfp8 tile
FACE = 16  # a bfp8 tile is 2 x 2 faces of 16 x 16 values
TILE_ROWS = 68  # a bfp8 tile in rows of 16 bytes: 4 of exponents, 64 of values


@njit(forceinline=True, **HELPER)
def bits_of(value):
    """The bits of a float32."""
    return np.float32(value).view(np.uint32)


@njit(forceinline=True, **HELPER)
def float_of(bits):
    """The float32 that has these bits."""
    return np.uint32(bits).view(np.float32)


@register_jitable
def panel_bytes(code: int, head_dim: int) -> int:
    """Bytes of one head's K or V of one block."""
    if code in (INT8, FP8_E4M3):
        return 32 * head_dim + 128
    if code == MXFP8:
        return 33 * head_dim
    if code == BFP8:
        return 34 * head_dim
    return 32 * head_dim


@register_jitable
def is_defined(code: int, head_dim: int) -> bool:
    """Whether heads of this size have a layout in the format."""
    if code in (MXFP8, BFP8):
        return head_dim % GROUP == 0
    return code not in (INT8, FP8_E4M3) or head_dim >= 64


def check_kv(k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError unless K and V are what every kernel that stores them reads."""
    if k.dim() != 3 or k.shape != v.shape or k.dtype != v.dtype or k.dtype not in DTYPES:
        raise ValueError(
            f"k and v must both be float32 or both bfloat16 [num_tokens, num_kv_heads, head_dim], "
            f"not {k.dtype} {list(k.shape)} and {v.dtype} {list(v.shape)}"
        )
    if k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError("the last dimension of k and v must be contiguous")


@njit(forceinline=True, **HELPER)
def fill(row, value):
    for i in range(row.shape[0]):
        row[i] = value


def to_f32(value):
    """One element of memory as float32, inside kernels: float32 itself, or bfloat16 bits."""
    raise NotImplementedError("only inside compiled kernels")


@overload(to_f32, inline="always")
def _overload_to_f32(value):
    if isinstance(value, types.Integer):
        return lambda value: bf16_to_f32(value)
    return lambda value: value


def store_f32(target, index, value):
    """Store a float32 into memory of float32, or rounded into memory of bfloat16 bits, inside kernels."""
    raise NotImplementedError("only inside compiled kernels")


@overload(store_f32, inline="always")
def _overload_store_f32(target, index, value):
    if isinstance(target.dtype, types.Integer):

        def store(target, index, value):
            target[index] = f32_to_bf16(value)
    else:

        def store(target, index, value):
            target[index] = value

    return store
