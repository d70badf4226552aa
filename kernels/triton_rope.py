"""Norm, rotary embedding and Hadamard turn of the q and k heads on the GPU, for decode fused with the append to the
arena.

The reference twins are ``qk_norm_rope`` of ``cpu_rows`` and ``append_kv`` of ``cpu_append``. Values are rounded
where theirs are, so all is equal bit for bit but for the order of a head's sum of squares, which may move a normed
value by one place before it is weighted, rotated and turned. Limit: bytes read and written over memory bandwidth.
"""

import torch
import triton
import triton.language as tl

from hmad_kernels.triton_common import (
    BF16,
    BF16_OVERFLOW_BITS,
    DTYPES,
    INFINITY_BITS,
    TOKENS_PER_BLOCK,
    bits_of,
    butterflies,
    capability_of,
    chains,
    check_head_dim,
    check_metadata,
    check_place,
    check_tensor,
    described,
    format_code,
    launch_options,
    panel_bytes,
    rounded,
    store_rounded,
    to_f32,
)

HEADS_PER_PROGRAM = 8


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope_table: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> torch.Tensor:
    """RMS norm per head, rotary embedding and turn, in place on the q and k heads of qkv [T, (H + 2 Hkv) * D].

    q_weight, k_weight [D]; rope_table [max_positions, D]: D/2 cosines, then D/2 sines; all of one type, float32 or
    bfloat16. positions int64 [T]; a row whose position the table does not have gets zeros. Returns qkv. Raises
    ValueError on shapes, dtypes and memory that do not fit.
    """
    _check(qkv, q_weight, k_weight, rope_table, positions, num_heads, num_kv_heads)
    capability = capability_of(qkv.device)
    if len(qkv):
        _norm_rope_kernel[rope_grid(len(qkv), num_heads + num_kv_heads)](
            qkv, q_weight, k_weight, rope_table, positions, None, None, None, None,
            num_heads, num_kv_heads, len(rope_table), 0, eps,
            **rope_constants(q_weight.shape[0], None, capability), **rope_options(capability),
        )  # fmt: skip
    return qkv


def norm_rope_append(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope_table: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    format_name: str,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    offsets: torch.Tensor,
    bad_rows: torch.Tensor,
) -> None:
    """``qk_norm_rope`` of q in place; k so treated, and v, go into block slot_ids[t] as its token offsets[t].

    ``format_name`` is fp32 or bf16; slots uint8 [num_slots, slot_bytes]; slot_ids, offsets int32 [T] are not checked
    here. Of a row whose slot id is -1 nothing is written. ``bad_rows`` uint8 [T] becomes 1 where the format cannot hold
    k or v, and is left alone elsewhere.
    """
    head_dim = q_weight.shape[0]
    _check(qkv, q_weight, k_weight, rope_table, positions, num_heads, num_kv_heads)
    code = _check_tails(format_name, slots, slot_ids, offsets, bad_rows, len(qkv), num_kv_heads, head_dim)
    check_place({"qkv": qkv, "slots": slots, "slot_ids": slot_ids, "offsets": offsets, "bad_rows": bad_rows})
    capability = capability_of(qkv.device)
    if len(qkv):
        _norm_rope_kernel[rope_grid(len(qkv), num_heads + 2 * num_kv_heads)](
            qkv, q_weight, k_weight, rope_table, positions, slots, slot_ids, offsets, bad_rows,
            num_heads, num_kv_heads, len(rope_table), slots.stride(0), eps,
            **rope_constants(head_dim, code, capability), **rope_options(capability),
        )  # fmt: skip


def rope_grid(num_rows: int, num_heads: int) -> tuple[int, int]:
    """Programs over rows and over runs of heads."""
    return num_rows, triton.cdiv(num_heads, HEADS_PER_PROGRAM)


def rope_constants(
    head_dim: int, tail_code: int | None, capability: tuple[int, int] | None
) -> dict[str, int | bool | None]:
    """The compile-time constants. Without ``tail_code`` nothing is appended; ``capability`` is as for ``chains``."""
    block_tokens = None if tail_code is None else TOKENS_PER_BLOCK[tail_code]
    return {"HEAD_DIM": head_dim, "HEADS": HEADS_PER_PROGRAM, "TAIL": tail_code, "BLOCK_TOKENS": block_tokens,
            "CHAINED": chains(capability)}  # fmt: skip


def rope_options(capability: tuple[int, int] | None) -> dict[str, int | bool]:
    """What Triton compiles with: 8 values of either half of a head to a thread."""
    return {"num_warps": 2, "enable_fp_fusion": False} | launch_options(capability)


def _check(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, rope_table: torch.Tensor,
    positions: torch.Tensor, num_heads: int, num_kv_heads: int,
) -> None:  # fmt: skip
    head_dim = q_weight.shape[0] if q_weight.dim() else 0
    check_head_dim(head_dim)
    if qkv.dtype not in DTYPES:
        raise ValueError(f"qkv must be float32 or bfloat16, not {described(qkv)}")
    check_tensor("qkv", qkv, qkv.dtype, (-1, (num_heads + 2 * num_kv_heads) * head_dim))
    check_tensor("q_weight", q_weight, qkv.dtype, (head_dim,))
    check_tensor("k_weight", k_weight, qkv.dtype, (head_dim,))
    check_tensor("rope_table", rope_table, qkv.dtype, (-1, head_dim))
    check_tensor("positions", positions, torch.int64, (len(qkv),))
    check_place(
        {"qkv": qkv, "q_weight": q_weight, "k_weight": k_weight, "rope_table": rope_table, "positions": positions}
    )


