"""Prefill on a CUDA device: layers on one stream, their KV encoded and copied out on another.

The compute stream never waits for the wire: after each layer's K and V it records an event and goes on. The side stream
packs them into blocks and copies the blocks into pinned staging pages, layer behind layer until a page is full; a
thread waits for the full ones and hands them on, a frame each. When all pages are on the wire, launching stops until
one comes back: prefill slows down, memory does not grow.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from hmad.compute.attention import causal_attention
from hmad.compute.cuda_buffers import ALIGN_BYTES, brought, pinned
from hmad.compute.cuda_faults import fatal_faults
from hmad.compute.cuda_graphs import LayerGraphs
from hmad.compute.cuda_sampler import sample_once
from hmad.compute.device import (
    EncodedBlocks,
    KVHistory,
    LayerClock,
    Outcome,
    PackedChunks,
    PrefillChunk,
    PrefillObserver,
    PrefillResult,
    PrefillSequence,
    non_finite,
)
from hmad.compute.model import Projected, Qwen3
from hmad.compute.sampler import SamplerInput
from hmad.compute.staging import StagingPool
from hmad.facts.errors import HmadError, LocalError
from hmad.facts.formats import KVFormat, KVGeometry
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad_kernels.triton_pack import pack_blocks

MOST_LAYERS = 12  # of a frame: a third of Qwen3-8B's, so that most of a short prompt leaves while it is computed
ROWS_TOLD = 2048  # times layers: about a millisecond of work, and whoever watches over progress waits for no page


@dataclass(frozen=True)
class BlockRun:
    """A run of a sequence's blocks in the packed output of one format, and the batch's rows that they hold."""

    sequence: PrefillSequence
    first_row: int
    num_rows: int
    first_position: int
    first_packed: int  # block of the packed output
    num_blocks: int

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_rows)

    @property
    def packed(self) -> slice:
        return slice(self.first_packed, self.first_packed + self.num_blocks)


@dataclass(frozen=True)
class FormatPlan:
    """What one launch of the pack kernel does for all sequences of a batch that ship in the same format."""

    format: KVFormat
    blocks: Tensor  # int32 [num_blocks, 2] on the device: first row, number of rows
    packed: Tensor  # uint8 [num_blocks, block_bytes] on the device: of one layer after the other
    runs: tuple[BlockRun, ...]


@dataclass(frozen=True)
class PackedLayer:
    """A layer of the batch whose K and V are packed."""

    layer_id: int
    started: torch.cuda.Event
    kv_ready: torch.cuda.Event


@dataclass
class FilledPage:
    """A run of blocks, of one layer behind the other, in a staging page."""

    run: BlockRun
    format: KVFormat
    page: int
    first_layer: int
    num_layers: int = 0

    @property
    def layers(self) -> slice:
        return slice(self.first_layer, self.first_layer + self.num_layers)


@dataclass(frozen=True)
class Shipment:
    """Layers and pages that are there after ``done``, every page behind its layers."""

    parts: list[PackedLayer | FilledPage]
    done: torch.cuda.Event


class CudaPrefill:
    """Prefill on one CUDA device. Called by one thread; the observer hears from another, before ``prefill`` returns."""

    def __init__(
        self, model: Qwen3, geometry: KVGeometry, staging: StagingPool, max_batch_tokens: int = LayerGraphs.MAX_ROWS
    ) -> None:
        self.model = model
        self.geometry = geometry
        self.staging = staging
        self._device = model.device
        self.compute_stream = torch.cuda.Stream(self._device)
        self.side_stream = torch.cuda.Stream(self._device)
        self._graphs = LayerGraphs(model, max_batch_tokens)
        torch.cuda.synchronize(self._device)  # what was made on the default stream is there for ours

    def new_history(self, num_tokens: int) -> KVHistory:
        return KVHistory(self.geometry, num_tokens, self.model.dtype, self._device)

    def warm_up(self, formats: Sequence[KVFormat]) -> None:
        """Have every kernel compiled, and libraries choose theirs, before the first request waits for it."""
        with fatal_faults, torch.inference_mode(), torch.cuda.stream(self.compute_stream):
            self._graphs.capture_all()
        for fmt in formats:
            sequence = PrefillSequence(range(fmt.tokens_per_block), SamplingParams(max_tokens=2), (0,), fmt)
            observer = PrefillObserver(lambda blocks: self.staging.release(blocks.page), lambda clock: None)
            self.prefill([PrefillChunk(sequence, sequence.num_remaining)], observer)

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> PrefillResult:
        """Launch one packed forward pass; while the device computes, ship each layer's blocks as they come."""
        with fatal_faults, torch.cuda.stream(self.compute_stream):
            batch = Batch(self, chunks, observer)
            try:
                forward = self._graphs.forward if len(batch.token_ids) <= self._graphs.max_rows else self.model.forward
                hidden = forward(batch.token_ids, batch.positions, batch.attend, batch.layer_begins)
                outcomes = self._sample_first(batch.packed, hidden)
            except Exception:
                self.side_stream.synchronize()  # before what it reads is given to others
                raise
            finally:
                batch.ship_rest()
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
        for sequence, drawn in outcomes.items():  # what is wrong with its KV is known by now, and comes first
            sequence.error = sequence.error or next((o for o in drawn if isinstance(o, HmadError)), None)
        return PrefillResult(
            {s: [o for o in drawn if isinstance(o, SampledToken)] for s, drawn in outcomes.items() if not s.error}
        )

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


