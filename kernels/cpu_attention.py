"""Decode attention over raw KV blocks: dequantized one panel at a time, inside the kernel, for all query heads at once.

The unit of work is one block of one KV head of one sequence. All units of a launch, in the order (sequence, head,
block), are dealt to the threads in equal runs, so a long context is split where that balances the load. A run that
begins or ends inside a (sequence, head) leaves a partial result (sum, maximum and weighted values) in scratch, and
the partials are merged by log-sum-exp. Softmax is online: one pass, running maximum and sum. How the bytes of a panel
become float32 is the matter of ``cpu_panels``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from hmad_kernels import cpu_team
from hmad_kernels.cpu_common import (
    BF16,
    BFP8,
    COMPILE,
    DTYPES,
    FACE,
    FORMAT_NAMES,
    FP32,
    HELPER,
    LOG2_E,
    MAX_TOKENS_PER_BLOCK,
    REASSOCIATE,
    ROUND_TO_INTEGER,
    TOKENS_PER_BLOCK,
    array_at,
    bits_of,
    float_of,
    is_defined,
    panel_bytes,
    store_f32,
    to_f32,
)
from hmad_kernels.cpu_panels import UNROLL, decode_panel, slot_views, spare_values, spare_views
from hmad_kernels.cpu_team import by_dtype, float_word, part_of, share_of, word_float

ZERO = np.float32(0.0)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
EXP_MIN = np.float32(-87.0)  # below it exp is not a normal float32
PARALLEL_UNITS = 16  # blocks of one head: from here on more threads gain more than their start costs


def scratch_shape(num_threads: int, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Shape of the float32 scratch: per thread a decoded panel, scores, queries, a spare token, two partial results."""
    group = num_heads // num_kv_heads
    panel = MAX_TOKENS_PER_BLOCK * head_dim
    each = MAX_TOKENS_PER_BLOCK + head_dim + 2 * (head_dim + 2)  # of a query head
    return num_threads, panel + spare_values(head_dim) + group * each


