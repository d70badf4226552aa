"""Append each sequence's newest token to its tail block on the GPU, as raw ``bf16`` or ``fp32``.

The reference twin is ``append_kv`` of ``cpu_attention``: the same arguments, but nothing is read back. Limit: one
launch; a batch of 256 moves one megabyte.
"""

import torch
import triton
import triton.language as tl

from hmad_kernels.triton_common import (
    BF16,
    BF16_OVERFLOW_BITS,
    INFINITY_BITS,
    TOKENS_PER_BLOCK,
    bits_of,
    check_head_dim,
    check_metadata,
    check_place,
    check_rows,
    format_code,
    panel_bytes,
    store_rounded,
    to_f32,
)

APPEND_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


def append_kv(
    format_name: str,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    slot_ids: torch.Tensor,
    offsets: torch.Tensor,
    bad_rows: torch.Tensor,
) -> None:
    """Write row b of k and v into block slot_ids[b] as its token offsets[b] (both int32 [batch], on the device).

    k and v are both bfloat16 or both float32 [batch, num_kv_heads, head_dim], every row beginning at a multiple of 16
    bytes; slots uint8 [num_slots, slot_bytes]. The ids and offsets are not checked here. ``bad_rows`` uint8 [batch]
    becomes 1 where the format cannot hold a row, and is left alone elsewhere. Raises ValueError on what does not fit.
    """
    if format_name not in ("fp32", "bf16"):
        raise ValueError(f"a tail is fp32 or bf16, not {format_name!r}")
    code = format_code(format_name)
    check_rows(k, v)
    check_head_dim(k.shape[2])
    batch, num_heads, head_dim = k.shape
    check_metadata("slot_ids", slot_ids, (batch,))
    check_metadata("offsets", offsets, (batch,))
    block_bytes = 2 * num_heads * panel_bytes(code, head_dim)
    if slots.dtype != torch.uint8 or slots.dim() != 2 or slots.shape[1] % 16 or not slots.is_contiguous():
        raise ValueError(f"slots must be contiguous uint8 [num_slots, multiple of 16], not {list(slots.shape)}")
    if slots.shape[1] < block_bytes:
        raise ValueError(f"a block of {block_bytes} bytes does not fit into a slot of {slots.shape[1]}")
    if bad_rows.dtype != torch.uint8 or tuple(bad_rows.shape) != (batch,) or not bad_rows.is_contiguous():
        raise ValueError(f"bad_rows must be contiguous uint8 [{batch}], not {bad_rows.dtype} {list(bad_rows.shape)}")
    check_place({"k": k, "v": v, "slots": slots, "slot_ids": slot_ids, "offsets": offsets, "bad_rows": bad_rows})
    _append_kernel[(batch * num_heads,)](
        k, v, slots, slot_ids, offsets, bad_rows,
        num_heads, k.stride(0), k.stride(1), v.stride(0), v.stride(1), slots.stride(0),
        **append_constants(code, head_dim), **APPEND_OPTIONS,
    )  # fmt: skip


def append_constants(code: int, head_dim: int) -> dict[str, int]:
    """The compile-time constants of the kernel."""
    return {"FORMAT": code, "HEAD_DIM": head_dim, "BLOCK_TOKENS": TOKENS_PER_BLOCK[code]}


@triton.jit
def _append_kernel(
    k, v, slots, slot_ids, offsets, bad_rows,
    num_heads, k_token_stride, k_head_stride, v_token_stride, v_head_stride, out_stride,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One head of one sequence."""
    row = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    columns = tl.arange(0, HEAD_DIM)
    k_row = to_f32(tl.load(k + row * k_token_stride + head * k_head_stride + columns))
    v_row = to_f32(tl.load(v + row * v_token_stride + head * v_head_stride + columns))
    largest = tl.maximum((bits_of(k_row) & 0x7FFFFFFF).to(tl.int32), (bits_of(v_row) & 0x7FFFFFFF).to(tl.int32))
    LIMIT: tl.constexpr = BF16_OVERFLOW_BITS if FORMAT == BF16 else INFINITY_BITS
    tl.store(bad_rows + row, tl.full([], 1, tl.uint8), mask=tl.max(largest, axis=0) >= LIMIT)
    STORED: tl.constexpr = tl.bfloat16 if FORMAT == BF16 else tl.float32
    block = (slots + tl.load(slot_ids + row).to(tl.int64) * out_stride).to(tl.pointer_type(STORED))
    target = block + (2 * head * BLOCK_TOKENS + tl.load(offsets + row)) * HEAD_DIM + columns
    store_rounded(target, k_row, columns < HEAD_DIM)
    store_rounded(target + BLOCK_TOKENS * HEAD_DIM, v_row, columns < HEAD_DIM)
