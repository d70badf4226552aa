"""Decode attention over raw KV blocks on the GPU: what is dequantized never reaches device memory.

The unit of work is an *item*: a run of tokens of one segment of one sequence. A program attends over one item with all
query heads of one KV head, so that every raw byte is read once, and leaves a partial result; a second kernel merges
the partial results of each query head by log-sum-exp. Items are of about equal size however long the sequences are,
so a skewed batch is as fast as a uniform one. One launch per format: programs of other formats end at once, and the
grids depend on the capacity of the plan alone, as a captured graph wants it.

Formats of 8 bits are read as words of four values, which ``triton_panels`` makes float16 numbers of, exact up to a
scale per token; the scales are folded into the scores and the weights. Products over the four *planes* of dims 4j + i
are summed, so that no value ever changes its place. Limit: raw bytes over memory bandwidth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl

from hmad_kernels.triton_common import (
    BF16,
    DTYPES,
    FORMAT_NAMES,
    FP32,
    TOKENS_PER_BLOCK,
    check_head_dim,
    check_metadata,
    check_place,
    float_of,
    format_code,
    interprets,
    panel_bytes,
    store_rounded,
    to_f32,
)
from hmad_kernels.triton_panels import WORD_BLOCK_TOKENS, decode_words, load_step

LOG2_E = 1.4426950408889634
QUERY_ROWS = 16  # the smallest tensor-core operand: groups of up to 8 query heads are padded
MAX_GROUP = 8
ITEM_TOKENS = 256  # items are a multiple of this, unless a segment ends
EMPTY = -1  # the format code of an item that is not there
MERGE_ITEMS = 8  # partial results that the merge reads at once
WEIGHT_SCALE = tl.constexpr(2.0**14)  # keeps small weights above float16's subnormal numbers


@dataclass(frozen=True)
class Tuning:
    """How a format's kernel is compiled."""

    tokens: int  # that one step of a program's loop reads
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # left to itself, the assembler sometimes spills to gain a little occupancy

    def options(self) -> dict[str, int | bool]:
        """What Triton compiles with."""
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options | {"enable_fp_fusion": True}


