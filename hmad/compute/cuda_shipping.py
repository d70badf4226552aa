"""KV on its way out of a CUDA device while later layers compute: packed and copied on a side stream.

The compute stream never waits for the wire: when K and V of a layer, or of a few, are there, it records an event and
goes on. The side stream packs them into blocks and copies the blocks into pinned staging pages, layer behind layer
until a page is full; a thread waits for the full ones and hands them on, a frame each. When all pages are on the wire,
launching stops until one comes back: prefill slows down, memory does not grow.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from hmad.compute.cuda_buffers import pinned
from hmad.compute.device import (
    EncodedBlocks,
    LayerClock,
    PackedChunks,
    PrefillObserver,
    PrefillSequence,
    non_finite,
)
from hmad.compute.staging import StagingPool
from hmad.facts.formats import KVFormat, KVGeometry
from hmad_kernels.triton_pack import pack_blocks

MOST_LAYERS = 12  # of a frame: a third of Qwen3-8B's, so that most of a short prompt leaves while it is computed
LAYER_ROWS_TOLD = 2048  # rows times layers: a millisecond or two of work, and whoever watches it waits for no page


@dataclass(frozen=True)
class BlockRun:
    """A run of a sequence's blocks, of some layers one behind the other, in the packed output of one format; and the
    batch's rows that they hold."""

    sequence: PrefillSequence
    first_row: int
    num_rows: int
    first_position: int
    first_packed: int  # block of the packed output
    num_blocks: int  # of each layer

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_rows)


@dataclass(frozen=True)
class FormatPlan:
    """What one launch of the pack kernel does for all sequences of a batch that ship in the same format."""

    format: KVFormat
    blocks: Tensor  # int32 [num_blocks, 2] on the device: first row, number of rows
    packed: Tensor  # uint8 [num_blocks, block_bytes] on the device: of one launch after the other, all its layers
    runs: tuple[BlockRun, ...]


@dataclass(frozen=True)
class PackedLayers:
    """Layers of the batch whose K and V are packed."""

    layers: range
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

    parts: list[PackedLayers | FilledPage]
    done: torch.cuda.Event


@dataclass(frozen=True)
class Way:
    """Where KV comes from and goes to."""

    device: torch.device
    geometry: KVGeometry
    staging: StagingPool
    compute_stream: torch.cuda.Stream
    side_stream: torch.cuda.Stream


@dataclass(frozen=True)
class Layout:
    """How K and V come: those of so many layers at once, each layer's rows so far behind those of the one before."""

    num_layers: int
    layer_rows: int  # a multiple of what ``bad_rows`` of the pack kernel is aligned to


