"""Prefill on a CUDA device: layers on one stream, their KV encoded and copied out on another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hmad.compute import cuda_attention
from hmad.compute.cuda_buffers import ALIGN_BYTES, brought
from hmad.compute.cuda_faults import fatal_faults
from hmad.compute.cuda_prefill_graphs import PrefillGraphs, Shape
from hmad.compute.cuda_sampler import sample_once
from hmad.compute.cuda_shipping import Layout, Shipping, Way
from hmad.compute.device import (
    KVHistory,
    Outcome,
    PackedChunks,
    PrefillChunk,
    PrefillObserver,
    PrefillResult,
    PrefillSequence,
)
from hmad.compute.model import Projected, Qwen3
from hmad.compute.sampler import SamplerInput
from hmad.compute.staging import StagingPool
from hmad.facts.errors import HmadError
from hmad.facts.formats import KVFormat, KVGeometry
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad_kernels.triton_linear import TUNED_ROWS


class CudaPrefill:
    """Prefill on one CUDA device. Called by one thread; the observer hears from another, before ``prefill`` returns."""

    def __init__(
        self, model: Qwen3, geometry: KVGeometry, staging: StagingPool, max_batch_tokens: int = PrefillGraphs.MAX_ROWS
    ) -> None:
        self.model = model
        self.geometry = geometry
        self.staging = staging
        self._device = model.device
        self._compute_stream = torch.cuda.Stream(self._device)
        self._side_stream = torch.cuda.Stream(self._device)
        self._way = Way(self._device, geometry, staging, self._compute_stream, self._side_stream)
        self._graphs = PrefillGraphs(model, max_batch_tokens)
        torch.cuda.synchronize(self._device)  # what was made on the default stream is there for ours

    def new_history(self, num_tokens: int) -> KVHistory:
        return KVHistory(self.geometry, num_tokens, self.model.dtype, self._device)

    def warm_up(self, formats: Sequence[KVFormat]) -> None:
        """Have every kernel compiled, and libraries choose theirs, before the first request waits for it."""
        with fatal_faults, torch.inference_mode(), torch.cuda.stream(self._compute_stream):
            self._graphs.capture_all()
        observer = PrefillObserver(lambda blocks: self.staging.release(blocks.page), lambda clock: None)
        params = SamplingParams(max_tokens=2)
        for fmt in formats:
            sequence = PrefillSequence(range(fmt.tokens_per_block), params, (0,), fmt)
            self.prefill([PrefillChunk(sequence, sequence.num_remaining)], observer)
        for num_prompts in TUNED_ROWS:  # of the LM head
            sequences = [PrefillSequence([0], params, (0,), None) for _ in range(num_prompts)]
            self.prefill([PrefillChunk(sequence, 1) for sequence in sequences], observer)

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> PrefillResult:
        """Launch one packed forward pass; while the device computes, ship the blocks of its layers as they come."""
        packed = PackedChunks(chunks)
        shape = self._graphs.shape_of(packed)
        aligned_rows = -(-len(packed.token_ids) // ALIGN_BYTES) * ALIGN_BYTES
        layout = shape.layout if shape is not None else Layout(1, aligned_rows)
        with fatal_faults, torch.cuda.stream(self._compute_stream):
            shipping = Shipping(self._way, packed, layout, observer)
            try:
                hidden = self._forward(packed, shape, shipping)
                outcomes = self._sample_first(packed, hidden)
            except Exception:
                self._side_stream.synchronize()  # before what it reads is given to others
                raise
            finally:
                shipping.finish()
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
        for sequence, drawn in outcomes.items():  # what is wrong with its KV is known by now, and comes first
            sequence.error = sequence.error or next((o for o in drawn if isinstance(o, HmadError)), None)
        return PrefillResult(
            {s: [o for o in drawn if isinstance(o, SampledToken)] for s, drawn in outcomes.items() if not s.error}
        )

    def _forward(self, packed: PackedChunks, shape: Shape | None, shipping: Shipping) -> Tensor:
        """Hidden states [T, hidden], captured or launched kernel by kernel."""
        if shape is not None:
            return self._graphs.forward(packed, shape, shipping.layers_begin, shipping.ship)
        token_ids, positions = packed.token_ids.to(self._device), packed.positions.to(self._device)
        runs = cuda_attention.plan_attention(packed, self._device)

        def attend(layer_id: int, rows: Projected) -> Tensor:
            """K and V of the layer are on their way out before its attention begins."""
            q, k, v = self.model.heads(rows)
            shipping.ship(range(layer_id, layer_id + 1), k, v)
            return cuda_attention.attend(layer_id, runs, q, k, v)

        return self.model.forward(token_ids, positions, attend, lambda layer_id: shipping.layers_begin())

    def _sample_first(self, packed: PackedChunks, hidden: Tensor) -> dict[PrefillSequence, list[Outcome]]:
        """Token 0 of every choice of the sequences that are complete."""
        last = [(c.sequence, rows.stop - 1) for c, rows in packed if c.is_last]
        if not last:
            return {}
        rows = brought([row for _, row in last], self._device)
        logits = self.model.logits(hidden.index_select(0, rows))  # [num_last, vocab]
        choices = [(sequence, seed, row) for row, (sequence, _) in enumerate(last) for seed in sequence.seeds]
        inputs = [SamplerInput(s.params, seed, 0, s.prompt_token_ids, ()) for s, seed, _ in choices]
        outcomes: dict[PrefillSequence, list[Outcome]] = {sequence: [] for sequence, _ in last}
        if len(choices) > len(last):
            logits = logits.index_select(0, brought([row for _, _, row in choices], self._device))
        drawn = sample_once(logits, inputs)
        for (sequence, _, _), outcome in zip(choices, drawn, strict=True):
            outcomes[sequence].append(outcome)
        return outcomes