def _check_tails(
    format_name: str, slots: torch.Tensor, slot_ids: torch.Tensor, offsets: torch.Tensor, bad_rows: torch.Tensor,
    num_rows: int, num_kv_heads: int, head_dim: int,
) -> int:  # fmt: skip
    if format_name not in ("fp32", "bf16"):
        raise ValueError(f"a tail is fp32 or bf16, not {format_name!r}")
    code = format_code(format_name)
    check_tensor("slots", slots, torch.uint8, (-1, -1))
    block_bytes = 2 * num_kv_heads * panel_bytes(code, head_dim)
    if slots.shape[1] % 16 or slots.shape[1] < block_bytes:
        raise ValueError(
            f"slots must have a multiple of 16 bytes, room for a block of {block_bytes}, not {described(slots)}"
        )
    check_metadata("slot_ids", slot_ids, (num_rows,))
    check_metadata("offsets", offsets, (num_rows,))
    check_tensor("bad_rows", bad_rows, torch.uint8, (num_rows,))
    return code


@triton.jit
def _norm_rope_kernel(
    qkv, q_weight, k_weight, rope_table, positions, slots, slot_ids, offsets, bad_rows,
    num_heads, num_kv_heads, max_positions, slot_bytes, eps,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, TAIL: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """A run of heads of one row. Tensors of heads are [HEADS, D/2]: the low and the high half of each."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF)
    num_rotated = num_heads + num_kv_heads
    if TAIL is None:
        exists = head < num_rotated
    else:
        slot = tl.load(slot_ids + row).to(tl.int64)
        exists = (head < num_rotated + num_kv_heads) & (tl.broadcast_to(slot, [HEADS]) >= 0)
    source = qkv + (row * (num_rotated + num_kv_heads) + head[:, None]) * HEAD_DIM + columns[None, :]
    low = to_f32(tl.load(source, mask=exists[:, None], other=0.0))
    high = to_f32(tl.load(source + HALF, mask=exists[:, None], other=0.0))

    mean = tl.sum(low * low + high * high, axis=1) * (1.0 / HEAD_DIM)  # exact: a power of two
    inverse = tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))[:, None]
    is_q = (head < num_heads)[:, None]
    normed_low = _normed(low, inverse, q_weight + columns, k_weight + columns, is_q, DTYPE)
    normed_high = _normed(high, inverse, q_weight + HALF + columns, k_weight + HALF + columns, is_q, DTYPE)
    position = tl.load(positions + row)
    spread = tl.broadcast_to(position, [HALF])  # before it is compared: the interpreter spreads no truth values
    known = (spread >= 0) & (spread < max_positions)
    angle = rope_table + position * HEAD_DIM + columns
    cos = to_f32(tl.load(angle, mask=known, other=0.0))[None, :]
    sin = to_f32(tl.load(angle + HALF, mask=known, other=0.0))[None, :]
    rotated_low = rounded(normed_low * cos, DTYPE) - rounded(normed_high * sin, DTYPE)
    rotated_high = rounded(normed_high * cos, DTYPE) + rounded(normed_low * sin, DTYPE)
    SCALE: tl.constexpr = HEAD_DIM**-0.5
    turned_low = butterflies(rotated_low + rotated_high, HALF) * SCALE
    turned_high = butterflies(rotated_low - rotated_high, HALF) * SCALE
    if TAIL is None:
        store_rounded(source, turned_low, exists[:, None])
        store_rounded(source + HALF, turned_high, exists[:, None])
    else:
        store_rounded(source, turned_low, exists[:, None] & is_q)
        store_rounded(source + HALF, turned_high, exists[:, None] & is_q)
        is_v = head >= num_rotated
        stored_low = tl.where(is_v[:, None], low, rounded(turned_low, DTYPE))
        stored_high = tl.where(is_v[:, None], high, rounded(turned_high, DTYPE))
        goes_out = (exists & (head >= num_heads))[:, None]
        magnitude = tl.maximum((bits_of(stored_low) & 0x7FFFFFFF).to(tl.int32),
                               (bits_of(stored_high) & 0x7FFFFFFF).to(tl.int32))  # fmt: skip
        peak = tl.max(tl.max(tl.where(goes_out, magnitude, 0), axis=1), axis=0)
        LIMIT: tl.constexpr = BF16_OVERFLOW_BITS if TAIL == BF16 else INFINITY_BITS
        tl.store(bad_rows + row, tl.full([], 1, tl.uint8), mask=peak >= LIMIT)
        STORED: tl.constexpr = tl.bfloat16 if TAIL == BF16 else tl.float32
        panel = 2 * (head - tl.where(is_v, num_rotated, num_heads)) + is_v.to(tl.int32)  # K head 0, V head 0, K head 1
        token = panel * BLOCK_TOKENS + tl.load(offsets + row)
        block = (slots + slot * slot_bytes).to(tl.pointer_type(STORED))
        target = block + token[:, None] * HEAD_DIM + columns[None, :]
        store_rounded(target, stored_low, goes_out)
        store_rounded(target + HALF, stored_high, goes_out)


@triton.jit
def _normed(half, inverse, q_weight, k_weight, is_q, DTYPE: tl.constexpr):
    """Half of each head times the inverse of its norm, rounded, then times the weight of its kind, rounded."""
    weight = tl.where(is_q, to_f32(tl.load(q_weight))[None, :], to_f32(tl.load(k_weight))[None, :])
    return rounded(rounded(half * inverse, DTYPE) * weight, DTYPE)