def tuning_for(format_name: str, head_dim: int, capability: tuple[int, int] | None) -> Tuning:
    """The configuration for a device, by its CUDA compute capability; None stands for AMD. None of them spills."""
    if format_name == "fp32":
        return Tuning(tokens=16, num_warps=4, num_stages=1)
    if format_name == "bf16":
        return Tuning(tokens=64, num_warps=4, num_stages=2 if capability is None else 3)
    if capability is None:
        return Tuning(tokens=64, num_warps=4, num_stages=1)
    if head_dim == 64:
        return Tuning(tokens=64, num_warps=2, num_stages=1, max_registers=224)
    if capability == (9, 0) and format_name == "bfp8":  # these by scripts/bench_kernels on an H100
        return Tuning(tokens=32, num_warps=2, num_stages=1, max_registers=255)
    if capability == (9, 0):
        return Tuning(tokens=64, num_warps=4, num_stages=1, max_registers=144 if format_name == "int8" else 160)
    return Tuning(tokens=64, num_warps=4, num_stages=1, max_registers=168)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """A device's CUDA compute capability; None for AMD, and for the interpreter."""
    if interprets() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def split_items(
    seq_segments: np.ndarray, segments: np.ndarray, item_tokens: int, capacity: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cut every segment into items of ``item_tokens``, the last of each shorter.

    ``seq_segments`` int32 [batch + 1] says which segments each sequence has; ``segments`` int32 [num_segments, 3] are
    (format code, num_tokens, first index into the block table). Returns items int32 [capacity or as many as there are,
    4]: sequence, format code (EMPTY: no item), first index into the block table, num_tokens; and seq_items int32
    [batch + 1]: which items each sequence has. Raises ValueError if they do not fit into ``capacity``.
    """
    if item_tokens < 1 or item_tokens % max(TOKENS_PER_BLOCK):
        raise ValueError(f"item_tokens must be a positive multiple of {max(TOKENS_PER_BLOCK)}, not {item_tokens}")
    counts = -(-segments[:, 1] // item_tokens)
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    if capacity is not None and total > capacity:
        raise ValueError(f"{total} items of {item_tokens} tokens do not fit into a plan of {capacity}")
    segment = np.repeat(np.arange(len(segments)), counts)
    skipped = (np.arange(total) - np.repeat(ends - counts, counts)) * item_tokens  # tokens before the item
    code = segments[segment, 0]
    items = np.full((total if capacity is None else capacity, 4), EMPTY, dtype=np.int32)
    items[:total, 0] = np.repeat(np.arange(len(seq_segments) - 1), np.diff(seq_segments))[segment]
    items[:total, 1] = code
    items[:total, 2] = segments[segment, 2] + skipped // np.array(TOKENS_PER_BLOCK)[code]
    items[:total, 3] = np.minimum(segments[segment, 1] - skipped, item_tokens)
    return items, np.concatenate(([0], ends)).astype(np.int32)[seq_segments]


def item_tokens_for(num_tokens: int, num_kv_heads: int, num_programs: int) -> int:
    """The size of items that makes about ``num_programs`` programs, so that all multiprocessors have their share."""
    wanted = num_tokens * num_kv_heads / num_programs
    return max(1, round(wanted / ITEM_TOKENS)) * ITEM_TOKENS


def partial_shapes(num_items: int, num_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the float32 scratch: weighted values, and the maximum and sum of each item and query head."""
    return (num_items, num_heads, head_dim), (num_items, num_heads, 2)


def paged_decode_attention(
    q: torch.Tensor,
    slots: torch.Tensor,
    items: torch.Tensor,
    seq_items: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    partial_values: torch.Tensor,
    partial_stats: torch.Tensor,
    sm_scale: float,
    num_kv_heads: int,
    formats: Sequence[str],
    tuning: Tuning | None = None,
) -> None:
    """Attention of one query token per sequence over its items.

    q and out [batch, num_heads, head_dim], both bfloat16 or both float32; slots uint8 [num_slots, slot_bytes]; items,
    seq_items (see split_items) and block_table int32, on the device. What they say is not checked here: whoever made
    them on the host did. ``formats`` are those that items may have; an item of another would be missed. The scratch is
    of ``partial_shapes``. ``tuning`` replaces every format's own. A sequence without items gives NaN. Raises ValueError
    on shapes, dtypes and memory that do not fit.
    """
    codes = [format_code(name) for name in formats]
    group = _check(
        q, slots, items, seq_items, block_table, out, partial_values, partial_stats, num_kv_heads, codes
    )  # fmt: skip
    batch, num_heads, head_dim = q.shape
    capability = capability_of(q.device)
    for code, name in zip(codes, formats, strict=True):
        tuned = tuning or tuning_for(name, head_dim, capability)
        _attend_kernel[(len(items) * num_kv_heads,)](
            q, slots.view(torch.int32), items, block_table, partial_values, partial_stats,
            sm_scale * LOG2_E, slots.stride(0) // 4, num_kv_heads, group,
            **attend_constants(code, head_dim, tuned.tokens, interpreted=interprets()), **tuned.options(),
        )  # fmt: skip
    _merge_kernel[(batch * num_heads,)](
        seq_items, partial_values, partial_stats, out, num_heads,
        **merge_constants(head_dim), **MERGE_OPTIONS,
    )  # fmt: skip


MERGE_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def merge_constants(head_dim: int) -> dict[str, int]:
    """The compile-time constants of the merge."""
    return {"ITEMS": MERGE_ITEMS, "HEAD_DIM": head_dim}


def attend_constants(code: int, head_dim: int, tokens: int, *, interpreted: bool) -> dict[str, int | bool]:
    """The compile-time constants of the attention kernel."""
    return {
        "FORMAT": code,
        "HEAD_DIM": head_dim,
        "BLOCK_TOKENS": TOKENS_PER_BLOCK[code],
        "PANEL_WORDS": panel_bytes(code, head_dim) // 4,
        "TOKENS": tokens,
        "ROWS": QUERY_ROWS,
        "INTERPRETED": interpreted,
    }


def _check(
    q: torch.Tensor,
    slots: torch.Tensor,
    items: torch.Tensor,
    seq_items: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    partial_values: torch.Tensor,
    partial_stats: torch.Tensor,
    num_kv_heads: int,
    codes: Sequence[int],
) -> int:
    """Raise ValueError on what does not fit; returns the query heads of a KV head."""
    if q.dim() != 3 or q.shape != out.shape or q.dtype != out.dtype or q.dtype not in DTYPES:
        raise ValueError(
            "q and out must both be float32 or both bfloat16 [batch, num_heads, head_dim], "
            f"not {q.dtype} {list(q.shape)} and {out.dtype} {list(out.shape)}"
        )
    batch, num_heads, head_dim = q.shape
    check_head_dim(head_dim)
    group = num_heads // num_kv_heads
    if num_heads % num_kv_heads or not 1 <= group <= MAX_GROUP:
        raise ValueError(f"a KV head serves 1 to {MAX_GROUP} query heads, but {num_heads} share {num_kv_heads}")
    if slots.dtype != torch.uint8 or slots.dim() != 2 or slots.shape[1] % 16:
        raise ValueError(f"slots must be uint8 [num_slots, multiple of 16], not {slots.dtype} {list(slots.shape)}")
    largest = max((2 * num_kv_heads * panel_bytes(code, head_dim) for code in codes), default=0)
    if largest > slots.shape[1]:
        raise ValueError(f"a block of {largest} bytes does not fit into a slot of {slots.shape[1]}")
    check_metadata("items", items, (-1, 4))
    check_metadata("seq_items", seq_items, (batch + 1,))
    check_metadata("block_table", block_table, (-1,))
    shapes = partial_shapes(len(items), num_heads, head_dim)
    for name, tensor, shape in zip(
        ("partial_values", "partial_stats"), (partial_values, partial_stats), shapes, strict=True
    ):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be float32 {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")
    tensors = {
        "q": q, "slots": slots, "items": items, "seq_items": seq_items, "block_table": block_table, "out": out,
        "partial_values": partial_values, "partial_stats": partial_stats,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} {list(tensor.shape)} must be contiguous, not of strides {tensor.stride()}")
    check_place(tensors)
    return group


def paged_decode_attention_reference(
    q: torch.Tensor,
    slots: torch.Tensor,
    seq_segments: torch.Tensor,
    segments: torch.Tensor,
    block_table: torch.Tensor,
    sm_scale: float,
    num_kv_heads: int,
    decode: Callable[[str, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """The reference twin, in float64, over segments instead of items (see split_items).

    ``decode(format name, blocks uint8 [num_blocks, slot_bytes], num_tokens)`` gives K and V, each
    [num_tokens, num_kv_heads, head_dim]: the codecs belong to the caller.
    """
    group = q.shape[1] // num_kv_heads
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for b, (begin, end) in enumerate(pairwise(seq_segments.tolist())):
        parts = []
        for code, num_tokens, first in segments[begin:end].tolist():
            num_blocks = -(-num_tokens // TOKENS_PER_BLOCK[code])
            parts.append(decode(FORMAT_NAMES[code], slots[block_table[first : first + num_blocks].long()], num_tokens))
        k, v = (torch.cat(part).double().repeat_interleave(group, dim=1) for part in zip(*parts, strict=True))
        weights = torch.softmax(torch.einsum("hd,thd->ht", q[b].double(), k) * sm_scale, dim=-1)
        out[b] = torch.einsum("ht,thd->hd", weights, v)
    return out


@triton.jit
def _attend_kernel(
    q, slots, items, block_table, partial_values, partial_stats,
    log2_scale, slot_words, num_kv_heads, group,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PANEL_WORDS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One item and one KV head. ``log2_scale`` is the softmax scale for exponents of two."""
    item = tl.program_id(0) // num_kv_heads
    head = tl.program_id(0) % num_kv_heads  # neighbours read neighbouring panels
    if tl.load(items + 4 * item + 1) != FORMAT:
        return
    sequence = tl.load(items + 4 * item)
    table = block_table + tl.load(items + 4 * item + 2)
    num_tokens = tl.load(items + 4 * item + 3)
    rows = tl.arange(0, ROWS)
    first_head = (sequence.to(tl.int64) * num_kv_heads + head) * group
    partial_head = (item.to(tl.int64) * num_kv_heads + head) * group
    queries = q + (first_head + rows)[:, None] * HEAD_DIM
    panels = slots + head * (2 * PANEL_WORDS)
    target = partial_values + (partial_head + rows)[:, None] * HEAD_DIM
    if FORMAT == FP32 or FORMAT == BF16:  # noqa: SIM109 (compiled code knows no tuples of constants)
        peak, total = _attend_floats(
            queries, rows < group, panels, table, num_tokens, log2_scale, slot_words, target,
            FORMAT, HEAD_DIM, BLOCK_TOKENS, PANEL_WORDS, TOKENS, ROWS, INTERPRETED,
        )  # fmt: skip
    else:
        peak, total = _attend_words(
            queries, rows < group, panels, table, num_tokens, log2_scale, slot_words, target,
            FORMAT, HEAD_DIM, PANEL_WORDS, TOKENS, ROWS,
        )  # fmt: skip
    stats = partial_stats + 2 * (partial_head + rows)
    tl.store(stats, peak, mask=rows < group)
    tl.store(stats + 1, total, mask=rows < group)


@triton.jit
def _attend_floats(
    queries, is_head, panels, table, num_tokens, log2_scale, slot_words, target,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PANEL_WORDS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attention over values that are operands as they stand. The interpreter has no product of bfloat16."""
    STORED: tl.constexpr = tl.float32 if FORMAT == FP32 else tl.bfloat16
    OPERAND: tl.constexpr = tl.float32 if INTERPRETED else STORED
    columns = tl.arange(0, HEAD_DIM)
    query = to_f32(tl.load(queries + columns[None, :], mask=is_head[:, None], other=0.0)).to(OPERAND)
    per_word: tl.constexpr = 1 if FORMAT == FP32 else 2
    values = panels.to(tl.pointer_type(STORED))
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    next_slot = _load_slots(table, 0, num_tokens, BLOCK_TOKENS, TOKENS)
    for start in range(0, num_tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        live = t < num_tokens
        slot = next_slot.to(tl.int64)
        next_slot = _load_slots(table, start + TOKENS, num_tokens, BLOCK_TOKENS, TOKENS)
        place = slot * (slot_words * per_word) + t % BLOCK_TOKENS * HEAD_DIM
        sources = values + place[:, None] + columns[None, :]
        k = tl.load(sources, mask=live[:, None], other=0.0)
        v = tl.load(sources + PANEL_WORDS * per_word, mask=live[:, None], other=0.0)
        k, v = (to_f32(k), to_f32(v)) if INTERPRETED else (k, v)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * log2_scale
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(OPERAND), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    tl.store(target + columns[None, :], acc, mask=is_head[:, None])
    return peak, total


@triton.jit
def _attend_words(
    queries, is_head, panels, table, num_tokens, log2_scale, slot_words, target,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, PANEL_WORDS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Attention over 8-bit values in words of four, each plane of dims an operand of its own."""
    WORDS: tl.constexpr = HEAD_DIM // 4
    j = tl.arange(0, WORDS)
    q0, q1, q2, q3, query_scale = _load_queries(queries, 4 * j, is_head)
    score_scale = (query_scale * log2_scale)[:, None]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    unit_field = tl.full([], 1 << 23, tl.int32)  # exponent field of the power of two that weights are relative to
    acc0 = tl.zeros([ROWS, WORDS], tl.float32)
    acc1 = tl.zeros([ROWS, WORDS], tl.float32)
    acc2 = tl.zeros([ROWS, WORDS], tl.float32)
    acc3 = tl.zeros([ROWS, WORDS], tl.float32)
    slot = _load_slots(table, 0, num_tokens, WORD_BLOCK_TOKENS, TOKENS)
    k_words, k_scales, v_words, v_scales = load_step(
        panels, slot, 0, num_tokens, slot_words, FORMAT, HEAD_DIM, PANEL_WORDS
    )
    slot = _load_slots(table, TOKENS, num_tokens, WORD_BLOCK_TOKENS, TOKENS)
    for start in range(0, num_tokens, TOKENS):
        k0, k1, k2, k3, k_scale = decode_words(k_words, k_scales, FORMAT, HEAD_DIM)
        v0, v1, v2, v3, v_scale = decode_words(v_words, v_scales, FORMAT, HEAD_DIM)
        ahead = start + TOKENS
        k_words, k_scales, v_words, v_scales = load_step(
            panels, slot, ahead, num_tokens, slot_words, FORMAT, HEAD_DIM, PANEL_WORDS
        )  # fmt: skip
        slot = _load_slots(table, ahead + TOKENS, num_tokens, WORD_BLOCK_TOKENS, TOKENS)
        live = start + tl.arange(0, TOKENS) < num_tokens
        scores = tl.dot(q0, tl.trans(k0))
        scores = tl.dot(q1, tl.trans(k1), scores)
        scores = tl.dot(q2, tl.trans(k2), scores)
        scores = tl.dot(q3, tl.trans(k3), scores) * score_scale * k_scale[None, :]
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        peak = new_peak
        new_field = tl.maximum(unit_field, tl.max(v_scale.to(tl.int32, bitcast=True), axis=0) & 0x7F800000)
        one_over_unit = float_of((254 << 23) - new_field)
        shrink = (shrink * (float_of(unit_field) * one_over_unit))[:, None]
        unit_field = new_field
        weights = (weights * (v_scale * one_over_unit * WEIGHT_SCALE)[None, :]).to(tl.float16)
        acc0 = tl.dot(weights, v0, acc0 * shrink)
        acc1 = tl.dot(weights, v1, acc1 * shrink)
        acc2 = tl.dot(weights, v2, acc2 * shrink)
        acc3 = tl.dot(weights, v3, acc3 * shrink)
    acc = tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3))  # [ROWS, WORDS, 2, 2]: dim 4j + 2x + y
    acc = tl.reshape(acc, [ROWS, HEAD_DIM]) * (float_of(unit_field) * (1.0 / WEIGHT_SCALE))
    tl.store(target + tl.arange(0, HEAD_DIM)[None, :], acc, mask=is_head[:, None])
    return peak, total


@triton.jit
def _load_slots(table, start, num_tokens, BLOCK_TOKENS: tl.constexpr, TOKENS: tl.constexpr):
    """The slot of each token of a step. Loaded a step ahead, or the payload's copies would wait for it."""
    t = start + tl.arange(0, TOKENS)
    return tl.load(table + t // BLOCK_TOKENS, mask=t < num_tokens, other=0)


@triton.jit
def _load_queries(queries, columns, is_head):
    """The queries' four planes as float16, each row over a power of two that brings its largest value to 1..2."""
    q0 = to_f32(tl.load(queries + columns[None, :], mask=is_head[:, None], other=0.0))
    q1 = to_f32(tl.load(queries + columns[None, :] + 1, mask=is_head[:, None], other=0.0))
    q2 = to_f32(tl.load(queries + columns[None, :] + 2, mask=is_head[:, None], other=0.0))
    q3 = to_f32(tl.load(queries + columns[None, :] + 3, mask=is_head[:, None], other=0.0))
    largest = tl.maximum(tl.maximum(tl.abs(q0), tl.abs(q1)), tl.maximum(tl.abs(q2), tl.abs(q3)))
    field = tl.max(largest, axis=1).to(tl.int32, bitcast=True) & 0x7F800000
    field = tl.minimum(tl.maximum(field, 1 << 23), 253 << 23)
    inverse = float_of((254 << 23) - field)[:, None]
    return (
        (q0 * inverse).to(tl.float16),
        (q1 * inverse).to(tl.float16),
        (q2 * inverse).to(tl.float16),
        (q3 * inverse).to(tl.float16),
        float_of(field),
    )


@triton.jit
def _merge_kernel(
    seq_items, partial_values, partial_stats, out, num_heads, ITEMS: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """One query head of one sequence: its items' partial results, weighted by what their maxima say."""
    sequence = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    end = tl.load(seq_items + sequence + 1)
    columns = tl.arange(0, HEAD_DIM)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(tl.load(seq_items + sequence), end, ITEMS):
        item = start + tl.arange(0, ITEMS)
        here = item < end
        row = item.to(tl.int64) * num_heads + head
        peaks = tl.load(partial_stats + 2 * row, mask=here, other=float("-inf"))
        totals = tl.load(partial_stats + 2 * row + 1, mask=here, other=0.0)
        values = tl.load(
            partial_values + row[:, None] * HEAD_DIM + columns[None, :], mask=here[:, None], other=0.0
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(peaks, axis=0))
        factors = tl.exp2(peaks - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(factors * totals, axis=0)
        acc = acc * shrink + tl.sum(factors[:, None] * values, axis=0)
        peak = new_peak
    row = tl.program_id(0).to(tl.int64)
    store_rounded(out + row * HEAD_DIM + columns, acc / total, columns < HEAD_DIM)