class Bodies(NamedTuple):
    """The compiled entries of this file."""

    attend: cpu_team.Body
    merge: cpu_team.Body  # of attention's partial results, afterwards


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The metadata of one decode step, checked once and used by every layer.

    ``owners`` keeps alive what ``words`` holds the addresses of.
    """

    shape: tuple[int, int, int]  # of q and out
    slots_shape: tuple[int, int]
    words: tuple[int, ...]
    parallel: bool
    owners: tuple[torch.Tensor, ...]

    @classmethod
    def build(
        cls,
        seq_segments: torch.Tensor,
        segments: torch.Tensor,
        block_table: torch.Tensor,
        scratch: torch.Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_slots: int,
        slot_bytes: int,
    ) -> "AttentionPlan":
        """Check everything that indexes memory; raises ValueError that says what is wrong.

        ``seq_segments`` int32 [batch + 1] says which segments each sequence has; ``segments`` int32 [num_segments, 3]
        are (format code, num_tokens, first index into block_table); ``block_table`` int32 holds slot ids. ``scratch``
        is float32 of ``scratch_shape``, for as many runs of work as it has rows. They must not change while the plan
        is in use.
        """
        _check_plan(seq_segments, segments, block_table, scratch, num_heads, num_kv_heads, head_dim, slot_bytes)
        seq_units = torch.empty(len(seq_segments), dtype=torch.int64)  # units of work before each sequence
        mistake = _check_metadata(
            seq_segments.numpy(), segments.numpy(), block_table.numpy(),
            num_kv_heads, head_dim, num_slots, slot_bytes, seq_units.numpy(),
        )  # fmt: skip
        if mistake:
            raise ValueError(_MISTAKES[mistake])
        batch = len(seq_segments) - 1
        owners = (seq_segments, segments, block_table, seq_units, scratch)
        words = (
            batch, len(segments), len(block_table), *scratch.shape,
            num_heads, num_kv_heads, head_dim, num_slots, slot_bytes,
            *(tensor.data_ptr() for tensor in owners),
        )  # fmt: skip
        parallel = len(scratch) > 1 and int(seq_units[-1]) >= PARALLEL_UNITS
        return cls((batch, num_heads, head_dim), (num_slots, slot_bytes), words, parallel, owners)

    def run(self, q: torch.Tensor, slots: torch.Tensor, out: torch.Tensor, sm_scale: float) -> None:
        """One layer: q and out [batch, num_heads, head_dim], slots uint8 [num_slots, slot_bytes]."""
        if q.shape != self.shape or out.shape != self.shape or q.dtype != out.dtype or q.dtype not in DTYPES:
            raise ValueError(
                f"q and out must both be float32 or both bfloat16 {list(self.shape)}, "
                f"not {q.dtype} {list(q.shape)} and {out.dtype} {list(out.shape)}"
            )
        if slots.shape != self.slots_shape or slots.dtype != torch.uint8 or slots.data_ptr() % 4:
            raise ValueError(f"slots must be uint8 {list(self.slots_shape)}, aligned to 4 bytes")
        if not all(tensor.is_contiguous() and tensor.is_cpu for tensor in (q, out, slots)):
            raise ValueError("q, out and slots must be contiguous and in CPU memory")
        job = (
            q.dtype == torch.bfloat16, q.data_ptr(), out.data_ptr(), slots.data_ptr(),
            float_word(sm_scale), *self.words,
        )  # fmt: skip
        bodies = _bodies()
        cpu_team.run(bodies.attend, job, self.parallel)
        if len(self.owners[-1]) > 1:
            cpu_team.run(bodies.merge, job, parallel=False)


def _check_plan(
    seq_segments: torch.Tensor,
    segments: torch.Tensor,
    block_table: torch.Tensor,
    scratch: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    slot_bytes: int,
) -> None:
    metadata = (("seq_segments", seq_segments, 1), ("segments", segments, 2), ("block_table", block_table, 1))
    for name, tensor, dims in metadata:
        if tensor.dtype != torch.int32 or tensor.dim() != dims or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32 of {dims} dimensions")
    if len(seq_segments) < 2 or segments.shape[1] != 3:
        raise ValueError("seq_segments must be [batch + 1], segments [num_segments, 3]")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads cannot share {num_kv_heads} KV heads evenly")
    if slot_bytes % FACE:
        raise ValueError(f"slot_bytes must be a multiple of {FACE}, not {slot_bytes}")
    shape = scratch_shape(max(len(scratch), 1), num_heads, num_kv_heads, head_dim)
    fits = scratch.dtype == torch.float32 and tuple(scratch.shape) == shape
    if not (fits and scratch.is_contiguous() and scratch.is_cpu):
        raise ValueError(f"scratch must be contiguous float32 {list(shape)}, not {list(scratch.shape)}")


def paged_decode_attention(
    q: torch.Tensor,
    slots: torch.Tensor,
    seq_segments: torch.Tensor,
    segments: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
    sm_scale: float,
    num_kv_heads: int,
) -> None:
    """Attention of one query token per sequence over its segments: a plan (see AttentionPlan) built and run once."""
    plan = AttentionPlan.build(
        seq_segments, segments, block_table, scratch,
        num_heads=q.shape[1], num_kv_heads=num_kv_heads, head_dim=q.shape[2],
        num_slots=slots.shape[0], slot_bytes=slots.shape[1],
    )  # fmt: skip
    plan.run(q, slots, out, sm_scale)


def paged_decode_attention_reference(
    q: torch.Tensor,
    slots: torch.Tensor,
    seq_segments: torch.Tensor,
    segments: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
    sm_scale: float,
    num_kv_heads: int,
    decode: Callable[[str, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """The reference twin, in float64 and without scratch.

    ``decode(format name, blocks uint8 [num_blocks, slot_bytes], num_tokens)`` gives K and V, each
    [num_tokens, num_kv_heads, head_dim]: the codecs belong to the caller.
    """
    group = q.shape[1] // num_kv_heads
    for b, (begin, end) in enumerate(pairwise(seq_segments.tolist())):
        parts = []
        for code, num_tokens, first in segments[begin:end].tolist():
            num_blocks = -(-num_tokens // TOKENS_PER_BLOCK[code])
            parts.append(decode(FORMAT_NAMES[code], slots[block_table[first : first + num_blocks].long()], num_tokens))
        k, v = (torch.cat(part).double().repeat_interleave(group, dim=1) for part in zip(*parts, strict=True))
        weights = torch.softmax(torch.einsum("hd,thd->ht", q[b].double(), k) * sm_scale, dim=-1)
        out[b] = torch.einsum("ht,thd->hd", weights, v)


_MISTAKES = {
    1: "seq_segments must rise from 0 to the number of segments, and every sequence needs a segment",
    2: "a segment's format code is unknown, or its format is not defined for head_dim",
    3: "a segment has no tokens, or its blocks lie outside block_table",
    4: "a block of a segment's format does not fit into a slot",
    5: "block_table holds a slot id outside the arena",
}


@njit(**COMPILE)
def _check_metadata(seq_segments, segments, block_table, num_kv_heads, head_dim, num_slots, slot_bytes, seq_units):
    """Fill seq_units and return 0, or a key of _MISTAKES."""
    if seq_segments[0] != 0 or seq_segments[-1] != segments.shape[0]:
        return 1
    seq_units[0] = 0
    for b in range(seq_segments.shape[0] - 1):
        if seq_segments[b + 1] <= seq_segments[b]:
            return 1
        blocks = 0
        for s in range(seq_segments[b], seq_segments[b + 1]):
            code, num_tokens, first = segments[s, 0], segments[s, 1], segments[s, 2]
            if code < FP32 or code > BFP8 or not is_defined(code, head_dim):
                return 2
            num_blocks = -(-num_tokens // TOKENS_PER_BLOCK[code])
            if num_tokens < 1 or first < 0 or first + num_blocks > block_table.shape[0]:
                return 3
            if 2 * num_kv_heads * panel_bytes(code, head_dim) > slot_bytes:
                return 4
            for i in range(first, first + num_blocks):
                if block_table[i] < 0 or block_table[i] >= num_slots:
                    return 5
            blocks += num_blocks
        seq_units[b + 1] = seq_units[b] + blocks * num_kv_heads
    return 0


@functools.cache
def _bodies() -> Bodies:
    """The kernels for both element types, compiled (or read from the cache) at the first call."""

    @cpu_team.body
    def attend(job):
        by_dtype(_attend, job)

    @cpu_team.body
    def merge(job):
        by_dtype(_merge_partials, job)

    return Bodies(attend, merge)


@njit(**HELPER)
def _attend(job, tag):
    """This thread's runs of units. Words: those of AttentionPlan.run, then those of AttentionPlan.words."""
    batch, num_heads, num_kv_heads, head_dim = job[5], job[10], job[11], job[12]
    num_slots, slot_bytes = job[13], job[14]
    q = array_at(job[1], (batch, num_heads, head_dim), tag)
    out = array_at(job[2], (batch, num_heads, head_dim), tag)
    views = slot_views(job[3], num_slots, slot_bytes)
    sm_scale = np.float32(word_float(job[4]))
    seq_segments = array_at(job[15], (batch + 1,), np.int32(0))
    segments = array_at(job[16], (job[6], 3), np.int32(0))
    block_table = array_at(job[17], (job[7],), np.int32(0))
    seq_units = array_at(job[18], (batch + 1,), np.int64(0))
    scratch = array_at(job[19], (job[8], job[9]), ZERO)
    scratch_u8 = array_at(job[19], (job[8], 4 * job[9]), np.uint8(0))
    begin, end = share_of(job[8])
    for worker in range(begin, end):
        _run_worker(
            worker, q, views, seq_segments, segments, block_table, seq_units,
            out, scratch, scratch_u8, num_kv_heads, sm_scale,
        )  # fmt: skip


