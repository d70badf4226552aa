"""Decode attention over raw KV blocks on the GPU: what is dequantized never reaches device memory.

The unit of work is an *item*: a run of tokens of one segment of one sequence. A program attends over one item with all
query heads of one KV head, so that every raw byte is read once, and leaves a partial result; a second kernel merges
the partial results of each query head by log-sum-exp. Items are of about equal size however long the sequences are,
so a skewed batch is as fast as a uniform one. One launch per format: its grid depends on the capacity of the plan
alone, as a captured graph wants it, and programs beyond the format's items end at once.

Formats of 8 bits are read as words of four values, which ``triton_panels`` makes float16 numbers of, exact up to a
scale per token; the scales are folded into the scores and the weights. A program is one warp, and a step of it one
block: tokens are the rows of the tensor cores' products, query heads their eight columns. What a lane reads in 16 bytes
is its own share of the operand: the query and the result are permuted instead of the values, so that no value ever
changes its place. Limit: raw bytes over memory bandwidth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl

from hmad_kernels.triton_common import (
    ALIGN_BYTES,
    BF16,
    BFP8,
    DTYPES,
    FIRST_SLOTS,
    FORMAT_NAMES,
    FP8_E4M3,
    FP32,
    INT8,
    ITEM_FIELDS,
    MXFP8,
    TOKENS_PER_BLOCK,
    capability_of,
    chains,
    check_head_dim,
    check_metadata,
    check_place,
    described,
    float_of,
    format_code,
    interprets,
    launch_options,
    panel_bytes,
    store_rounded,
    to_f32,
)
from hmad_kernels.triton_panels import (
    BFP8_SCALE,
    E4M3_CAPABILITY,
    E4M3_PLACED_SCALE,
    INT8_SCALE,
    k_exponents,
    k_operand,
    load_k,
    load_scales,
    load_v,
    unit_of,
    v_exponents,
    v_operand,
)

LOG2_E = 1.4426950408889634
MAX_GROUP = 8
RESIDENT_PROGRAMS = 8  # of a multiprocessor at once, where the compiler does not tell
WARP_REGISTERS = 256  # registers are given to a warp in multiples of these
QUARTERS, QUARTER_REGISTERS = 4, 16384  # of a multiprocessor, each with its own registers
SHARED_BYTES_OF_A_PROGRAM = 1024  # that the system takes on top of what the program asks for
MERGE_ITEMS = 16  # partial results that a warp of the merge reads at once
MANY_ITEMS = 64  # of a sequence: then the merge has four warps
# Neighbouring values that a lane holds of an operand: Triton decides, and another number costs speed, not correctness.
K_WIDTH = 4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 2
WEIGHT_SCALE = tl.constexpr(2.0**14)  # keeps small weights above float16's subnormal numbers


@dataclass(frozen=True)
class Tuning:
    """How a format's kernel is compiled."""

    tokens: int  # that one step of a program's loop reads
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    query_rows: int = 16  # to which the query heads of a KV head are padded

    def options(self) -> dict[str, int | bool]:
        """What Triton compiles with."""
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options | {"enable_fp_fusion": True}


def tuning_for(format_name: str, capability: tuple[int, int] | None) -> Tuning:
    """The configuration for a device, by its CUDA compute capability; None stands for AMD. None of them spills."""
    if format_name == "fp32":
        return Tuning(tokens=16, num_warps=4, num_stages=1, max_registers=128)
    if format_name == "bf16":
        return Tuning(tokens=64, num_warps=4, num_stages=2)
    if capability is None:
        return Tuning(tokens=32, num_warps=1, num_stages=1)
    # Two blocks of raw words in registers: eight programs are resident on Hopper, and read as fast as memory can.
    return Tuning(tokens=32, num_warps=1, num_stages=1, max_registers=255, query_rows=8)


