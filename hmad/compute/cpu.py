"""The CPU device: prefill in any precision (native or exactly emulated), decode over raw blocks."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.functional import linear

from hmad.compute.arena import Arena
from hmad.compute.attention import causal_attention
from hmad.compute.batch import DecodeBatch
from hmad.compute.device import (
    EncodedBlocks,
    KVHistory,
    LayerClock,
    Outcomes,
    PackedChunks,
    PrefillChunk,
    PrefillObserver,
    PrefillResult,
    non_finite,
)
from hmad.compute.linears import Linear, make_down, make_linear
from hmad.compute.model import Projected, Qwen3
from hmad.compute.sampler import SamplerInput, sample
from hmad.compute.sequence import DecodeSequence
from hmad.compute.staging import StagingPool
from hmad.facts.errors import HmadError, LocalError
from hmad.facts.formats import KVFormat, KVGeometry
from hmad.facts.sampling import SampledToken
from hmad_kernels import cpu_append, cpu_attention, cpu_pack, cpu_rows, cpu_sampling
from hmad_kernels.cpu_append import append_kv
from hmad_kernels.cpu_attention import AttentionPlan, scratch_shape
from hmad_kernels.cpu_pack import pack_blocks


def warm_up() -> None:
    """Have every kernel compiled, or read from the cache, before the first request waits for it."""
    for kernels in (cpu_append, cpu_attention, cpu_pack, cpu_rows, cpu_sampling):
        kernels.warm_up()


class CpuBackend:
    """The CPU's linear layers and row kernels. In int8 each row leaves its kernel quantized for the linear after it."""

    device = torch.device("cpu")
    final_norm = staticmethod(cpu_rows.add_rms_norm)
    qk_norm_rope = staticmethod(cpu_rows.qk_norm_rope)

    def __init__(self, precision: str) -> None:
        self._precision = precision
        int8 = precision == "int8"
        self.norm = cpu_rows.add_rms_norm_int8 if int8 else cpu_rows.add_rms_norm
        self.silu_mul = cpu_rows.silu_mul_int8 if int8 else cpu_rows.silu_mul
        self.product = linear

    def make_linear(self, *parts: torch.Tensor) -> Linear:
        return make_linear(self._precision, *parts)

    def make_down(self, *parts: torch.Tensor) -> Linear:
        return make_down(self._precision, *parts)

    def angles(self, rope_table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return rope_table.index_select(0, positions)


class CpuPrefill:
    """Prefill on the CPU. Encoding runs on the engine's thread, right after K and V exist and before attention. Each
    layer leaves by itself: to compute one takes longer than a frame costs.
    """

    def __init__(self, model: Qwen3, geometry: KVGeometry, staging: StagingPool) -> None:
        self.model = model
        self.geometry = geometry
        self.staging = staging

    def new_history(self, num_tokens: int) -> KVHistory:
        return KVHistory(self.geometry, num_tokens, self.model.dtype)

    def prefill(self, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> PrefillResult:
        """Pack the chunks into one forward pass; ship each layer's blocks as soon as its K and V exist."""
        packed = PackedChunks(chunks)
        started_s: dict[int, float] = {}

        def before_layer(layer_id: int) -> None:
            started_s[layer_id] = time.monotonic()

        def attend(layer_id: int, projected: Projected) -> torch.Tensor:
            q, k, v = self.model.heads(projected)
            observer.layers_computed(LayerClock(range(layer_id, layer_id + 1), started_s[layer_id], time.monotonic()))
            for chunk, rows in packed:
                self._ship(chunk, layer_id, k[rows], v[rows], observer)
            outs = [self._attend(chunk, layer_id, q[rows], k[rows], v[rows]) for chunk, rows in packed]
            return torch.cat(outs) if len(outs) > 1 else outs[0]

        hidden = self.model.forward(packed.token_ids, packed.positions, attend, before_layer)
        result = self._sample_first(packed, hidden)
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
        return result

    def _ship(
        self, chunk: PrefillChunk, layer_id: int, k: torch.Tensor, v: torch.Tensor, observer: PrefillObserver
    ) -> None:
        """Encode one chunk's K and V of one layer into staging pages, a frame's worth each, and hand them over."""
        sequence = chunk.sequence
        if sequence.format is None:
            return
        for first_token, last_token, num_blocks in self._frames(sequence.format, chunk.num_tokens):
            if sequence.cancelled or sequence.error:
                return
            page = self.staging.acquire()
            size = num_blocks * self.geometry.block_bytes(sequence.format)
            payload = self.staging.page(page)[:size]
            rows = slice(first_token, last_token)
            out = torch.from_numpy(payload).view(num_blocks, -1)
            bad_rows = pack_blocks(sequence.format.name, k[rows], v[rows], out)
            if bad_rows:
                self.staging.release(page)
                sequence.error = non_finite(layer_id, chunk.start + first_token + bad_rows[0])
                return
            first_block = (chunk.start + first_token) // sequence.format.tokens_per_block
            observer.blocks_encoded(EncodedBlocks(sequence, layer_id, 1, first_block, num_blocks, page, payload))

    def _frames(self, fmt: KVFormat, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """(first token, end token, blocks) of each frame: as many whole blocks as fit into a staging page."""
        blocks = self.staging.page_bytes // self.geometry.block_bytes(fmt)
        for first in range(0, num_tokens, blocks * fmt.tokens_per_block):
            last = min(num_tokens, first + blocks * fmt.tokens_per_block)
            yield first, last, fmt.num_blocks(last - first)

    def _attend(
        self, chunk: PrefillChunk, layer_id: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attention of one chunk over its own and, for a later chunk, the earlier KV, unquantized."""
        history = chunk.sequence.history
        if history is None and not (chunk.start == 0 and chunk.is_last):
            raise LocalError("a prompt that is cut into chunks came without a history")
        if history is not None:
            history.k[layer_id, chunk.start : chunk.end] = k
            history.v[layer_id, chunk.start : chunk.end] = v
            k, v = history.k[layer_id, : chunk.end], history.v[layer_id, : chunk.end]
        return causal_attention(q, k, v)

    def _sample_first(self, packed: "PackedChunks", hidden: torch.Tensor) -> PrefillResult:
        """Token 0 of every choice of the sequences that are complete and well."""
        last = [(c.sequence, rows.stop - 1) for c, rows in packed if c.is_last and not c.sequence.error]
        if not last:
            return PrefillResult()
        logits = self.model.logits(hidden[[row for _, row in last]])  # [num_last, vocab]
        result = PrefillResult()
        for (sequence, _), row in zip(last, logits, strict=True):
            choices = [SamplerInput(sequence.params, seed, 0, sequence.prompt_token_ids, ()) for seed in sequence.seeds]
            outcomes = sample(row.expand(len(choices), -1), choices)
            errors = [o for o in outcomes if isinstance(o, HmadError)]
            if errors:
                sequence.error = errors[0]
            else:
                result.first_tokens[sequence] = [o for o in outcomes if isinstance(o, SampledToken)]
        return result


class CpuDecode:
    """Decode on the CPU: attention reads the arena's raw bytes and expands them one panel at a time in scratch."""

    def __init__(self, model: Qwen3, arena: Arena, tail_format: KVFormat, num_threads: int) -> None:
        config = model.config
        self.model = model
        self.arena = arena
        self.scratch = torch.empty(scratch_shape(num_threads, config.num_heads, config.num_kv_heads, config.head_dim))
        self._tail_format = tail_format
        self._sm_scale = config.head_dim**-0.5

    runs_ahead = False  # the step is this thread's own work: there is nothing to hide

    def launch(self, batch: DecodeBatch) -> Callable[[], Outcomes]:
        outcomes = self._step(batch)
        return lambda: outcomes

    def _step(self, batch: DecodeBatch) -> Outcomes:
        """Feed each sequence's newest token, append its KV to the tail, attend over all segments, sample."""
        batch.settle()  # sampling reads the outputs
        plan = self._plan(batch)
        tail_slots, tail_offsets = (torch.from_numpy(x) for x in batch.tail_places)
        errors: dict[int, HmadError] = {}

        def attend(layer_id: int, projected: Projected) -> torch.Tensor:
            q, k, v = self.model.heads(projected)
            slots = self.arena.layer(layer_id)
            for row in append_kv(k, v, slots, tail_slots, tail_offsets, self._tail_format.name):
                errors.setdefault(row, non_finite(layer_id, int(batch.positions[row])))
            return self.attend(plan, q, slots)

        token_ids, positions = torch.from_numpy(batch.newest_tokens), torch.from_numpy(batch.positions)
        logits = self.model.logits(self.model.forward(token_ids, positions, attend))  # float32 [B, vocab]
        outcomes = sample(logits, [sampler_input(sequence) for sequence in batch.sequences])
        return Outcomes.of([errors.get(row, outcome) for row, outcome in enumerate(outcomes)])

    def attend(self, plan: AttentionPlan, q: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """One layer's attention over every segment: q [B, num_heads, head_dim], slots [num_slots, slot_bytes]."""
        out = torch.empty(q.shape, dtype=q.dtype)
        plan.run(q.contiguous(), slots, out, self._sm_scale)
        return out

    def _plan(self, batch: DecodeBatch) -> AttentionPlan:
        geometry = self.arena.geometry
        return AttentionPlan.build(
            torch.from_numpy(batch.seq_segments),
            torch.from_numpy(batch.segments),
            torch.from_numpy(batch.block_table),
            self.scratch,
            num_heads=self.model.config.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            num_slots=self.arena.num_slots,
            slot_bytes=geometry.slot_bytes,
        )


def sampler_input(sequence: DecodeSequence) -> SamplerInput:
    """What decides a sequence's next token besides its logits."""
    outputs = sequence.output_token_ids
    return SamplerInput(sequence.params, sequence.seed, len(outputs), sequence.prompt_token_ids, outputs)