@njit(**HELPER)
def _run_worker(
    worker, q, views, seq_segments, segments, block_table, seq_units,
    out, scratch, scratch_u8, num_kv_heads, sm_scale,
):  # fmt: skip
    """Work through this worker's run of units, one (sequence, head) after the other."""
    group, head_dim = q.shape[1] // num_kv_heads, q.shape[2]
    panel, scores, query, spare = _working_memory(scratch[worker], scratch_u8[worker], group, head_dim)
    unit, end = part_of(seq_units[-1], worker, scratch.shape[0])
    while unit < end:
        b, head, skip, blocks = _locate(unit, seq_units, num_kv_heads)
        count = min(blocks - skip, end - unit)
        acc, peaks, sums = _partial(scratch[worker], 0 if skip else 1, group, head_dim)
        _load_query(q[b, head * group : (head + 1) * group], sm_scale, query)
        acc[:, :] = ZERO
        peaks[:] = -np.inf
        sums[:] = ZERO
        for s in range(seq_segments[b], seq_segments[b + 1]):
            code, num_tokens, first = segments[s, 0], segments[s, 1], segments[s, 2]
            tokens_per_block = TOKENS_PER_BLOCK[code]
            num_blocks = -(-num_tokens // tokens_per_block)
            start = 2 * head * panel_bytes(code, head_dim)
            for j in range(max(skip, 0), min(num_blocks, skip + count)):
                tokens = min(tokens_per_block, num_tokens - j * tokens_per_block)
                slot = block_table[first + j]
                decode_panel(code, views, slot, start, tokens, panel, spare)
                _score(query, panel, tokens, scores)
                _softmax(scores, tokens, acc, peaks, sums)
                decode_panel(code, views, slot, start + panel_bytes(code, head_dim), tokens, panel, spare)
                _accumulate(scores, panel, tokens, acc)
            skip -= num_blocks
        if count == blocks:
            _finish(acc, sums, out[b, head * group : (head + 1) * group])
        unit += count


@njit(**HELPER)
def _locate(unit, seq_units, num_kv_heads):
    """The (sequence, head) of a unit, its block counted within the sequence, and the sequence's number of blocks."""
    b = np.searchsorted(seq_units, unit, side="right") - 1
    blocks = (seq_units[b + 1] - seq_units[b]) // num_kv_heads
    within = unit - seq_units[b]
    return b, within // blocks, within % blocks, blocks


@njit(**HELPER)
def _working_memory(memory, memory_u8, group, head_dim):
    """This worker's panel [32, head_dim], scores [group, 32], query [group, head_dim] and spare (see cpu_panels)."""
    a = MAX_TOKENS_PER_BLOCK * head_dim
    b = a + group * MAX_TOKENS_PER_BLOCK
    c = b + group * head_dim
    return (
        memory[:a].reshape(MAX_TOKENS_PER_BLOCK, head_dim),
        memory[a:b].reshape(group, MAX_TOKENS_PER_BLOCK),
        memory[b:c].reshape(group, head_dim),
        spare_views(memory, memory_u8, c, head_dim),
    )


@njit(**HELPER)
def _partial(memory, which, group, head_dim):
    """Accumulators [group, head_dim], score maxima [group] and sums [group].

    A run has at most two partial results: 0 is of the head it begins inside of, 1 of the head that it begins but may
    not end.
    """
    size = group * (head_dim + 2)
    begin = memory.shape[0] - (2 - which) * size
    a = begin + group * head_dim
    acc = memory[begin:a].reshape(group, head_dim)
    return acc, memory[a : a + group], memory[a + group : a + 2 * group]


@njit(**HELPER)
def _load_query(source, sm_scale, query):
    for g in range(query.shape[0]):
        for i in range(query.shape[1]):
            query[g, i] = to_f32(source[g, i]) * sm_scale


@njit(fastmath=REASSOCIATE, **HELPER)
def _score(query, panel, tokens, scores):
    """scores [group, 32] = query [group, head_dim] . panel [32, head_dim], rounded up to whole UNROLLs of tokens."""
    for t in range(0, tokens, UNROLL):
        k0, k1, k2, k3 = panel[t], panel[t + 1], panel[t + 2], panel[t + 3]
        for g in range(query.shape[0]):
            row = query[g]
            s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
            for i in range(row.shape[0]):
                s0 += row[i] * k0[i]
                s1 += row[i] * k1[i]
                s2 += row[i] * k2[i]
                s3 += row[i] * k3[i]
            scores[g, t], scores[g, t + 1], scores[g, t + 2], scores[g, t + 3] = s0, s1, s2, s3


@njit(**HELPER)
def _softmax(scores, tokens, acc, peaks, sums):
    """Turn scores into weights relative to the running maximum and rescale what was gathered under the older one."""
    for g in range(scores.shape[0]):
        row = scores[g]
        peak = peaks[g]
        for t in range(tokens):
            peak = max(peak, row[t])
        if peak > peaks[g]:
            _rescale(acc[g], _exp(peaks[g] - peak))
            sums[g] *= _exp(peaks[g] - peak)
            peaks[g] = peak
        sums[g] += _weigh(row, tokens, peak)


@njit(**HELPER)
def _rescale(values, factor):
    for i in range(values.shape[0]):
        values[i] *= factor


@njit(fastmath=REASSOCIATE, **HELPER)
def _weigh(row, tokens, peak):
    """row = exp(row - peak), 0 past the last token; returns the sum."""
    total = ZERO
    for t in range(MAX_TOKENS_PER_BLOCK):
        weight = _exp(row[t] - peak) if t < tokens else ZERO
        row[t] = weight
        total += weight
    return total


@njit(forceinline=True, **HELPER)
def _exp(x):
    """exp of x <= 0 to about 1e-7, without branches so that loops over it vectorize; NaN stays NaN.

    2^n * e^r with n the nearest integer to x / ln 2 and the polynomial of Cephes expf for e^r. Not to be compiled with
    reassociation, which would undo the rounding.
    """
    x = EXP_MIN if x < EXP_MIN else x
    shifted = x * LOG2_E + ROUND_TO_INTEGER
    n = shifted - ROUND_TO_INTEGER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = (p * r) * r + r + np.float32(1.0)
    return p * float_of((bits_of(shifted) << np.uint32(23)) + np.uint32(127 << 23))


@njit(fastmath=REASSOCIATE, **HELPER)
def _accumulate(weights, panel, tokens, acc):
    """acc [group, head_dim] += weights [group, 32] x panel [32, head_dim]."""
    for t in range(0, tokens, UNROLL):
        v0, v1, v2, v3 = panel[t], panel[t + 1], panel[t + 2], panel[t + 3]
        for g in range(acc.shape[0]):
            w0, w1, w2, w3 = weights[g, t], weights[g, t + 1], weights[g, t + 2], weights[g, t + 3]
            row = acc[g]
            for i in range(row.shape[0]):
                row[i] += (w0 * v0[i] + w1 * v1[i]) + (w2 * v2[i] + w3 * v3[i])


@njit(**HELPER)
def _finish(acc, sums, target):
    for g in range(acc.shape[0]):
        inverse = np.float32(1.0) / sums[g]
        row = target[g]
        for i in range(acc.shape[1]):
            store_f32(row, i, acc[g, i] * inverse)


@njit(**HELPER)
def _merge_partials(job, tag):
    """Merge the partial results of every (sequence, head) that a boundary between two workers' runs splits."""
    batch, num_workers, num_heads, num_kv_heads, head_dim = job[5], job[8], job[10], job[11], job[12]
    group = num_heads // num_kv_heads
    out = array_at(job[2], (batch, num_heads, head_dim), tag)
    seq_units = array_at(job[18], (batch + 1,), np.int64(0))
    scratch = array_at(job[19], (num_workers, job[9]), ZERO)
    total = seq_units[-1]
    for worker in range(num_workers - 1):
        begin, end = part_of(total, worker, num_workers)
        b, head, skip, blocks = _locate(min(end, total - 1), seq_units, num_kv_heads)
        if begin == end or skip == 0 or end - skip < begin:
            continue  # no boundary inside a head, or the head began in an earlier run
        acc, peaks, sums = _partial(scratch[worker], 1, group, head_dim)
        for other in range(worker + 1, num_workers):
            other_begin, other_end = part_of(total, other, num_workers)
            if other_begin >= end - skip + blocks:
                break
            if other_begin < other_end:
                _merge(acc, peaks, sums, _partial(scratch[other], 0, group, head_dim))
        _finish(acc, sums, out[b, head * group : (head + 1) * group])


@njit(**HELPER)
def _merge(acc, peaks, sums, other):
    for g in range(acc.shape[0]):
        peak = max(peaks[g], other[1][g])
        mine, theirs = _exp(peaks[g] - peak), _exp(other[1][g] - peak)
        for i in range(acc.shape[1]):
            acc[g, i] = acc[g, i] * mine + other[0][g, i] * theirs
        sums[g] = sums[g] * mine + other[2][g] * theirs
        peaks[g] = peak


def warm_up() -> None:
    """Compile what is not in the cache yet."""
    one, zero = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    slots = torch.zeros(1, 2 * 34 * 32 + 128, dtype=torch.uint8)
    scratch = torch.empty(scratch_shape(1, 1, 1, 32))
    for dtype in DTYPES:
        q = torch.zeros(1, 1, 32, dtype=dtype)
        segments = torch.tensor([[BF16, 1, 0]], dtype=torch.int32)
        paged_decode_attention(q, slots, torch.cat((zero, one)), segments, zero, q, scratch, 1.0, 1)