@dataclass(frozen=True)
class AttentionRun:
    """One launch of attention: whole prompts that lie end to end, or one later chunk over its own and earlier KV."""

    rows: slice
    cut: PrefillChunk | None
    q_bounds: Tensor  # int32 [n + 1]: where each sequence's queries begin
    k_bounds: Tensor
    longest_q: int
    longest_k: int


class Batch:
    """One batch on its way through the layers."""

    def __init__(self, device: CudaPrefill, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> None:
        self._prefill = device
        self.packed = PackedChunks(chunks)
        place = device.model.device
        self.token_ids = self.packed.token_ids.to(place)
        self.positions = self.packed.positions.to(place)
        self._plans = plan_formats(self.packed, device.staging.page_bytes, device.geometry, place)
        num_rows = len(self.token_ids)
        self._bad_rows = pinned((device.geometry.num_layers, -(-num_rows // ALIGN_BYTES) * ALIGN_BYTES), torch.uint8)
        self._runs = plan_attention(self.packed, place)
        self._started = torch.cuda.Event(enable_timing=True)
        self._packed: torch.cuda.Event | None = None  # of the layer before
        self._filling: dict[BlockRun, FilledPage] = {}  # pages with room for another layer
        self._shipper = Shipper(device, observer, clock_of(device.compute_stream), self._bad_rows.numpy())

    def layer_begins(self, layer_id: int) -> None:
        self._started = torch.cuda.Event(enable_timing=True)
        self._started.record()

    def attend(self, layer_id: int, rows: Projected) -> Tensor:
        """Attention of one layer; its K and V are on their way out before it begins."""
        q, k, v = self._prefill.model.heads(rows)
        self._ship(layer_id, k, v)
        return self._attend(layer_id, q, k, v)

    def ship_rest(self) -> None:
        """Wait until the last page is handed on."""
        self._close_pages()
        self._shipper.finish()

    def _ship(self, layer_id: int, k: Tensor, v: Tensor) -> None:
        """Encode this layer's blocks on the side stream, copy them into staging pages, and send off what is full."""
        kv_ready = torch.cuda.Event(enable_timing=True)
        kv_ready.record()
        if self._packed is not None:  # the layer before last: its K and V may be overwritten by the next layer
            self._prefill.compute_stream.wait_event(self._packed)
        side = self._prefill.side_stream
        bad_rows = self._bad_rows[layer_id, : len(k)]
        with torch.cuda.stream(side):
            side.wait_event(kv_ready)
            for plan in self._plans:
                pack_blocks(plan.format.name, k, v, plan.blocks, plan.packed, bad_rows)
            self._packed = torch.cuda.Event()
            self._packed.record()
            self._shipper.add(PackedLayer(layer_id, self._started, kv_ready))
            for plan in self._plans:
                for run in plan.runs:
                    if not (run.sequence.cancelled or run.sequence.error):
                        self._copy(plan, run, layer_id)
        if layer_id == self._prefill.geometry.num_layers - 1:
            self._close_pages()
        if self._shipper.is_due(len(k)):
            self._shipper.send_off()
        # The allocator is not to give K and V, which the compute stream made, to anyone before the side stream has read
        # them.
        for tensor in (k, v):
            tensor.record_stream(side)

    def _copy(self, plan: FormatPlan, run: BlockRun, layer_id: int) -> None:
        """One layer's run into its page, behind the layers before."""
        staging, blocks = self._prefill.staging, plan.packed[run.packed].view(-1)
        filled = self._filling.get(run)
        if filled is None:
            filled = self._filling[run] = FilledPage(run, plan.format, self._acquire(), layer_id)
        start = filled.num_layers * len(blocks)
        staging.memory[filled.page, start : start + len(blocks)].copy_(blocks, non_blocking=True)
        filled.num_layers += 1
        if filled.num_layers == MOST_LAYERS or start + 2 * len(blocks) > staging.page_bytes:
            self._shipper.add(self._filling.pop(run))

    def _acquire(self) -> int:
        """A page; waits for one while all are on the wire, where then all must be that have anything in them."""
        if not self._prefill.staging.free_pages:
            self._close_pages()
            self._shipper.send_off()
        return self._prefill.staging.acquire()

    def _close_pages(self) -> None:
        """Nothing more comes into pages that are not full."""
        for filled in self._filling.values():
            self._shipper.add(filled)
        self._filling.clear()

    def _attend(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = [self._attend_run(layer_id, run, q[run.rows], k[run.rows], v[run.rows]) for run in self._runs]
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def _attend_run(self, layer_id: int, run: AttentionRun, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        history = run.cut.sequence.history if run.cut else None
        if run.cut is not None and history is not None:
            history.k[layer_id, run.cut.start : run.cut.end] = k
            history.v[layer_id, run.cut.start : run.cut.end] = v
            k, v = history.k[layer_id, : run.cut.end], history.v[layer_id, : run.cut.end]
        return packed_attention(q, k, v, run)


class Shipper:
    """Gathers one batch's layers and pages to shipments, for a thread that waits for each and hands its pages to the
    observer. A shipment wakes thread after thread, and each wants Python's lock from the one that launches.
    """

    def __init__(
        self, device: CudaPrefill, observer: PrefillObserver, clock: "DeviceClock", bad_rows: np.ndarray
    ) -> None:
        """``bad_rows`` uint8 [num_layers, rows of the batch] is what the kernels write."""
        self._staging = device.staging
        self._geometry = device.geometry
        self._side_stream = device.side_stream
        self._observer = observer
        self._clock = clock
        self._bad_rows = bad_rows
        self._gathered: list[PackedLayer | FilledPage] = []
        self._shipments: SimpleQueue[Shipment | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._thread.start()

    def add(self, part: PackedLayer | FilledPage) -> None:
        """Part of the next shipment: the side stream has been asked for it."""
        self._gathered.append(part)

    def is_due(self, num_rows: int) -> bool:
        """Whether a page is full, or layers of so many rows have taken long enough to be told of."""
        has_pages = any(isinstance(part, FilledPage) for part in self._gathered)
        return has_pages or len(self._gathered) * num_rows >= ROWS_TOLD

    def send_off(self) -> None:
        """Make a shipment of what is gathered."""
        if self._gathered:
            done = torch.cuda.Event(blocking=True)  # to be waited for without spinning
            done.record(self._side_stream)
            self._shipments.put(Shipment(self._gathered, done))
            self._gathered = []

    def finish(self) -> None:
        """Send off the rest and wait for all of it. Raises what the device did."""
        try:
            self.send_off()
        finally:
            self._shipments.put(None)
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (shipment := self._shipments.get()) is not None:
            self._try(shipment.done.synchronize)
            for part in shipment.parts:
                self._try(self._tell if isinstance(part, PackedLayer) else self._hand_on, part)

    def _try(self, do: Callable[..., None], *arguments: PackedLayer | FilledPage) -> None:
        """What the device raises fails the batch, when it ends."""
        try:
            do(*arguments)
        except Exception as error:
            self._failure = self._failure or error

    def _tell(self, layer: PackedLayer) -> None:
        started_s, kv_ready_s = self._clock.time_of(layer.started), self._clock.time_of(layer.kv_ready)
        self._observer.layer_computed(LayerClock(layer.layer_id, started_s, kv_ready_s))

    def _hand_on(self, filled: FilledPage) -> None:
        run, sequence = filled.run, filled.run.sequence
        bad = self._bad_rows[filled.layers, run.rows]
        if bad.any():
            layer, row = np.argwhere(bad)[0].tolist()
            sequence.error = sequence.error or non_finite(filled.first_layer + layer, run.first_position + row)
        is_empty = not filled.num_layers  # its first copy could not be launched
        if is_empty or self._failure or sequence.cancelled or sequence.error:
            self._staging.release(filled.page)
        else:
            self._observer.blocks_encoded(self._encoded(filled))

    def _encoded(self, filled: FilledPage) -> EncodedBlocks:
        run, fmt = filled.run, filled.format
        num_bytes = filled.num_layers * run.num_blocks * self._geometry.block_bytes(fmt)
        return EncodedBlocks(
            run.sequence,
            filled.first_layer,
            filled.num_layers,
            run.first_position // fmt.tokens_per_block,
            run.num_blocks,
            filled.page,
            self._staging.page(filled.page)[:num_bytes],
        )


@dataclass(frozen=True)
class DeviceClock:
    """The device's events in monotonic seconds of the host."""

    base: torch.cuda.Event
    base_s: float

    def time_of(self, event: torch.cuda.Event) -> float:
        """When an event that is over happened."""
        return self.base_s + 1e-3 * float(self.base.elapsed_time(event))


def clock_of(stream: torch.cuda.Stream) -> DeviceClock:
    """A clock from now on. Waits until the stream is idle, which it is between batches."""
    base = torch.cuda.Event(enable_timing=True)
    base.record(stream)
    base.synchronize()
    return DeviceClock(base, time.monotonic())


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
    return [attention_run(group, device) for group in groups]


def attention_run(group: Sequence[tuple[PrefillChunk, slice]], device: torch.device) -> AttentionRun:
    chunks = [chunk for chunk, _ in group]
    cut = chunks[0] if chunks[0].sequence.history is not None else None
    q_lengths, k_lengths = [c.num_tokens for c in chunks], [c.end for c in chunks]
    q_bounds, k_bounds = (
        torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(device) for lengths in (q_lengths, k_lengths)
    )
    rows = slice(group[0][1].start, group[-1][1].stop)
    return AttentionRun(rows, cut, q_bounds, k_bounds, max(q_lengths), max(k_lengths))


def plan_formats(packed: PackedChunks, page_bytes: int, geometry: KVGeometry, device: torch.device) -> list[FormatPlan]:
    """Which blocks each format's launch makes of a batch, and which runs of them go into a page together."""
    plans = []
    for fmt in dict.fromkeys(c.sequence.format for c, _ in packed):
        if fmt is None:
            continue
        runs: list[BlockRun] = []
        blocks: list[tuple[int, int]] = []
        run_tokens = page_bytes // geometry.block_bytes(fmt) * fmt.tokens_per_block
        for chunk, rows in packed:
            if chunk.sequence.format is not fmt:
                continue
            for first in range(rows.start, rows.stop, run_tokens):
                num_rows = min(run_tokens, rows.stop - first)
                position = chunk.start + first - rows.start
                num_blocks = fmt.num_blocks(num_rows)
                runs.append(BlockRun(chunk.sequence, first, num_rows, position, len(blocks), num_blocks))
                blocks += [
                    (first + start, min(fmt.tokens_per_block, num_rows - start))
                    for start in range(0, num_rows, fmt.tokens_per_block)
                ]
        packed_blocks = torch.empty((len(blocks), geometry.block_bytes(fmt)), dtype=torch.uint8, device=device)
        on_device = torch.tensor(blocks, dtype=torch.int32).to(device)
        plans.append(FormatPlan(fmt, on_device, packed_blocks, tuple(runs)))
    return plans


def packed_attention(q: Tensor, k: Tensor, v: Tensor, run: AttentionRun) -> Tensor:
    """Causal attention within each sequence of a run, aligned to its last key.

    q [T, num_heads, head_dim], k and v [S, num_kv_heads, head_dim]. Returns [T, num_heads, head_dim].
    """
    if q.dtype == torch.float32:  # flash attention computes in 16 bits
        q_edges, k_edges = run.q_bounds.tolist(), run.k_bounds.tolist()
        spans = zip(pairwise(q_edges), pairwise(k_edges), strict=True)
        return torch.cat([causal_attention(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in spans])
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, run.q_bounds, run.k_bounds, run.longest_q, run.longest_k, 0.0, True, False
    )[0]
    return out
