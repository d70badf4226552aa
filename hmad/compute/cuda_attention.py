"""Prefill attention on a CUDA device: prompts that lie end to end in one launch, later chunks of each by themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hmad.compute.attention import causal_attention
from hmad.compute.device import KVHistory, PackedChunks, PrefillChunk
from hmad.facts.errors import LocalError


@dataclass(frozen=True)
class AttentionRun:
    """One launch of attention: whole prompts that lie end to end, or one later chunk over its own and earlier KV."""

    rows: slice
    cut: PrefillChunk | None
    q_bounds: Tensor  # int32 [n + 1]: where each sequence's queries begin
    k_bounds: Tensor
    longest_q: int
    longest_k: int


def plan_attention(packed: PackedChunks, device: torch.device) -> list[AttentionRun]:
    """In the order of their rows: each chunk of a cut prompt by itself, whole prompts between them in one launch."""
    groups: list[list[tuple[PrefillChunk, slice]]] = []
    for chunk, rows in packed:
        is_cut = chunk.sequence.history is not None
        if not is_cut and (chunk.start or not chunk.is_last):
            raise LocalError("a prompt that is cut into chunks came without a history")
        if is_cut or not groups or groups[-1][0][0].sequence.history is not None:
            groups.append([])
        groups[-1].append((chunk, rows))
    return [_run_of(group, device) for group in groups]


def _run_of(group: Sequence[tuple[PrefillChunk, slice]], device: torch.device) -> AttentionRun:
    chunks = [chunk for chunk, _ in group]
    cut = chunks[0] if chunks[0].sequence.history is not None else None
    q_lengths, k_lengths = [c.num_tokens for c in chunks], [c.end for c in chunks]
    q_bounds, k_bounds = (
        torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(device) for lengths in (q_lengths, k_lengths)
    )
    rows = slice(group[0][1].start, group[-1][1].stop)
    return AttentionRun(rows, cut, q_bounds, k_bounds, max(q_lengths), max(k_lengths))


def attend(layer_id: int, runs: Sequence[AttentionRun], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one layer over a batch: q [T, H, D], k and v [T, Hkv, D] -> [T, H, D]. What is cut keeps its K and V
    for the chunks to come.
    """
    outs = []
    for run in runs:
        run_q, run_k, run_v = q[run.rows], k[run.rows], v[run.rows]
        if run.cut is not None and run.cut.sequence.history is not None:
            run_k, run_v = _remembered(run.cut.sequence.history, layer_id, run.cut, run_k, run_v)
        outs.append(packed_attention(run_q, run_k, run_v, run))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _remembered(history: KVHistory, layer_id: int, chunk: PrefillChunk, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of a prompt up to and with this chunk."""
    history.k[layer_id, chunk.start : chunk.end] = k
    history.v[layer_id, chunk.start : chunk.end] = v
    return history.k[layer_id, : chunk.end], history.v[layer_id, : chunk.end]


def packed_attention(q: Tensor, k: Tensor, v: Tensor, run: AttentionRun) -> Tensor:
    """Causal attention within each sequence of a run, aligned to its last key.

    q [T, num_heads, head_dim], k and v [S, num_kv_heads, head_dim]. Returns [T, num_heads, head_dim].
    """
    if not can_be_captured(q.dtype):
        q_edges, k_edges = run.q_bounds.tolist(), run.k_bounds.tolist()
        spans = zip(pairwise(q_edges), pairwise(k_edges), strict=True)
        return torch.cat([causal_attention(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in spans if a < b])
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, run.q_bounds, run.k_bounds, run.longest_q, run.longest_k, 0.0, True, False
    )[0]
    return out


def can_be_captured(dtype: torch.dtype) -> bool:
    """Flash attention computes in 16 bits. In float32 each sequence is computed by itself, and for that the host must
    know how long it is.
    """
    return dtype != torch.float32