class Shipping:
    """One batch's KV on its way out, while the batch goes through the layers."""

    def __init__(self, way: Way, packed: PackedChunks, layout: Layout, observer: PrefillObserver) -> None:
        self._way = way
        self._num_rows = len(packed.token_ids)
        self._plans = plan_formats(packed, layout, way)
        self._bad_rows = pinned((way.geometry.num_layers, layout.layer_rows), torch.uint8)
        self._started = torch.cuda.Event(enable_timing=True)
        self._packed: torch.cuda.Event | None = None  # of the layers before
        self._filling: dict[BlockRun, FilledPage] = {}  # pages with room for another layer
        self._shipper = Shipper(way, observer, clock_of(way.compute_stream), self._bad_rows.numpy())

    def layers_begin(self) -> None:
        """The next layers that come are about to be launched."""
        self._started = torch.cuda.Event(enable_timing=True)
        self._started.record()

    def ship(self, layers: range, k: Tensor, v: Tensor) -> None:
        """Encode the blocks of these layers on the side stream, copy them into staging pages, and send off what is
        full. k and v [layers * rows of each, Hkv, D] are there after what has been launched; they may be overwritten by
        what is launched after the next layers have come.
        """
        kv_ready = torch.cuda.Event(enable_timing=True)
        kv_ready.record()
        if self._packed is not None:
            self._way.compute_stream.wait_event(self._packed)
        side = self._way.side_stream
        bad_rows = self._bad_rows[layers.start : layers.stop].view(-1)[: len(k)]
        with torch.cuda.stream(side):
            side.wait_event(kv_ready)
            for plan in self._plans:
                pack_blocks(plan.format.name, k, v, plan.blocks, plan.packed, bad_rows)
            self._packed = torch.cuda.Event()
            self._packed.record()
            self._shipper.add(PackedLayers(layers, self._started, kv_ready))
            for plan in self._plans:
                for run in plan.runs:
                    if not (run.sequence.cancelled or run.sequence.error):
                        self._copy(plan, run, layers)
        if layers.stop == self._way.geometry.num_layers:
            self._close_pages()
        if self._shipper.is_due(self._num_rows):
            self._shipper.send_off()
        # The allocator is not to give K and V, which the compute stream made, to anyone before the side stream has read
        # them.
        for tensor in (k, v):
            tensor.record_stream(side)

    def finish(self) -> None:
        """Wait until the last page is handed on."""
        self._close_pages()
        self._shipper.finish()

    def _copy(self, plan: FormatPlan, run: BlockRun, layers: range) -> None:
        """A run of each layer into its page, behind the layers before."""
        staging, num_blocks = self._way.staging, run.num_blocks
        packed = plan.packed[run.first_packed : run.first_packed + len(layers) * num_blocks].view(len(layers), -1)
        layer_bytes = packed.shape[1]
        most = min(MOST_LAYERS, staging.page_bytes // layer_bytes)
        while len(packed):
            filled = self._filling.get(run)
            if filled is None:
                page, first_layer = self._acquire(), layers.stop - len(packed)
                filled = self._filling[run] = FilledPage(run, plan.format, page, first_layer)
            start = filled.num_layers * layer_bytes
            blocks, packed = packed[: most - filled.num_layers], packed[most - filled.num_layers :]
            staging.memory[filled.page, start : start + blocks.numel()].copy_(blocks.view(-1), non_blocking=True)
            filled.num_layers += len(blocks)
            if filled.num_layers == most:
                self._shipper.add(self._filling.pop(run))

    def _acquire(self) -> int:
        """A page; waits for one while all are on the wire, where then all must be that have anything in them."""
        if not self._way.staging.free_pages:
            self._close_pages()
            self._shipper.send_off()
        return self._way.staging.acquire()

    def _close_pages(self) -> None:
        """Nothing more comes into pages that are not full."""
        for filled in self._filling.values():
            self._shipper.add(filled)
        self._filling.clear()


class Shipper:
    """Gathers one batch's layers and pages to shipments, for a thread that waits for each and hands its pages to the
    observer. A shipment wakes thread after thread, and each wants Python's lock from the one that launches.
    """

    def __init__(self, way: Way, observer: PrefillObserver, clock: "DeviceClock", bad_rows: np.ndarray) -> None:
        """``bad_rows`` uint8 [num_layers, rows of the batch] is what the kernels write."""
        self._staging = way.staging
        self._geometry = way.geometry
        self._side_stream = way.side_stream
        self._observer = observer
        self._clock = clock
        self._bad_rows = bad_rows
        self._gathered: list[PackedLayers | FilledPage] = []
        self._shipments: SimpleQueue[Shipment | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._thread.start()

    def add(self, part: PackedLayers | FilledPage) -> None:
        """Part of the next shipment: the side stream has been asked for it."""
        self._gathered.append(part)

    def is_due(self, num_rows: int) -> bool:
        """Whether a page is full, or layers of so many rows have taken long enough to be told of."""
        num_layers = sum(len(part.layers) for part in self._gathered if isinstance(part, PackedLayers))
        has_pages = any(isinstance(part, FilledPage) for part in self._gathered)
        return has_pages or num_layers * num_rows >= LAYER_ROWS_TOLD

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
                self._try(self._tell if isinstance(part, PackedLayers) else self._hand_on, part)

    def _try(self, do: Callable[..., None], *arguments: PackedLayers | FilledPage) -> None:
        """What the device raises fails the batch, when it ends."""
        try:
            do(*arguments)
        except Exception as error:
            self._failure = self._failure or error

    def _tell(self, packed: PackedLayers) -> None:
        started_s, kv_ready_s = self._clock.time_of(packed.started), self._clock.time_of(packed.kv_ready)
        self._observer.layers_computed(LayerClock(packed.layers, started_s, kv_ready_s))

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


def plan_formats(packed: PackedChunks, layout: Layout, way: Way) -> list[FormatPlan]:
    """Which blocks each format's launch makes of a batch, and which runs of them go into a page together."""
    plans, geometry = [], way.geometry
    for fmt in dict.fromkeys(c.sequence.format for c, _ in packed):
        if fmt is None:
            continue
        runs: list[BlockRun] = []
        blocks: list[tuple[int, int]] = []
        run_tokens = way.staging.page_bytes // geometry.block_bytes(fmt) * fmt.tokens_per_block
        for chunk, rows in packed:
            if chunk.sequence.format is not fmt:
                continue
            for first in range(rows.start, rows.stop, run_tokens):
                num_rows = min(run_tokens, rows.stop - first)
                position = chunk.start + first - rows.start
                runs.append(BlockRun(chunk.sequence, first, num_rows, position, len(blocks), fmt.num_blocks(num_rows)))
                blocks += [
                    (layer * layout.layer_rows + first + start, min(fmt.tokens_per_block, num_rows - start))
                    for layer in range(layout.num_layers)
                    for start in range(0, num_rows, fmt.tokens_per_block)
                ]
        packed_blocks = torch.empty((len(blocks), geometry.block_bytes(fmt)), dtype=torch.uint8, device=way.device)
        on_device = torch.tensor(blocks, dtype=torch.int32).to(way.device)
        plans.append(FormatPlan(fmt, on_device, packed_blocks, tuple(runs)))
    return plans
