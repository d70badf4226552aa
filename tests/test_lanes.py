"""LAYERs into memory that the wire cannot reach: the lanes of a GPU's arena on real sockets, with a thread in place of
the GPU that takes its time to empty their pages.
"""

import asyncio
import random
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from landings import lands_as_on_the_host
from test_transport import BFP8, LIMITS, PATIENCE_S, digest_of, pair, random_kv, send, until

from hmad.compute import cuda_landing
from hmad.compute.arena import Arena
from hmad.compute.cuda_landing import Copy, CudaLanding, CudaLane, Page
from hmad.compute.landing import HostLane
from hmad.facts.errors import LocalError, RemoteError
from hmad.facts.formats import KVGeometry
from hmad.transport.bulk_receiver import BulkReceiver
from hmad.wire.frames import FrameReader, encode_frame
from hmad.wire.messages import Layer

LAYER_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def host_as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(cuda_landing, "pinned_page", lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))


class SlowLanding(CudaLanding):
    """Copies in the host's memory, some pages at once and some after a while."""

    def __init__(self, arena: Arena) -> None:
        self._delays = random.Random(0)
        super().__init__(arena, LAYER_BYTES, 16 * LAYER_BYTES, lambda error: None)

    def _copy(self, job: Copy) -> None:
        time.sleep(self._delays.choice((0.0, 0.0001, 0.0005, 0.002)))
        super()._copy(job)


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


class Handler:
    """A lane that has room when a test says so."""

    has_room = False

    def __init__(self) -> None:
        self.memory = bytearray(4)
        self.begun: list[Layer] = []
        self.landed: list[bytes | None] = []
        self.error: Exception | None = None

    def layer_begins(self, layer: Layer, payload_bytes: int) -> list[memoryview]:
        self.begun.append(layer)
        return [memoryview(self.memory)]

    def layer_landed(self, digest: bytes | None, landed_s: float) -> None:
        self.landed.append(digest)

    def receiver_ended(self, error: Exception) -> None:
        self.error = error


@asynccontextmanager
async def receiving() -> AsyncIterator[tuple[Handler, BulkReceiver, socket.socket]]:
    """The thread of a bulk channel, and the peer's end of it, from which a LAYER comes."""
    ours, peer = socket.socketpair()
    handler = Handler()
    reader = FrameReader(LIMITS, lambda layer, size: receiver.place(layer, size))
    reader.authenticated = True
    receiver = BulkReceiver(ours, reader, handler)
    receiver.start()
    payload = b"abcd"
    with peer:
        peer.sendall(encode_frame(Layer(bytes(16), 0, 0, 1, 0, 1, 0, 4, digest_of(payload)), payload) + payload)
        yield handler, receiver, peer
        receiver.stop(RemoteError("the test ends"))
        await asyncio.wait_for(receiver.ended, PATIENCE_S)


async def test_a_page_that_comes_free_lets_in_only_what_has_room() -> None:
    """It may have been told of one page while the next LAYER's, the other one, had already begun to be copied."""
    async with receiving() as (handler, receiver, _):
        await until(lambda: receiver._question is not None)
        receiver.room_changed()
        assert handler.begun == []
        assert not receiver.in_frame, "it is we who are late"
        handler.has_room = True
        receiver.room_changed()
        await until(lambda: handler.landed == [digest_of(b"abcd")])
        assert bytes(handler.memory) == b"abcd"


async def test_a_thread_that_waits_for_room_ends_when_it_is_told_to() -> None:
    async with receiving() as (handler, receiver, _):
        await until(lambda: receiver._question is not None)
        receiver.stop(RemoteError("enough"))
        await until(lambda: str(handler.error) == "enough")
        await until(lambda: not receiver._thread.is_alive())
        handler.has_room = True
        receiver.room_changed()
        assert handler.begun == []


async def test_a_peer_that_closes_ends_the_thread() -> None:
    async with receiving() as (handler, receiver, peer):
        handler.has_room = True
        peer.close()
        await until(lambda: "closed the connection" in str(handler.error))
        assert len(handler.begun) == len(handler.landed) == 1
        await until(lambda: not receiver._thread.is_alive())


async def test_a_receiver_without_a_thread_says_that_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may have none left; whoever waits for the end of this one must not wait for ever."""

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    async with receiving() as (handler, receiver, _):
        await asyncio.wait_for(asyncio.shield(receiver.ended), PATIENCE_S)
        assert str(handler.error) == "can't start new thread"


def test_blocks_land_in_their_slots_through_lanes() -> None:
    lands_as_on_the_host(torch.device("cpu"))


def test_a_lane_that_is_not_free_says_so() -> None:
    geometry = KVGeometry(1, 2, 64)
    arena = Arena(geometry, 4 * geometry.slot_bytes)
    copies: list[Copy] = []
    lane = CudaLane(arena, [Page(torch.empty(LAYER_BYTES, dtype=torch.uint8))] * 1, copies.append, list, list)
    slots = np.array([2], np.int32)
    [view] = lane.place(range(1), slots, BFP8, 0, 2)
    assert len(view) == sum(len(v) for v in HostLane(arena).place(range(1), slots, BFP8, 0, 2))
    lane.store()
    assert not lane.is_free
    with pytest.raises(LocalError, match="still being copied"):
        lane.place(range(1), slots, BFP8, 0, 2)
    copies[0].page.is_free = True
    assert lane.is_free
