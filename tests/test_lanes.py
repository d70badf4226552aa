"""LAYERs into memory that the wire cannot reach: the lanes of a GPU's arena on real sockets, with a thread in place of
the GPU that takes its time to empty their pages.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_transport import BFP8, pair, random_kv, send, until

from hmad.compute.arena import Arena
from hmad.compute.cuda_landing import Copy, CudaLane, Page
from hmad.compute.landing import HostLane
from hmad.facts.errors import LocalError
from hmad.facts.formats import KVGeometry
from hmad.transport.decode_listener import DecodeListener

LAYER_BYTES = 1 << 20


class SlowLanding:
    """What CudaLanding does, copying in the host's memory, some pages at once and some after a while."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._jobs: SimpleQueue[Copy | Callable[[], object] | None] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def open_lane(self, when_free: Callable[[], object]) -> CudaLane:
        pages = [Page(torch.empty(LAYER_BYTES, dtype=torch.uint8)) for _ in range(2)]
        return CudaLane(self._arena, pages, self._jobs.put, when_free, lambda pages: None)

    def when_stored(self, then: Callable[[], object]) -> None:
        self._jobs.put(then)

    def close(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        delays = random.Random(0)
        while (job := self._jobs.get()) is not None:
            time.sleep(delays.choice((0.0, 0.0001, 0.0005, 0.002)))
            self._copy(job) if isinstance(job, Copy) else job()

    def _copy(self, job: Copy) -> None:
        placed = job.placed
        blocks = job.page.memory[: len(placed.slots) * placed.block_bytes].view(-1, placed.block_bytes)
        columns = slice(placed.offset, placed.offset + placed.block_bytes)
        self._arena.layer(placed.layer_id)[torch.from_numpy(placed.slots).long(), columns] = blocks
        job.page.is_free = True
        job.then()


@pytest.mark.parametrize("bulks", [1, 3])
async def test_no_layer_is_received_over_one_that_is_still_being_copied(bulks: int) -> None:
    """Bursts of small LAYERs: many are read before the loop hears that a page has come free."""
    async with pair(BFP8, landing=SlowLanding, bulks=bulks) as p:
        for seed in range(6):
            kv = random_kv(60, BFP8, seed)
            lease = await p.lease(60)
            send(lease, kv, per_frame=1)
            (sequence,) = await p.commit(lease)
            np.testing.assert_array_equal(p.decode.stored(sequence, BFP8), kv)
            p.decode.engine.finish([sequence])
        await until(lambda: p.decode.idle)


async def test_a_page_that_comes_free_reopens_only_a_lane_that_has_room() -> None:
    """It may have been told of one page while the next LAYER's, the other one, had already begun to be copied."""
    lane, resumed = SimpleNamespace(is_free=False), []
    told: list[Callable[[], object]] = []
    host = SimpleNamespace(open_lane=lambda when_free: told.append(when_free) or lane)
    listener = DecodeListener(SimpleNamespace(), host)  # type: ignore[arg-type]
    connection = SimpleNamespace(resume=lambda: resumed.append(lane.is_free))
    assert listener.open_lane(connection) is lane  # type: ignore[arg-type, comparison-overlap]
    told[0]()
    await asyncio.sleep(0)
    assert resumed == []
    lane.is_free = True
    told[0]()
    await asyncio.sleep(0)
    assert resumed == [True]


def test_a_lane_that_is_not_free_says_so() -> None:
    geometry = KVGeometry(1, 2, 64)
    arena = Arena(geometry, 4 * geometry.slot_bytes)
    copies: list[Copy] = []
    lane = CudaLane(arena, [Page(torch.empty(LAYER_BYTES, dtype=torch.uint8))] * 1, copies.append, list, list)
    slots = np.array([2], np.int32)
    [view] = lane.place(0, slots, BFP8, 0, 2)
    assert len(view) == sum(len(v) for v in HostLane(arena).place(0, slots, BFP8, 0, 2))
    lane.store()
    assert not lane.is_free
    with pytest.raises(LocalError, match="still being copied"):
        lane.place(0, slots, BFP8, 0, 2)
    copies[0].page.is_free = True
    assert lane.is_free
