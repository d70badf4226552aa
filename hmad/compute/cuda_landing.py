"""LAYERs into an arena in device memory: received into pinned pages, copied into their slots on a stream of their own.

Every lane has two pages: while one is being copied, the next LAYER is received into the other. One thread issues all
copies in the order of ``store`` and waits for them, so that the event loop never does; whoever reads slots asks it
first, by ``when_stored``.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue

import numpy as np
import torch

from hmad.compute.arena import Arena
from hmad.compute.cuda_buffers import pinned_page
from hmad.facts.errors import LocalError
from hmad.facts.formats import KVFormat
from hmad.facts.logs import get_logger

log = get_logger(__name__)

PAGES_PER_LANE = 2
CLOSE_S = 5.0  # a GPU that hangs is not to keep the process


@dataclass(frozen=True)
class Placed:
    """Where the blocks in a page belong."""

    layers: range
    slots: np.ndarray  # int32, of each of the layers
    offset: int  # bytes into each slot
    block_bytes: int  # of these heads


@dataclass(eq=False)
class Page:
    """Pinned memory of one LAYER."""

    memory: torch.Tensor  # uint8 [layer_bytes], pinned
    is_free: bool = True


@dataclass(frozen=True)
class Copy:
    """A page whose bytes are to go to their slots, and whom to tell when they are there."""

    page: Page
    placed: Placed
    then: Callable[[], object]


class CudaLanding:
    """All lanes into one arena on a CUDA device."""

    def __init__(
        self, arena: Arena, layer_bytes: int, max_bytes: int, on_failure: Callable[[Exception], object]
    ) -> None:
        """``layer_bytes`` is the largest LAYER, ``max_bytes`` bounds the pinned memory of all lanes; ``on_failure``
        hears, on the copying thread, that the device is lost.
        """
        self._arena = arena
        self._layer_bytes = layer_bytes
        self._pages_left = max_bytes // layer_bytes
        self._max_bytes = max_bytes
        self._on_failure = on_failure
        self._spare: list[Page] = []  # of lanes that are gone
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[Copy | Callable[[], object] | None] = SimpleQueue()
        self._stream = torch.cuda.Stream(arena.bytes.device)
        self._scratch = torch.empty(layer_bytes, dtype=torch.uint8, device=arena.bytes.device)
        self._thread = threading.Thread(target=self._run, name="landing", daemon=True)
        self._thread.start()

    def open_lane(self, when_free: Callable[[], object]) -> "CudaLane":
        with self._lock:
            while len(self._spare) < PAGES_PER_LANE and self._pages_left:
                self._spare.append(self._new_page())
                self._pages_left -= 1
            if len(self._spare) < PAGES_PER_LANE:
                raise LocalError(
                    f"this decode node has no landing memory for one more bulk channel: raise its --landing-bytes of "
                    f"{self._max_bytes}, or lower --bulk-connections of the prefill nodes"
                )
            pages = [self._spare.pop() for _ in range(PAGES_PER_LANE)]
        return CudaLane(self._arena, pages, self._jobs.put, when_free, self._take_back)

    def _new_page(self) -> Page:
        try:
            return Page(pinned_page(self._layer_bytes))
        except RuntimeError as error:
            raise LocalError(f"no {self._layer_bytes} bytes of pinned memory for a bulk channel: {error}") from error

    def when_stored(self, then: Callable[[], object]) -> None:
        self._jobs.put(then)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(CLOSE_S)

    def _take_back(self, pages: list[Page]) -> None:
        """Pages of a lane that is gone, once nothing reads them any more."""

        def keep() -> None:
            with self._lock:
                self._spare += pages

        self._jobs.put(keep)

    def _run(self) -> None:
        try:
            with torch.cuda.stream(self._stream):
                while (job := self._jobs.get()) is not None:
                    self._copy(job) if isinstance(job, Copy) else job()
        except Exception as error:
            log.exception("copying KV into the arena failed")
            self._on_failure(error)

    def _copy(self, job: Copy) -> None:
        placed = job.placed
        num_layers = len(placed.layers)
        num_bytes = num_layers * len(placed.slots) * placed.block_bytes
        blocks = self._scratch[:num_bytes]
        blocks.copy_(job.page.memory[:num_bytes], non_blocking=True)
        blocks = blocks.view(num_layers, len(placed.slots), placed.block_bytes)
        layers = self._arena.bytes[placed.layers.start : placed.layers.stop]
        columns = slice(placed.offset, placed.offset + placed.block_bytes)
        for first, last in runs(placed.slots):
            start = int(placed.slots[first])
            layers[:, start : start + last - first, columns].copy_(blocks[:, first:last])
        self._stream.synchronize()
        job.page.is_free = True
        job.then()


class CudaLane:
    """One bulk connection's two pages, taken in turns."""

    def __init__(
        self,
        arena: Arena,
        pages: list[Page],
        submit: Callable[[Copy], None],
        when_free: Callable[[], object],
        give_back: Callable[[list[Page]], None],
    ) -> None:
        self._arena = arena
        self._pages = pages
        self._turn = 0
        self._submit, self._when_free, self._give_back = submit, when_free, give_back
        self._placed: Placed

    @property
    def is_free(self) -> bool:
        return self._page.is_free

    @property
    def _page(self) -> Page:
        return self._pages[self._turn]

    def place(
        self, layers: range, slots: np.ndarray, fmt: KVFormat, first_head: int, num_heads: int
    ) -> list[memoryview]:
        if not self.is_free:
            raise LocalError("a LAYER was to be received over one that is still being copied")
        geometry = self._arena.geometry
        offset, size = geometry.block_bytes(fmt, first_head), geometry.block_bytes(fmt, num_heads)
        self._placed = Placed(layers, slots, offset, size)
        return [self._page.memory.numpy().data[: len(layers) * len(slots) * size]]

    def store(self) -> None:
        page = self._page
        page.is_free = False
        self._turn = (self._turn + 1) % len(self._pages)
        self._submit(Copy(page, self._placed, self._when_free))

    def close(self) -> None:
        self._give_back(self._pages)


def runs(slots: np.ndarray) -> list[tuple[int, int]]:
    """[first, last) index ranges of consecutive slot ids."""
    cuts = np.flatnonzero(np.diff(slots) != 1) + 1
    edges = [0, *cuts.tolist(), len(slots)]
    return list(pairwise(edges))
