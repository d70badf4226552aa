"""Append each sequence's newest token to its tail block, as raw ``bf16`` or ``fp32``.

The reference twin is ``hmad.compute.codecs.decode``, which kernels must not import: the tests read back with it what
was written. One thread does it: a batch of 256 is a megabyte.
"""

import ctypes
import functools

import numpy as np
import torch
from numba import njit

from hmad_kernels import cpu_team
from hmad_kernels.cpu_common import (
    BF16,
    BF16_OVERFLOW_BITS,
    DTYPES,
    FACE,
    FORMAT_NAMES,
    HELPER,
    INFINITY_BITS,
    MAGNITUDE,
    TOKENS_PER_BLOCK,
    array_at,
    bits_of,
    check_kv,
    store_f32,
    to_f32,
)
from hmad_kernels.cpu_team import by_dtype

_ALL_WELL, _BAD_ROWS, _OUTSIDE = range(3)


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    offsets: torch.Tensor,
    format_name: str,
) -> tuple[int, ...]:
    """Write one new token per sequence into its tail block, slot_ids[b] at token offsets[b] (both int32 [batch]).

    k and v are both float32 or both bfloat16 [batch, num_kv_heads, head_dim], the last dimension contiguous; the tail
    is ``bf16`` or ``fp32``. Returns the rows that are not finite in that format, as ``pack_blocks`` does. Raises
    ValueError on what does not fit.
    """
    if format_name not in ("fp32", "bf16"):
        raise ValueError(f"a tail is fp32 or bf16, not {format_name!r}")
    check_kv(k, v)
    if any(x.shape != k.shape[:1] or x.dtype != torch.int32 or not x.is_contiguous() for x in (slot_ids, offsets)):
        raise ValueError(f"slot_ids and offsets must be contiguous int32 [{len(k)}]")
    if slots.dtype != torch.uint8 or slots.dim() != 2 or not slots.is_contiguous() or slots.data_ptr() % 4:
        raise ValueError("slots must be contiguous uint8 [num_slots, slot_bytes], aligned to 4 bytes")
    if slots.shape[1] % FACE or slots.shape[1] < 64 * k.shape[1] * k.shape[2]:
        raise ValueError(f"a block of {format_name} does not fit into slots of {slots.shape[1]} bytes")
    if not all(tensor.is_cpu for tensor in (k, v, slots, slot_ids, offsets)):
        raise ValueError("every tensor must be in CPU memory")
    batch = len(k)
    report = (ctypes.c_uint8 * (batch + 1))()  # whether a row is bad, for each; then one of _ALL_WELL .. _OUTSIDE
    job = (
        k.dtype == torch.bfloat16, FORMAT_NAMES.index(format_name), batch, *k.shape[1:], *slots.shape,
        k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        slots.data_ptr(), slot_ids.data_ptr(), offsets.data_ptr(), ctypes.addressof(report),
    )  # fmt: skip
    cpu_team.run(_body(), job, parallel=False)
    if report[batch] == _OUTSIDE:
        raise ValueError("a slot id or an offset lies outside the arena or the block")
    return tuple(b for b in range(batch) if report[b]) if report[batch] else ()


@functools.cache
def _body() -> cpu_team.Body:
    """The kernel for both element types, compiled (or read from the cache) at the first call."""

    @cpu_team.body
    def append(job):
        by_dtype(_append, job)

    return append


@njit(**HELPER)
def _append(job, tag):
    """Store the new tokens, or nothing if a slot id or an offset is out of range. Words: those of append_kv."""
    code, batch, num_kv_heads, head_dim, num_slots, slot_bytes = job[1], job[2], job[3], job[4], job[5], job[6]
    slot_ids, offsets = array_at(job[14], (batch,), np.int32(0)), array_at(job[15], (batch,), np.int32(0))
    report = array_at(job[16], (batch + 1,), np.uint8(0))
    tokens_per_block = TOKENS_PER_BLOCK[code]
    for b in range(batch):
        if not (0 <= slot_ids[b] < num_slots and 0 <= offsets[b] < tokens_per_block):
            report[batch] = _OUTSIDE
            return
    memory_u16 = array_at(job[13], (num_slots, slot_bytes // 2), np.uint16(0))
    memory_f32 = array_at(job[13], (num_slots, slot_bytes // 4), np.float32(0.0))
    limit = BF16_OVERFLOW_BITS if code == BF16 else INFINITY_BITS
    for b in range(batch):
        peak = np.uint32(0)
        for panel in range(2 * num_kv_heads):
            head, is_v = panel // 2, panel % 2
            first = b * job[9 + 2 * is_v] + head * job[10 + 2 * is_v]
            source = array_at(job[7 + is_v], (first + head_dim,), tag)[first:]
            start = (panel * tokens_per_block + offsets[b]) * head_dim
            if code == BF16:
                peak = max(peak, _store_token(source, memory_u16[slot_ids[b], start : start + head_dim]))
            else:
                peak = max(peak, _store_token(source, memory_f32[slot_ids[b], start : start + head_dim]))
        if peak >= limit:
            report[b], report[batch] = 1, _BAD_ROWS


@njit(**HELPER)
def _store_token(source, target):
    """Store one row and return the largest magnitude in it, as float32 bits."""
    peak = np.uint32(0)
    for i in range(target.shape[0]):
        value = to_f32(source[i])
        peak = max(peak, np.uint32(bits_of(value) & MAGNITUDE))  # numba widens what & gives
        store_f32(target, i, value)
    return peak


def warm_up() -> None:
    """Compile what is not in the cache yet."""
    zero = torch.zeros(1, dtype=torch.int32)
    slots = torch.zeros(1, 2 * 34 * 32 + 128, dtype=torch.uint8)
    for dtype in DTYPES:
        token = torch.zeros(1, 1, 32, dtype=dtype)
        append_kv(token, token, slots, zero, zero, "bf16")