def resident_programs(
    format_name: str, dtype: torch.dtype, head_dim: int, num_heads: int, num_kv_heads: int, slot_bytes: int,
    device: torch.device,
) -> int:  # fmt: skip
    """Programs of a format's kernel that a multiprocessor of a device holds at once; compiles the kernel.

    ``dtype`` is that of the queries.
    """
    capability = capability_of(device)
    if capability is None:
        return RESIDENT_PROGRAMS
    code, tuned = format_code(format_name), tuning_for(format_name, capability)
    with torch.cuda.device(device):
        kernel = _attend_kernel.warmup(
            dtype, torch.int32, torch.int32, torch.int32, torch.int32, torch.float32, torch.float32,
            1.0, num_heads * head_dim, slot_bytes // 4, num_kv_heads, num_heads // num_kv_heads,
            **attend_constants(code, head_dim, tuned, capability, interpreted=False), **tuned.options(), grid=(1,),
        )  # fmt: skip
        kernel.run  # noqa: B018 (loads it, which tells its registers)
    place = torch.cuda.get_device_properties(device)
    shared_bytes = place.shared_memory_per_multiprocessor
    return programs_at_once(kernel.n_regs, kernel.metadata.shared, tuned.num_warps, shared_bytes)


def programs_at_once(num_registers: int, shared_bytes: int, num_warps: int, multiprocessor_bytes: int) -> int:
    """Programs of so many registers a thread, bytes of shared memory and warps that a multiprocessor has room for."""
    warp_registers = -(-32 * num_registers // WARP_REGISTERS) * WARP_REGISTERS
    warps = QUARTER_REGISTERS // warp_registers * QUARTERS
    return max(1, min(warps // num_warps, multiprocessor_bytes // (shared_bytes + SHARED_BYTES_OF_A_PROGRAM)))


def partial_shapes(num_items: int, num_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the float32 scratch: weighted values, and the maximum and sum of each item and query head."""
    return (num_items, num_heads, head_dim), (num_items, num_heads, 2)


def paged_decode_attention(
    q: torch.Tensor,
    slots: torch.Tensor,
    items: torch.Tensor,
    num_items: torch.Tensor,
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

    q and out [batch, num_heads, head_dim], both bfloat16 or both float32; the rows of q may lie further apart, as in a
    projection of which they are a part; slots uint8 [num_slots, slot_bytes]; items, num_items, seq_items (see
    triton_plan.Plan) and block_table int32, on the device. What they say is not checked here: whoever made them on the
    host did. Neither the last kernel that was launched as usual nor any since may write items, num_items or seq_items:
    where devices start kernels early (see ``chains``), they are read while those still run. ``formats`` are those of
    the plan. The scratch is of ``partial_shapes``. ``tuning`` replaces every format's own. A sequence without items
    gives NaN. Raises ValueError on shapes, dtypes and memory that do not fit, and where a step would begin with more
    blocks than an item's row has slots of.
    """
    if not formats:
        raise ValueError("formats names none, and attention needs one at least")
    codes = [format_code(name) for name in formats]
    group = _check(
        q, slots, items, num_items, seq_items, block_table, out, partial_values, partial_stats, num_kv_heads, codes
    )
    (batch, num_heads, head_dim), capacity = q.shape, items.shape[1]
    capability = capability_of(q.device)
    for plane, (code, name) in enumerate(zip(codes, formats, strict=True)):
        tuned = tuning or tuning_for(name, capability)
        if tuned.tokens > FIRST_SLOTS.value * TOKENS_PER_BLOCK[code]:
            raise ValueError(f"{name}: a step of {tuned.tokens} tokens is of more than {FIRST_SLOTS.value} blocks")
        # The last launch is mostly of long prefixes: its programs must be spread evenly, as those of linear layers.
        early = launch_options(capability) if plane == 0 < len(codes) - 1 else {}
        _attend_kernel[(capacity * num_kv_heads,)](
            q, slots.view(torch.int32), items[plane], num_items[plane:], block_table, partial_values, partial_stats,
            sm_scale * LOG2_E, q.stride(0), slots.stride(0) // 4, num_kv_heads, group,
            **attend_constants(code, head_dim, tuned, capability, interpreted=interprets()), **tuned.options(),
            **early,
        )  # fmt: skip
    merge_warps = 4 if capacity >= MANY_ITEMS * batch else 1
    _merge_kernel[(batch * num_heads,)](
        seq_items, partial_values, partial_stats, out, num_heads,
        **merge_constants(head_dim, merge_warps, capability), **merge_options(merge_warps, capability),
    )  # fmt: skip


def merge_options(num_warps: int, capability: tuple[int, int] | None) -> dict[str, int | bool]:
    """What Triton compiles and launches the merge with; ``capability`` as for tuning_for."""
    return {"num_warps": num_warps, "enable_fp_fusion": True} | launch_options(capability)


def merge_constants(head_dim: int, num_warps: int, capability: tuple[int, int] | None) -> dict[str, int | bool]:
    """The compile-time constants of the merge."""
    return {"ITEMS": MERGE_ITEMS * num_warps, "HEAD_DIM": head_dim, "CHAINED": chains(capability)}


def attend_constants(
    code: int, head_dim: int, tuning: Tuning, capability: tuple[int, int] | None, *, interpreted: bool
) -> dict[str, int | bool]:
    """The compile-time constants of the attention kernel; ``capability`` as for tuning_for."""
    return {
        "FORMAT": code,
        "HEAD_DIM": head_dim,
        "BLOCK_TOKENS": TOKENS_PER_BLOCK[code],
        "PANEL_WORDS": panel_bytes(code, head_dim) // 4,
        "TOKENS": tuning.tokens,
        "ROWS": tuning.query_rows,
        "INTERPRETED": interpreted,
        "K_WIDTH": K_WIDTH,
        "CHAINED": chains(capability),
        "CAPABILITY": 0 if capability is None else 10 * capability[0] + capability[1],
    }


def _check(
    q: torch.Tensor,
    slots: torch.Tensor,
    items: torch.Tensor,
    num_items: torch.Tensor,
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
            f"not {described(q)} and {described(out)}"
        )
    batch, num_heads, head_dim = q.shape
    check_head_dim(head_dim)
    group = num_heads // num_kv_heads
    if num_heads % num_kv_heads or not 1 <= group <= MAX_GROUP:
        raise ValueError(f"a KV head serves 1 to {MAX_GROUP} query heads, but {num_heads} share {num_kv_heads}")
    if slots.dtype != torch.uint8 or slots.dim() != 2 or slots.shape[1] % 16:
        raise ValueError(f"slots must be uint8 [num_slots, multiple of 16], not {described(slots)}")
    largest = max(2 * num_kv_heads * panel_bytes(code, head_dim) for code in codes)
    if largest > slots.shape[1]:
        raise ValueError(f"a block of {largest} bytes does not fit into a slot of {slots.shape[1]}")
    check_metadata("items", items, (len(codes), -1, ITEM_FIELDS.value))
    check_metadata("num_items", num_items, (len(codes),))
    check_metadata("seq_items", seq_items, (batch + 1,))
    check_metadata("block_table", block_table, (-1,))
    shapes = partial_shapes(items.shape[1], num_heads, head_dim)
    for name, tensor, shape in zip(
        ("partial_values", "partial_stats"), (partial_values, partial_stats), shapes, strict=True
    ):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be float32 {list(shape)}, not {described(tensor)}")
    tensors = {
        "q": q, "slots": slots, "items": items, "num_items": num_items, "seq_items": seq_items,
        "block_table": block_table, "out": out, "partial_values": partial_values, "partial_stats": partial_stats,
    }  # fmt: skip
    if q.stride()[1:] != (head_dim, 1) or q.stride(0) * q.element_size() % ALIGN_BYTES:
        raise ValueError(
            f"the heads of q must be contiguous and its rows aligned to {ALIGN_BYTES} bytes, not {described(q)}"
        )
    for name, tensor in tensors.items():
        if tensor is not q and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not {described(tensor)}")
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


@triton.jit(do_not_specialize_on_alignment=["num_items"])  # or each place among the formats would be compiled anew
def _attend_kernel(
    q, slots, items, num_items, block_table, partial_values, partial_stats,
    log2_scale, q_stride, slot_words, num_kv_heads, group,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PANEL_WORDS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr, K_WIDTH: tl.constexpr,
    CHAINED: tl.constexpr, CAPABILITY: tl.constexpr,
):  # fmt: skip
    """One item and one KV head. ``log2_scale`` is the softmax scale for exponents of two."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    item = tl.program_id(0) // num_kv_heads
    head = tl.program_id(0) % num_kv_heads  # neighbours read neighbouring panels
    # The item is read before it is known whether there is one: a trip to memory instead of two. Volatile, or the
    # compiler would move that behind the branch.
    fields = items + ITEM_FIELDS * item
    sequence = tl.load(fields, volatile=True).to(tl.int64)
    place = tl.load(fields + 1, volatile=True).to(tl.int64)
    table = block_table + tl.load(fields + 2, volatile=True)
    num_tokens = tl.load(fields + 3, volatile=True)
    first_slots = fields + ITEM_FIELDS - FIRST_SLOTS
    first_slot = tl.load(first_slots, volatile=True)
    if item >= tl.load(num_items):
        # Only the last of those that have no item waits, so that a launch of none but such does not end too early.
        if CHAINED:  # noqa: SIM102 (what a constant leaves out must stand in an if of its own)
            if tl.program_id(0) == tl.num_programs(0) - 1:
                tl.extra.cuda.gdc_wait()
        return
    rows = tl.arange(0, ROWS)
    partial_head = (place * num_kv_heads + head) * group
    queries = q + sequence * q_stride + (head * group + rows)[:, None] * HEAD_DIM
    panels = slots + head * (2 * PANEL_WORDS)
    if FORMAT == FP32 or FORMAT == BF16:  # noqa: SIM109 (compiled code knows no tuples of constants)
        peak, total = _attend_floats(
            queries, rows < group, panels, first_slots, table, num_tokens,
            log2_scale, slot_words, partial_values + (partial_head + rows)[:, None] * HEAD_DIM,
            FORMAT, HEAD_DIM, BLOCK_TOKENS, PANEL_WORDS, TOKENS, ROWS, INTERPRETED, CHAINED,
        )  # fmt: skip
    else:
        peak, total = _attend_words(
            q + sequence * q_stride + head * group * HEAD_DIM, group, panels, first_slot, first_slots, table,
            num_tokens, log2_scale, slot_words, partial_values + partial_head * HEAD_DIM,
            FORMAT, HEAD_DIM, PANEL_WORDS, TOKENS, ROWS, K_WIDTH, CHAINED, CAPABILITY,
        )  # fmt: skip
    stats = partial_stats + 2 * (partial_head + rows)
    tl.store(stats, peak, mask=rows < group)
    tl.store(stats + 1, total, mask=rows < group)


@triton.jit
def _attend_floats(
    queries, is_head, panels, first_slots, table, num_tokens, log2_scale, slot_words, target,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, PANEL_WORDS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Attention over values that are operands as they stand. The interpreter has no product of bfloat16."""
    STORED: tl.constexpr = tl.float32 if FORMAT == FP32 else tl.bfloat16
    OPERAND: tl.constexpr = tl.float32 if INTERPRETED else STORED
    columns = tl.arange(0, HEAD_DIM)
    next_slot = tl.load(first_slots + tl.arange(0, TOKENS) // BLOCK_TOKENS)
    if CHAINED:
        tl.extra.cuda.gdc_wait()  # for the query, and the token that was just appended
    query = to_f32(tl.load(queries + columns[None, :], mask=is_head[:, None], other=0.0)).to(OPERAND)
    per_word: tl.constexpr = 1 if FORMAT == FP32 else 2
    values = panels.to(tl.pointer_type(STORED))
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
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
    queries, group, panels, first_slot, first_slots, table, num_tokens, log2_scale, slot_words, target,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, PANEL_WORDS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, K_WIDTH: tl.constexpr, CHAINED: tl.constexpr,
    CAPABILITY: tl.constexpr,
):  # fmt: skip
    """Attention over 8-bit values in words of four: K as one operand, V as four planes of dims 4 j + i.

    A step begins with the loads of the next one's block, K and V together: so they are one run of memory. The first
    block is asked for before the query is, which is prepared while the block comes.
    """
    # Left to itself, the compiler reads the next block half a step later, or, of fp8_e4m3, a fifth, which does no harm.
    # With float32 queries, which are for exact tests, a fence costs registers that there are not.
    FENCED: tl.constexpr = CAPABILITY and FORMAT != FP8_E4M3 and queries.dtype.element_ty == tl.bfloat16
    BLOCKWISE: tl.constexpr = FORMAT >= MXFP8  # exponents of blocks of values, not scales of tokens
    PLACED: tl.constexpr = FORMAT >= FP8_E4M3 and CAPABILITY < E4M3_CAPABILITY
    FLOAT_SCALE: tl.constexpr = BFP8_SCALE if FORMAT == BFP8 else E4M3_PLACED_SCALE if PLACED else 1.0
    SCALE: tl.constexpr = INT8_SCALE if FORMAT == INT8 else FLOAT_SCALE
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    first_panel = panels + first_slot.to(tl.int64) * slot_words
    k_words, k_scales, v_evens, v_odds, v_scales = _load_block(
        first_panel, num_tokens, FORMAT, HEAD_DIM, PANEL_WORDS, K_WIDTH
    )
    slot = tl.load(first_slots + 1)
    query, query_scale = _load_queries(queries, group, HEAD_DIM, ROWS, K_WIDTH)
    score_scale = (query_scale * (log2_scale * SCALE))[None, :]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    v_unit = tl.full([], 1 << 23, tl.int32)  # the bits of the power of two that the sums of V are over
    acc0 = tl.zeros([HEAD_DIM // 4, ROWS], tl.float32)
    acc1 = tl.zeros([HEAD_DIM // 4, ROWS], tl.float32)
    acc2 = tl.zeros([HEAD_DIM // 4, ROWS], tl.float32)
    acc3 = tl.zeros([HEAD_DIM // 4, ROWS], tl.float32)
    t = tl.arange(0, TOKENS)
    for start in range(0, num_tokens, TOKENS):
        left = num_tokens - start - TOKENS
        next_panel = panels + slot.to(tl.int64) * slot_words
        slot = tl.load(table + start // TOKENS + 2, mask=left > TOKENS, other=0)
        next_k_words, next_k_scales, next_v_evens, next_v_odds, next_v_scales = _load_block(
            next_panel, left, FORMAT, HEAD_DIM, PANEL_WORDS, K_WIDTH
        )
        if FENCED:
            slot = _fenced(slot)

        if BLOCKWISE:
            unit = unit_of(k_scales, FORMAT)
            exponents = k_exponents(k_scales, unit, FORMAT, HEAD_DIM)
            k_scale = float_of(unit)
        else:
            exponents = 0
            k_scale = k_scales[:, None]
        scores = tl.dot(k_operand(k_words, exponents, FORMAT, HEAD_DIM, K_WIDTH, CAPABILITY), query)
        scores = scores * score_scale * k_scale
        scores = tl.where(t[:, None] < left + TOKENS, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_peak[None, :])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=0)
        peak = new_peak

        if BLOCKWISE:
            new_unit = tl.maximum(v_unit, unit_of(v_scales, FORMAT))
            exponents = v_exponents(v_scales, new_unit, FORMAT, HEAD_DIM, K_WIDTH)
            one_over_unit = float_of((254 << 23) - new_unit)
            weights = (weights * WEIGHT_SCALE).to(tl.float16)
        else:
            exponents = 0
            new_unit = tl.maximum(v_unit, tl.max(v_scales.to(tl.int32, bitcast=True), axis=0) & 0x7F800000)
            one_over_unit = float_of((254 << 23) - new_unit)
            weights = (weights * (v_scales * one_over_unit * WEIGHT_SCALE)[:, None]).to(tl.float16)
        shrink = (shrink * (float_of(v_unit) * one_over_unit))[None, :]
        v_unit = new_unit
        plane0 = v_operand(v_evens, v_odds, exponents, 0, FORMAT, HEAD_DIM, K_WIDTH, CAPABILITY)
        plane1 = v_operand(v_evens, v_odds, exponents, 1, FORMAT, HEAD_DIM, K_WIDTH, CAPABILITY)
        plane2 = v_operand(v_evens, v_odds, exponents, 2, FORMAT, HEAD_DIM, K_WIDTH, CAPABILITY)
        plane3 = v_operand(v_evens, v_odds, exponents, 3, FORMAT, HEAD_DIM, K_WIDTH, CAPABILITY)
        acc0 = tl.dot(plane0, weights, acc0 * shrink)
        acc1 = tl.dot(plane1, weights, acc1 * shrink)
        acc2 = tl.dot(plane2, weights, acc2 * shrink)
        acc3 = tl.dot(plane3, weights, acc3 * shrink)
        k_words, k_scales, v_evens, v_odds, v_scales = (
            next_k_words, next_k_scales, next_v_evens, next_v_odds, next_v_scales
        )  # fmt: skip
    row = tl.arange(0, HEAD_DIM // 4)
    first_dim = row % 8 * (HEAD_DIM // 8) + row // 8 * 4
    head = tl.arange(0, ROWS)[None, :, None]
    place = target + head * HEAD_DIM + first_dim[:, None, None] + tl.arange(0, 4)[None, None, :]
    planes = tl.reshape(tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3)), [HEAD_DIM // 4, ROWS, 4])
    tl.store(place, planes * (SCALE / WEIGHT_SCALE) * float_of(v_unit), mask=head < group)
    return peak, total


@triton.jit
def _fenced(x):
    """``x``, behind a fence that the compiler moves no load before it past. Of this kind: at ``fence.acq_rel`` code of
    CUDA 13 for sm_90 and later waits for all those loads.
    """
    return tl.inline_asm_elementwise("fence.sc.cta; mov.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=False, pack=1)


@triton.jit
def _load_block(
    panel, num_tokens, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, PANEL_WORDS: tl.constexpr, K_WIDTH: tl.constexpr
):
    """What a step needs of K and V of a block that holds ``num_tokens``; without any, nothing is read."""
    v_panel = panel + PANEL_WORDS
    k_words = load_k(panel, num_tokens, FORMAT, HEAD_DIM)
    k_scales = load_scales(panel, num_tokens, FORMAT, HEAD_DIM)
    v_evens = load_v(v_panel, num_tokens, 0, FORMAT, HEAD_DIM, K_WIDTH)
    v_odds = load_v(v_panel, num_tokens, 1, FORMAT, HEAD_DIM, K_WIDTH)
    v_scales = load_scales(v_panel, num_tokens, FORMAT, HEAD_DIM)
    return k_words, k_scales, v_evens, v_odds, v_scales


@triton.jit
def _load_slots(table, start, num_tokens, BLOCK_TOKENS: tl.constexpr, TOKENS: tl.constexpr):
    """The slot of each token of a step. Loaded a step ahead, or the payload's copies would wait for it."""
    t = start + tl.arange(0, TOKENS)
    return tl.load(table + t // BLOCK_TOKENS, mask=t < num_tokens, other=0)


@triton.jit
def _load_queries(queries, group, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, K_WIDTH: tl.constexpr):
    """float16 [HEAD_DIM, ROWS], dims as ``k_operand`` orders them, each column over a power of two.

    Row (h, s, n, c) of the load is dims 64 h + 16 c + 8 s and seven more of query head n: what a lane reads is its
    share of the operand.
    """
    row = tl.arange(0, HEAD_DIM // 8 * ROWS)
    head = row // 4 % ROWS
    dim = row // (8 * ROWS) * 64 + row % 4 * 16 + row // (4 * ROWS) % 2 * 8
    source = queries + (head * HEAD_DIM + dim)[:, None] + tl.arange(0, 8)[None, :]
    values = to_f32(tl.load(source, mask=(head < group)[:, None], other=0.0))
    peaks = tl.max(tl.reshape(tl.max(tl.abs(values), axis=1), [HEAD_DIM // 32, ROWS, 4]), axis=2)
    field = tl.max(peaks, axis=0).to(tl.int32, bitcast=True) & 0x7F800000
    field = tl.minimum(tl.maximum(field, 1 << 23), 253 << 23)
    values = tl.reshape(values, [HEAD_DIM // 32, ROWS, 4, 8]) * float_of((254 << 23) - field)[None, :, None, None]
    halves = tl.reshape(values.to(tl.float16), [HEAD_DIM // 64, 2, ROWS, 4, 2, 2, 2])  # h s n c w p e
    halves = tl.permute(halves, (0, 1, 4, 3, 6, 5, 2) if K_WIDTH == 4 else (0, 1, 4, 6, 3, 5, 2))
    return tl.reshape(halves, [HEAD_DIM, ROWS]), float_of(field)


@triton.jit
def _merge_kernel(
    seq_items, partial_values, partial_stats, out, num_heads,
    ITEMS: tl.constexpr, HEAD_DIM: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One query head of one sequence: its items' partial results, weighted by what their maxima say."""
    sequence = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    begin = tl.load(seq_items + sequence)
    end = tl.load(seq_items + sequence + 1)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    columns = tl.arange(0, HEAD_DIM)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(begin, end, ITEMS):
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
