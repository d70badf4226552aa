"""The KV plane on real sockets: both ends in this process, all of them but the engines; then everything that breaks."""

import asyncio
import logging
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import xxhash

from hmad.compute.arena import Arena
from hmad.compute.landing import HostLanding, Landing
from hmad.compute.sequence import DecodeSequence
from hmad.compute.staging import StagingPool
from hmad.facts.errors import RemoteError, RemoteProtocolError, TransferAborted
from hmad.facts.formats import FORMATS, KVFormat, KVGeometry
from hmad.facts.sampling import SampledToken
from hmad.facts.timeline import LayerTimes, Timeline
from hmad.roles.decode import DecodeCounters, DecodeRole
from hmad.roles.decode_engine import StepOutput
from hmad.transport import bulk as bulk_sending
from hmad.transport import decode_listener, liveness, prefill_link
from hmad.transport.bulk import BulkSender, OutgoingLayer
from hmad.transport.bulk_receiver import BulkReceiver
from hmad.transport.clock import ClockOffset
from hmad.transport.connection import tune
from hmad.transport.decode_listener import DecodeListener, DecodeSession, ListenerSettings
from hmad.transport.lease import Denied, Lease, StagedBlocks
from hmad.transport.liveness import DEAD_AFTER_S
from hmad.transport.prefill_link import LinkSettings, PeerLink, connect_socket
from hmad.transport.rate import MAX_LATENESS_S, Pacer
from hmad.wire import messages as m
from hmad.wire.frames import DIGEST_NONE, DIGEST_XXH3, NO_DIGEST, FrameReader, FrameWriter, encode_frame
from hmad.wire.handshake import NodeIdentity, PrefillHandshake
from hmad.wire.prefill_transfers import PrefillTransfers
from hmad.wire.transfers import root_digest

HOST = "127.0.0.1"
GEOMETRY = KVGeometry(num_layers=3, num_kv_heads=4, head_dim=64)
LIMITS = m.Limits(layer_bytes=1 << 24, reserve_bytes=1 << 16, tokens_bytes=1 << 20)
NUM_SLOTS = 96
LEASE_S = 30.0
BFP8 = FORMATS["bfp8"]
CHOICE = m.Choice(index=0, seed=1, first_token=5)
PATIENCE_S = 5.0


# --- the two ends ---


def identity(role: str, **changes: Any) -> NodeIdentity:
    node = NodeIdentity(
        node_id=role,
        boot_id=secrets.token_bytes(16),
        role=role,
        version="0.1.0",
        fingerprint=bytes(32),
        geometry=GEOMETRY,
        first_head=0,
        num_heads=GEOMETRY.num_kv_heads,
        formats=tuple(FORMATS),
        limits=LIMITS,
        digests=(DIGEST_XXH3,) if role == "prefill" else (DIGEST_XXH3, DIGEST_NONE),
    )
    return replace(node, **changes)


def ignore(*_: Any) -> None:
    pass


class StubEngine:
    """Takes note of what joins; a step happens when a test says so."""

    num_waiting = 0
    max_batch_size = 64

    def __init__(self, role: DecodeRole) -> None:
        self._role = role
        self.batch: list[DecodeSequence] = []

    @property
    def num_running(self) -> int:
        return len(self.batch)

    def join_batch(self, sequences: Iterable[DecodeSequence]) -> None:
        self.batch += sequences

    def drop(self, sequences: Iterable[DecodeSequence]) -> None:
        self._end(sequences, None, "cancelled")

    def finish(self, sequences: Iterable[DecodeSequence]) -> None:
        """One step in which all of them end."""
        self._end(sequences, SampledToken(7), "length")

    def _end(self, sequences: Iterable[DecodeSequence], token: SampledToken | None, reason: str) -> None:
        ended = [sequence for sequence in sequences if sequence in self.batch]
        self.batch = [sequence for sequence in self.batch if sequence not in ended]
        outputs = [StepOutput(s, len(s.output_token_ids), token, reason) for s in ended]
        self._role.deliver_from_engine(outputs, ended)


class Decode:
    """A decode node without an engine."""

    def __init__(
        self,
        lease_s: float = LEASE_S,
        key: bytes | None = None,
        landing: Callable[[Arena], Landing] = HostLanding,
        **changes: Any,
    ) -> None:
        self.failures: list[str] = []
        self.rates: list[float] = []
        arena = Arena(GEOMETRY, NUM_SLOTS * GEOMETRY.num_layers * GEOMETRY.slot_bytes)
        self.arena = arena
        self.role = DecodeRole(
            arena,
            landing(arena),
            FORMATS["bf16"],
            4096,
            1000,
            DecodeCounters(ignore, lambda peer, rate: self.rates.append(rate), ignore, self.failures.append),
        )
        self.engine = StubEngine(self.role)
        self.role.engine = cast(Any, self.engine)
        settings = ListenerSettings(identity("decode", **changes), GEOMETRY, key, arena.num_slots, lease_s)
        self.listener = DecodeListener(settings, self.role)
        self.port = free_port()

    @property
    def session(self) -> DecodeSession:
        (session,) = self.listener.sessions.values()
        return session

    @property
    def idle(self) -> bool:
        return self.arena.used_slots == 0

    def stored(self, sequence: DecodeSequence, fmt: KVFormat) -> np.ndarray:
        """uint8 [num_layers, num_blocks, block_bytes] of a sequence's raw prefix."""
        return self.arena.bytes.numpy()[:, sequence.prefix[0].slots, : GEOMETRY.block_bytes(fmt)]


class Proxy:
    """Sits between the nodes; shut gates hold back what is on its way. A session's first connection is its control."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.control, self.bulk = asyncio.Event(), asyncio.Event()
        self.control.set()
        self.bulk.set()
        self._target_port = target_port
        self._num_accepted = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, HOST, self.port)

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def shut(self) -> None:
        """From now on both ends hear nothing of each other."""
        self.control.clear()
        self.bulk.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gate = self.bulk if self._num_accepted else self.control
        self._num_accepted += 1
        there, back = await asyncio.open_connection(HOST, self._target_port)
        for source, sink in ((reader, back), (there, writer)):
            self._tasks.add(asyncio.create_task(pump(source, sink, gate)))


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    try:
        while data := await source.read(1 << 16):
            await gate.wait()
            sink.write(data)
            await sink.drain()
    except OSError:
        pass
    finally:
        sink.close()


class Pair:
    """A prefill node's link and the decode node at its other end."""

    def __init__(self, decode: Decode, proxy: Proxy, link: PeerLink) -> None:
        self.decode, self.proxy, self.link = decode, proxy, link

    async def lease(self, num_blocks: int, num_choices: int = 1, max_tokens: int = 3) -> Lease:
        """Granted room for a prompt of so many whole blocks."""
        session = self.link.session
        num_tokens = num_blocks * FORMATS[session.agreement.format].tokens_per_block
        message = reserve(session.agreement.format, num_tokens, num_choices, max_tokens)
        times = {layer_id: LayerTimes(0.0, 0.0) for layer_id in range(GEOMETRY.num_layers)}
        lease = session.reserve(message, bytes(4 * num_tokens), Timeline("r", num_tokens, 0.0, 0.0, layers=times))
        await asyncio.wait_for(lease.granted(), PATIENCE_S)
        return lease

    async def commit(self, lease: Lease, *choices: m.Choice) -> list[DecodeSequence]:
        """Commit, and wait until the choices have joined."""
        before = list(self.decode.engine.batch)
        lease.commit(choices or (CHOICE,))
        await until(lambda: len(self.decode.engine.batch) == len(before) + len(choices or (CHOICE,)))
        return [sequence for sequence in self.decode.engine.batch if sequence not in before]

    async def works(self) -> None:
        """A whole transfer comes through, and every slot comes back."""
        used = self.decode.arena.used_slots
        lease = await self.lease(num_blocks=4)
        send(lease, random_kv(4, FORMATS[lease.format]))
        sequences = await self.commit(lease)
        self.decode.engine.finish(sequences)
        assert (await asyncio.wait_for(lease.next_token(), PATIENCE_S))[0].token_id == 7
        await until(lambda: self.decode.arena.used_slots == used)
        self.decode.role.check_integrity()


@asynccontextmanager
async def serving(decode: Decode) -> AsyncIterator[None]:
    await decode.listener.start(HOST, decode.port)
    try:
        yield
    finally:
        await decode.listener.stop("the test ends")


@asynccontextmanager
async def linked(port: int, rate: float | None = None, bulks: int = 1, **changes: Any) -> AsyncIterator[PeerLink]:
    """A prefill node's link to a port, which may or may not come to anything."""
    key = changes.pop("key", None)
    settings = LinkSettings(identity("prefill", **changes), key, bulks, Pacer(rate), 1 << 20, lambda error: None)
    link = PeerLink(HOST, port, settings, lambda: None)
    task = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def pair(
    fmt: KVFormat = BFP8,
    lease_s: float = LEASE_S,
    landing: Callable[[Arena], Landing] = HostLanding,
    **link_options: Any,
) -> AsyncIterator[Pair]:
    decode = Decode(lease_s, landing=landing)
    proxy = Proxy(decode.port)
    async with serving(decode):
        await proxy.start()
        try:
            async with linked(proxy.port, formats=(fmt.name,), **link_options) as link:
                await until(lambda: link.usable)
                yield Pair(decode, proxy, link)
        finally:
            await proxy.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event, by design
            await asyncio.sleep(0.005)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


# --- KV to send ---


def reserve(format_name: str, num_tokens: int, num_choices: int = 1, max_tokens: int = 3) -> m.Reserve:
    sampling = m.Sampling(max_tokens, 0.0, 1.0, 0, 0.0, 0.0, 0.0, 1.0)
    return m.Reserve(secrets.token_bytes(16), 0, format_name, num_tokens, num_choices, sampling)


def random_kv(num_blocks: int, fmt: KVFormat = BFP8, seed: int = 0) -> np.ndarray:
    """uint8 [num_layers, num_blocks, block_bytes]."""
    shape = (GEOMETRY.num_layers, num_blocks, GEOMETRY.block_bytes(fmt))
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


Released = Counter[tuple[int, int]]  # how often the page of (first layer, first block) was given back


def frame(kv: np.ndarray, layers: range, first: int, count: int, released: Released | None = None) -> StagedBlocks:
    payload = kv[layers.start : layers.stop, first : first + count]
    counts: Released = Counter() if released is None else released
    release = partial(counts.update, [(layers.start, first)])
    extent, raw = (layers.start, len(payload), first, payload.shape[1]), payload.reshape(-1)
    return StagedBlocks(*extent, raw.data, 0.0, release)


def frames(kv: np.ndarray, per_frame: int, released: Released | None = None, num_layers: int = 1) -> list[StagedBlocks]:
    return [
        frame(kv, range(first_layer, first_layer + num_layers), first, per_frame, released)
        for first_layer in range(0, kv.shape[0], num_layers)
        for first in range(0, kv.shape[1], per_frame)
    ]


def send(lease: Lease, kv: np.ndarray, per_frame: int = 3) -> Released:
    """Hand over every frame; the pages that came back."""
    released: Released = Counter()
    for blocks in frames(kv, per_frame, released):
        lease.send_blocks(blocks)
    return released


def digest_of(payload: Any) -> bytes:
    return xxhash.xxh3_128_digest(payload)


def all_once(released: Released, kv: np.ndarray, per_frame: int = 3) -> bool:
    return released == Counter((b.first_layer, b.first_block) for b in frames(kv, per_frame))


# --- bytes land where they belong ---


@pytest.mark.parametrize("bulks", [1, 3])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
async def test_sequences_land_bit_exact_side_by_side(fmt: KVFormat, bulks: int) -> None:
    async with pair(fmt, bulks=bulks) as p:
        kvs = [random_kv(7, fmt, seed) for seed in range(3)]
        leases = [await p.lease(7) for _ in kvs]
        released: list[Released] = [Counter() for _ in kvs]
        in_turn = zip(*(frames(kv, 3, r) for kv, r in zip(kvs, released, strict=True)), strict=True)
        for turn in in_turn:
            for lease, blocks in zip(leases, turn, strict=True):
                lease.send_blocks(blocks)
        for lease, kv in zip(leases, kvs, strict=True):
            (sequence,) = await p.commit(lease)
            np.testing.assert_array_equal(p.decode.stored(sequence, fmt), kv)
        # The sending threads give pages back by way of the loop, and the last may be behind the commit.
        await until(lambda: all(all_once(r, kv) for r, kv in zip(released, kvs, strict=True)))
        p.decode.role.check_integrity()


@pytest.mark.parametrize("num_layers", [2, GEOMETRY.num_layers])
async def test_layers_in_one_frame_land_in_their_slots(num_layers: int) -> None:
    """Into slots that others have left gaps between; what the timeline says of such layers is the same."""
    async with pair() as p:
        leases = [await p.lease(5) for _ in range(12)]
        for lease in leases[::2]:
            lease.close()
        await until(lambda: p.decode.arena.used_slots == 6 * 6)
        kv, released = random_kv(40), Counter()
        lease = await p.lease(40)
        sent = frames(kv, 15, released, num_layers)
        for blocks in sent:
            lease.send_blocks(blocks)
        (sequence,) = await p.commit(lease)
        assert np.any(np.diff(sequence.prefix[0].slots) != 1)
        np.testing.assert_array_equal(p.decode.stored(sequence, BFP8), kv)
        await until(lambda: released == Counter((b.first_layer, b.first_block) for b in sent))
        times = lease._timeline.layers
        assert {layer.wire_bytes for layer in times.values()} == {kv[0].nbytes}
        assert all(layer.sent_s and layer.verified_s for layer in times.values())
        p.decode.role.check_integrity()


async def test_scattered_slots_are_filled_in_order() -> None:
    async with pair() as p:
        leases = [await p.lease(5) for _ in range(12)]
        for lease in leases[::2]:
            lease.close()
        await until(lambda: p.decode.arena.used_slots == 6 * 6)
        (sequence,) = await transfer(p, kv := random_kv(40))
        assert np.any(np.diff(sequence.prefix[0].slots) != 1)
        np.testing.assert_array_equal(p.decode.stored(sequence, BFP8), kv)


async def transfer(p: Pair, kv: np.ndarray) -> list[DecodeSequence]:
    lease = await p.lease(kv.shape[1])
    send(lease, kv, per_frame=16)
    return await p.commit(lease)


async def test_a_request_that_cannot_fit_is_denied() -> None:
    async with pair() as p:
        with pytest.raises(Denied) as denied:
            await p.lease(NUM_SLOTS)
        assert denied.value.reason is m.DenyReason.NEVER_FITS
        await p.works()


async def test_choices_that_end_in_one_step_all_hear_of_it() -> None:
    async with pair() as p:
        lease = await p.lease(4, num_choices=3)
        send(lease, random_kv(4))
        sequences = await p.commit(lease, *(m.Choice(index, 1, 5) for index in range(3)))
        p.decode.engine.finish(sequences)
        entries = [(await asyncio.wait_for(lease.next_token(), PATIENCE_S))[0] for _ in sequences]
        assert [entry.choice for entry in entries] == [0, 1, 2]
        await until(lambda: p.decode.idle)
        await p.works()


# --- a prefill node driven by hand ---


class HandDriven:
    """Says exactly what a test wants, right or wrong."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._identity = identity("prefill", formats=("bfp8",))
        self._session = secrets.token_bytes(16)
        self._readers: dict[m.Channel, tuple[asyncio.StreamReader, FrameReader]] = {}
        self._writers: dict[m.Channel, asyncio.StreamWriter] = {}
        self.frames = {channel: FrameWriter() for channel in m.Channel}
        self._inbox: list[m.AnyMessage] = []

    async def open(self) -> None:
        for channel in (m.Channel.CONTROL, m.Channel.BULK):
            handshake = PrefillHandshake(self._identity, self._session, channel, None)
            reader, self._writers[channel] = await asyncio.open_connection(HOST, self._port)
            frame_reader = FrameReader(LIMITS, lambda layer, size: [])
            self._readers[channel] = (reader, frame_reader)
            await self.send(handshake.hello, channel=channel)
            (welcome,) = frame_reader.feed(await reader.read(4096))
            await self.send(handshake.receive(welcome), channel=channel)
            frame_reader.authenticated = True
            if channel is m.Channel.CONTROL:
                await self.receive(m.Load)

    async def send(self, message: m.AnyMessage, payload: bytes = b"", channel: m.Channel = m.Channel.CONTROL) -> None:
        await self.write(self.frames[channel].encode(message, payload) + payload, channel)

    async def write(self, data: bytes, channel: m.Channel = m.Channel.BULK) -> None:
        self._writers[channel].write(data)
        await self._writers[channel].drain()

    async def receive(self, kind: type[Any]) -> Any:
        """The next message of a kind; others are dropped."""
        reader, frame_reader = self._readers[m.Channel.CONTROL]
        async with asyncio.timeout(PATIENCE_S):
            while True:
                while self._inbox:
                    if isinstance(message := self._inbox.pop(0), kind):
                        return message
                data = await reader.read(1 << 16)
                if not data:
                    raise EOFError
                self._inbox += [received.message for received in frame_reader.feed(data)]

    async def ended(self) -> bool:
        """Whether the decode node closes the session, and sooner than for our silence."""
        start_s = time.monotonic()
        with suppress(EOFError, ConnectionError):
            await self.receive(m.Welcome)  # never comes
        return time.monotonic() - start_s < DEAD_AFTER_S / 2

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


@asynccontextmanager
async def by_hand() -> AsyncIterator[tuple[Decode, HandDriven]]:
    decode = Decode()
    async with serving(decode):
        hand = HandDriven(decode.port)
        try:
            await hand.open()
            yield decode, hand
        finally:
            hand.close()


async def granted(hand: HandDriven, num_blocks: int) -> m.Reserve:
    message = reserve("bfp8", num_blocks * 32)
    await hand.send(message, bytes(4 * num_blocks * 32))
    await hand.receive(m.Grant)
    return message


def layer_of(message: m.Reserve, payload: bytes, layer_id: int, blocks: range, heads: range) -> m.Layer:
    where = (layer_id, 1, blocks.start, len(blocks), heads.start, len(heads))
    return m.Layer(message.transfer_id, message.epoch, *where, digest_of(payload))


async def test_ranges_of_heads_land_beside_each_other() -> None:
    async with by_hand() as (decode, hand):
        message = await granted(hand, num_blocks=3)
        kv = random_kv(3)
        by_head = kv.reshape(GEOMETRY.num_layers, 3, GEOMETRY.num_kv_heads, -1)
        places = [
            (layer_id, blocks, heads)
            for layer_id in range(GEOMETRY.num_layers)
            for blocks in (range(0, 2), range(2, 3))
            for heads in (range(0, 1), range(1, 4))
        ]
        Random(0).shuffle(places)
        digests = {}
        for layer_id, blocks, heads in places:
            payload = by_head[layer_id, blocks.start : blocks.stop, heads.start : heads.stop].tobytes()
            digests[layer_id, blocks.start, heads.start] = digest_of(payload)
            await hand.send(layer_of(message, payload, layer_id, blocks, heads), payload, m.Channel.BULK)
        landed = [await hand.receive(m.Landed) for _ in places]
        assert [(x.first_layer, x.first_block, x.first_head) for x in landed] == list(digests)
        await hand.send(m.Commit(message.transfer_id, 0, (CHOICE,), len(places), root_digest(digests)))
        await hand.receive(m.Committed)
        np.testing.assert_array_equal(decode.stored(decode.engine.batch[0], BFP8), kv)


@pytest.mark.parametrize("fault", ["twice", "outside", "never granted", "on control", "control on bulk"])
async def test_what_a_peer_may_not_send_ends_its_session_alone(fault: str) -> None:
    async with by_hand() as (decode, hand), linked(decode.port, formats=("bfp8",)) as link:
        await until(lambda: link.usable)
        message = await granted(hand, num_blocks=1)
        payload = random_kv(1)[0].tobytes()
        layer = layer_of(message, payload, 0, range(1), range(4))
        if fault == "outside":
            layer = layer_of(message, payload, 0, range(1, 2), range(4))
        elif fault == "never granted":
            layer = layer_of(reserve("bfp8", 32), payload, 0, range(1), range(4))
        if fault == "control on bulk":
            await hand.send(m.Ping(0.0), channel=m.Channel.BULK)
        else:
            channel = m.Channel.CONTROL if fault == "on control" else m.Channel.BULK
            await hand.send(layer, payload, channel)
        if fault == "twice":
            await hand.send(layer, payload, m.Channel.BULK)
        assert await hand.ended()
        await until(lambda: len(decode.listener.sessions) == 1)
        assert decode.idle
        assert link.usable


# --- staging ---


async def test_a_page_is_reused_only_when_the_kernel_has_all_of_it() -> None:
    """Two pages under a reader that stalls; whoever gives one back has it overwritten at once."""
    num_frames, num_bytes = 8, 1 << 20
    async with stalled_socket() as (sock, reader):
        bulk = BulkSender(sock, Pacer(None), DIGEST_XXH3)
        sender = asyncio.create_task(bulk.run())
        pages = [bytearray(num_bytes) for _ in range(2)]
        free: asyncio.Queue[bytearray] = asyncio.Queue()
        for page in pages:
            free.put_nowait(page)

        def reuse(page: bytearray) -> None:
            page[:] = b"\xff" * num_bytes
            free.put_nowait(page)

        async def engine() -> None:
            for number in range(num_frames):
                page = await free.get()
                page[:] = bytes([number]) * num_bytes
                layer = m.Layer(bytes(16), 0, number, 1, 0, 1, 0, 4, NO_DIGEST)
                bulk.put(OutgoingLayer(layer, memoryview(page), ignore, partial(reuse, page)))

        working = asyncio.create_task(engine())
        await asyncio.sleep(0.1)
        assert not working.done()
        assert bulk.backlog <= len(pages)
        layers = await asyncio.to_thread(read_layers, reader, num_frames, num_bytes)
        sender.cancel()
        await asyncio.gather(working, sender, return_exceptions=True)
    assert [(layer.first_layer, layer.digest == digest) for layer, digest in layers] == [
        (n, True) for n in range(num_frames)
    ]


@asynccontextmanager
async def stalled_socket() -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """A connection whose other end nobody reads, with little room in the kernel."""
    with socket.create_server((HOST, 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock = await connect_socket(HOST, server.getsockname()[1])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        with server.accept()[0] as reader:
            reader.settimeout(PATIENCE_S)
            yield sock, reader


@pytest.mark.parametrize("rate", [None, 1000.0], ids=["nobody reads", "waits for its turn"])
async def test_a_sender_that_is_closed_ends_its_thread_and_gives_every_page_back(rate: float | None) -> None:
    async with stalled_socket() as (sock, _):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)  # else the kernel ends it after a while, too
        bulk = BulkSender(sock, Pacer(rate), DIGEST_XXH3)
        sender = asyncio.create_task(bulk.run())
        returned: list[int] = []
        for number in range(3):
            layer = m.Layer(bytes(16), 0, number, 1, 0, 1, 0, 4, bytes(16))
            bulk.put(OutgoingLayer(layer, memoryview(bytes(1 << 22)), ignore, partial(returned.append, number)))
        await asyncio.sleep(0.05)
        assert returned == []
        assert bulk.backlog == 3
        sender.cancel()
        await asyncio.wait([sender], timeout=PATIENCE_S)
        assert sender.cancelled()
        await until(lambda: not bulk._thread.is_alive())
        bulk.put(OutgoingLayer(layer, memoryview(b""), ignore, partial(returned.append, 3)))
        assert (returned, bulk.backlog) == ([0, 1, 2, 3], 0)


async def test_a_peer_that_resets_ends_the_sender_with_an_error() -> None:
    async with stalled_socket() as (sock, reader):
        bulk = BulkSender(sock, Pacer(None), DIGEST_XXH3)
        sender = asyncio.create_task(bulk.run())
        layer = m.Layer(bytes(16), 0, 0, 1, 0, 1, 0, 4, bytes(16))
        bulk.put(OutgoingLayer(layer, memoryview(bytes(1 << 22)), ignore, ignore))
        await asyncio.to_thread(reader.recv, 1 << 10)
        reader.close()
        with pytest.raises(OSError, match=r"reset|pipe"):
            await asyncio.wait_for(sender, PATIENCE_S)
        await until(lambda: not bulk._thread.is_alive())


async def test_a_capped_frame_is_on_the_wire_as_long_as_the_cap_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is a single slice, which waits for its turn and then leaves at once. Its digest takes none of that
    time."""
    rate, num_bytes = 4e4, 4000  # a tenth of a second: a thread that starts late is late by little
    happened: list[str] = []
    digest, skip_idle = bulk_sending.payload_digest, Pacer.skip_idle

    def digest_it(name: str, payload: memoryview) -> bytes:
        happened.append("digested")
        return digest(name, payload)

    def begin_to_count(pacer: Pacer) -> None:
        happened.append("begun to count")
        skip_idle(pacer)

    async with stalled_socket() as (sock, _):
        pacer = Pacer(rate)
        bulk = BulkSender(sock, pacer, DIGEST_XXH3)
        sender = asyncio.create_task(bulk.run())
        layer = OutgoingLayer(
            m.Layer(bytes(16), 0, 0, 1, 0, 1, 0, 4, bytes(16)), memoryview(bytes(num_bytes)), ignore, ignore
        )
        await asyncio.sleep(0.05)  # the thread waits for a frame
        pacer.skip_idle()
        monkeypatch.setattr(bulk_sending, "payload_digest", digest_it)
        monkeypatch.setattr(Pacer, "skip_idle", begin_to_count)
        bulk.put(layer)
        await until(lambda: bulk.backlog == 0)
        assert happened[0] == "digested"
        assert layer.sent_s - layer.begun_s >= 0.75 * num_bytes / rate  # less what passed since the cap began to count
        sender.cancel()
        await asyncio.wait([sender], timeout=PATIENCE_S)


async def test_a_report_that_fails_ends_the_sender_and_keeps_no_other_from_being_heard() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async with stalled_socket() as (sock, reader):
        reader.close()
        bulk = BulkSender(sock, Pacer(None), DIGEST_XXH3)
        sender = asyncio.create_task(bulk.run())
        returned: list[int] = []
        for number in range(2):
            layer = m.Layer(bytes(16), 0, number, 1, 0, 1, 0, 4, bytes(16))
            bulk.put(OutgoingLayer(layer, memoryview(bytes(64)), fail, partial(returned.append, number)))
        await asyncio.sleep(0)
        while bulk._thread.is_alive():  # all that it has to report waits for a loop that is late
            bulk._queue.put(None)
            bulk._thread.join(PATIENCE_S)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(sender, PATIENCE_S)
        assert (sorted(returned), bulk.backlog) == ([0, 1], 0)


async def test_a_sender_that_is_cancelled_twice_still_ends() -> None:
    async with stalled_socket() as (sock, _):
        bulk = BulkSender(sock, Pacer(None), DIGEST_XXH3)
        sender = asyncio.create_task(bulk.run())
        await asyncio.sleep(0.01)
        sender.cancel()
        await asyncio.sleep(0)
        sender.cancel()
        await asyncio.wait([sender], timeout=PATIENCE_S)
        await until(bulk._ended.done)
        assert bulk._ended.result() is None


class PlayedSession:
    """Carries one lease; the test is the thread that sends."""

    peer_name, num_kv_heads, clock = "played", GEOMETRY.num_kv_heads, ClockOffset()
    load = m.Load(free_slots=1, total_slots=1, running=0, waiting=0)

    def __init__(self) -> None:
        self.transfers = PrefillTransfers()
        self.said: list[m.AnyMessage] = []
        self.layers: list[OutgoingLayer] = []

    def send(self, message: m.AnyMessage, payload: bytes | None = None) -> None:
        self.said.append(message)

    def send_layer(self, layer: OutgoingLayer) -> None:
        self.layers.append(layer)

    def forget(self, lease: Lease) -> None:
        pass


async def played_lease() -> tuple[PlayedSession, Lease, Released]:
    """Granted; three LAYERs are queued, one a layer."""
    session, message = PlayedSession(), reserve("bfp8", 32)
    times = {layer_id: LayerTimes(0.0, 0.0) for layer_id in range(GEOMETRY.num_layers)}
    lease = Lease(session, message, b"", Timeline("r", 32, 0.0, 0.0, layers=times))
    lease.granted_by_peer(m.Grant(message.transfer_id, 0, LEASE_S))
    return session, lease, send(lease, random_kv(1))


async def test_an_abort_counts_what_has_begun_to_leave_though_nobody_said_so_yet() -> None:
    """The sending thread has taken one LAYER, and its report is on its way; the others shall not leave any more."""
    session, lease, released = await played_lease()
    first, *others = session.layers
    assert first.take()
    lease.close()
    assert isinstance(abort := session.said[-1], m.Abort)
    assert abort.num_frames == 1
    assert not any(layer.take() for layer in others)
    assert released == Counter([(1, 0), (2, 0)])
    first.begun()
    first.sent()
    assert all_once(released, random_kv(1))
    assert session.said[-1] is abort


async def test_landed_may_overtake_the_report_that_a_layer_has_begun() -> None:
    session, lease, released = await played_lease()
    first, *others = session.layers
    assert first.take()
    landed = m.Landed(lease.transfer_id, 0, 0, 1, 0, 1, 0, GEOMETRY.num_kv_heads, 1.0, 1.0)
    lease.landed(landed)
    assert not released, "the kernel may still read it"
    first.begun()
    first.sent()
    assert released == Counter([(0, 0)])
    with pytest.raises(RemoteProtocolError, match="matches no LAYER on its way"):
        lease.landed(msgspec.structs.replace(landed, first_layer=1))
    assert not others[0].take()  # such a peer's session ends: nothing more leaves


async def test_commit_waits_for_the_last_layer_to_begin() -> None:
    session, lease, _ = await played_lease()
    lease.commit([CHOICE])
    for layer in session.layers:
        assert not isinstance(session.said[-1], m.Commit)
        assert layer.take()
        layer.begun()
    assert isinstance(commit := session.said[-1], m.Commit)
    assert commit.num_frames == 3


def read_layers(sock: socket.socket, count: int, num_bytes: int) -> list[tuple[m.Layer, bytes | None]]:
    """Receive LAYERs; each with the digest of what came."""
    reader = FrameReader(LIMITS, lambda layer, size: [memoryview(bytearray(size))])
    reader.authenticated = True
    layers: list[tuple[m.Layer, bytes | None]] = []
    while len(layers) < count:
        received = reader.advance(sock.recv_into(reader.get_buffer()))
        if received is not None:
            layers.append((cast(m.Layer, received.message), received.digest))
    return layers


async def test_full_staging_holds_the_engine_and_nothing_grows() -> None:
    kv, per_frame = random_kv(60), 2
    frame_bytes = per_frame * GEOMETRY.block_bytes(BFP8)
    staging = StagingPool(4 * frame_bytes, frame_bytes)
    async with pair() as p:
        lease = await p.lease(60)
        loop = asyncio.get_running_loop()
        handed_over: list[tuple[int, int]] = []

        def engine() -> None:
            for blocks in frames(kv, per_frame):
                page = staging.acquire()
                staging.page(page)[:] = np.frombuffer(blocks.payload, np.uint8)
                staged = replace(blocks, payload=staging.page(page).data, release=partial(staging.release, page))
                handed_over.append((blocks.first_layer, blocks.first_block))
                loop.call_soon_threadsafe(lease.send_blocks, staged)
            loop.call_soon_threadsafe(all_given.set)  # behind the blocks, as the engine's last word is

        p.proxy.bulk.clear()
        all_given = asyncio.Event()
        thread = threading.Thread(target=engine)
        thread.start()
        await until(lambda: len(handed_over) == staging.num_pages)
        await asyncio.sleep(0.1)
        assert len(handed_over) == staging.num_pages
        p.proxy.bulk.set()
        await asyncio.wait_for(all_given.wait(), PATIENCE_S)
        thread.join()
        (sequence,) = await p.commit(lease)
        np.testing.assert_array_equal(p.decode.stored(sequence, BFP8), kv)
        await until(lambda: staging.free_pages == staging.num_pages)


# --- the rate cap ---


async def test_the_rate_cap_holds_on_average_and_allows_no_burst() -> None:
    rate, kv = 8e6, random_kv(24)
    slack_bytes = rate * MAX_LATENESS_S + GEOMETRY.block_bytes(BFP8)
    async with pair(rate=rate) as p:
        errors = []
        for _ in range(3):  # a busy machine may be slow, but not three times; it must never be fast
            arrivals = await timed_arrivals(p, kv)
            assert all(size <= rate * at_s + slack_bytes for at_s, size in arrivals)
            errors.append(abs(arrivals[-1][0] / (kv.nbytes / rate) - 1))
            await asyncio.sleep(0.1)  # idle time must not be saved up
            if errors[-1] < 0.05:
                break
        assert min(errors) < 0.25


async def timed_arrivals(p: Pair, kv: np.ndarray) -> list[tuple[float, int]]:
    """(seconds since the first block was handed over, bytes that had landed by then)."""
    lease = await p.lease(kv.shape[1])
    arrivals: list[tuple[float, int]] = []
    start_s = time.monotonic()

    def landed(num_bytes: int) -> None:
        arrivals.append((time.monotonic() - start_s, num_bytes + (arrivals[-1][1] if arrivals else 0)))

    for blocks in frames(kv, per_frame=1):
        lease.send_blocks(replace(blocks, release=partial(landed, blocks.payload.nbytes)))
    await until(lambda: len(arrivals) == kv.shape[0] * kv.shape[1])
    lease.close()
    return arrivals


# --- transfers that end early ---


async def test_frames_in_flight_of_an_aborted_transfer_are_discarded() -> None:
    async with pair() as p:
        neighbour, aborted = await p.lease(4), await p.lease(20)
        kv = random_kv(4, seed=1)
        p.proxy.bulk.clear()
        released = send(aborted, random_kv(20))
        await until(lambda: aborted._num_queued == 0)
        aborted.close()
        await until(lambda: p.decode.arena.used_slots == 4 + 1)
        send(neighbour, kv)
        p.proxy.bulk.set()
        (sequence,) = await p.commit(neighbour)
        np.testing.assert_array_equal(p.decode.stored(sequence, BFP8), kv)
        assert p.decode.session.transfers.num_discarded == len(frames(random_kv(20), 3))
        assert all_once(released, random_kv(20))
        p.decode.role.check_integrity()
        p.decode.session.transfers.check_integrity()


async def test_slots_stay_taken_while_a_frame_is_being_received_into_them() -> None:
    async with by_hand() as (decode, hand):
        message = await granted(hand, num_blocks=1)
        payload = random_kv(1)[0].tobytes()
        data = encode_frame(layer_of(message, payload, 0, range(1), range(4)), payload) + payload
        await hand.write(data[: len(data) // 2])
        await until(lambda: any(t.num_filling for t in decode.session.transfers.live()))
        await hand.send(m.Abort(message.transfer_id, 0, m.AbortReason.CANCELLED, num_frames=1))
        await hand.receive(m.Abort)
        assert not decode.idle
        await hand.write(data[len(data) // 2 :])
        await until(lambda: decode.idle)
        assert decode.session.transfers.num_tombstones == 0


async def test_slots_of_a_lost_session_stay_taken_while_a_thread_may_write_to_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = BulkReceiver.stop
    stops: list[Callable[[], None]] = []
    async with by_hand() as (decode, hand):
        monkeypatch.setattr(BulkReceiver, "stop", lambda *arguments: stops.append(partial(stop, *arguments)))
        await granted(hand, num_blocks=1)
        half = await granted(hand, num_blocks=2)
        payload = random_kv(2)[0].tobytes()
        data = encode_frame(layer_of(half, payload, 0, range(2), range(4)), payload) + payload
        await hand.write(data[: len(data) // 2])
        await until(lambda: any(t.num_filling for t in decode.session.transfers.live()))
        held = decode.role.slots_by_state()["landing_slots"]
        decode.session.end("the test ends it")
        assert not decode.listener.sessions
        assert 0 < decode.arena.used_slots < held
        [stop_thread] = stops
        stop_thread()
        await until(lambda: decode.idle)
        monkeypatch.undo()


@pytest.mark.parametrize("agreed", [DIGEST_XXH3, DIGEST_NONE])
async def test_payloads_are_digested_as_was_agreed(agreed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, bytes]] = []
    digest = bulk_sending.payload_digest

    def watched(name: str, payload: memoryview) -> bytes:
        said.append((name, digest(name, payload)))
        return said[-1][1]

    monkeypatch.setattr(bulk_sending, "payload_digest", watched)
    async with pair(digests=(agreed,)) as p:
        lease, kv = await p.lease(4), random_kv(4)
        send(lease, kv, per_frame=4)
        await p.commit(lease)
    expected = [digest_of(layer.reshape(-1)) if agreed == DIGEST_XXH3 else bytes(16) for layer in kv]
    assert said == [(agreed, each) for each in expected]


async def test_a_wrong_digest_ends_its_transfer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as p:
        neighbour, damaged = await p.lease(4), await p.lease(4)
        send_damaged(damaged, monkeypatch)
        kv = random_kv(4, seed=1)
        send(neighbour, kv)
        with pytest.raises(TransferAborted) as aborted:
            await asyncio.wait_for(damaged.next_token(), PATIENCE_S)
        assert aborted.value.reason == m.AbortReason.DIGEST_MISMATCH
        (sequence,) = await p.commit(neighbour)
        np.testing.assert_array_equal(p.decode.stored(sequence, BFP8), kv)
        assert p.decode.arena.used_slots == 4 + 1


def send_damaged(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that is not what its sender has digested."""
    damaged, digest = frame(random_kv(4), range(1), 0, 4), bulk_sending.payload_digest

    def wrong(name: str, payload: memoryview) -> bytes:
        return bytes(16) if payload is damaged.payload else digest(name, payload)

    monkeypatch.setattr(bulk_sending, "payload_digest", wrong)
    lease.send_blocks(damaged)


async def test_three_wrong_digests_within_a_minute_end_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as p:
        session = p.decode.session
        for strike in range(3):
            assert session.is_open, f"closed after {strike}"
            lease = await p.lease(4)
            send_damaged(lease, monkeypatch)
            with pytest.raises(RemoteError):
                await asyncio.wait_for(lease.next_token(), PATIENCE_S)
        await until(lambda: not session.is_open)
        assert p.decode.idle


async def test_a_lease_without_bytes_expires() -> None:
    async with pair(lease_s=0.2) as p:
        lease = await p.lease(4)
        with pytest.raises(TransferAborted) as aborted:
            await asyncio.wait_for(lease.next_token(), PATIENCE_S)
        assert aborted.value.reason == m.AbortReason.LEASE_EXPIRED
        await until(lambda: p.decode.idle)
        assert p.link.usable


# --- peers that go silent, or away ---


async def test_a_layer_that_stops_half_way_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its control channel goes on to tell that it lives; between two frames a bulk channel may be as silent as it
    likes."""
    monkeypatch.setattr(liveness, "STALL_S", 0.1)
    async with by_hand() as (decode, hand):
        message = await granted(hand, num_blocks=1)
        await asyncio.sleep(0.3)
        assert len(decode.listener.sessions) == 1
        payload = random_kv(1)[0].tobytes()
        await hand.write(encode_frame(layer_of(message, payload, 0, range(1), range(4)), payload) + payload[:100])
        assert await hand.ended()
        await until(lambda: decode.idle)


async def test_silence_is_noticed_on_both_sides() -> None:
    async with pair() as p:
        session = p.link.session
        waiting, decoding = await p.lease(4), await p.lease(4)
        send(decoding, random_kv(4))
        await p.commit(decoding)
        p.proxy.shut()
        released = send(waiting, random_kv(4))
        start_s = time.monotonic()
        for lease in (waiting, decoding):
            with pytest.raises(RemoteError, match="no sign of life"):
                await asyncio.wait_for(lease.next_token(), PATIENCE_S)
        assert 1.2 < time.monotonic() - start_s < 3.0
        await until(lambda: p.decode.idle and not p.decode.listener.sessions)
        assert time.monotonic() - start_s < 3.0
        assert all_once(released, random_kv(4))
        assert not p.link.usable or p.link.session is not session


async def test_a_broken_bulk_connection_ends_the_session_and_returns_every_page() -> None:
    async with pair() as p:
        lease = await p.lease(60)
        p.proxy.bulk.clear()
        released = send(lease, random_kv(60))
        p.decode.session.connections[1].abort(RemoteError("the test breaks it"))
        with pytest.raises(RemoteError):
            await asyncio.wait_for(lease.next_token(), PATIENCE_S)
        await until(lambda: p.decode.idle)
        assert all_once(released, random_kv(60))


async def test_a_link_comes_back_when_its_peer_does() -> None:
    first = Decode()
    async with linked(first.port) as link:
        await until(lambda: "nobody listens" in (link.trouble or ""))
        async with serving(first):
            await until(lambda: link.usable)
            lease = await Pair(first, cast(Any, None), link).lease(4)
        with pytest.raises(RemoteError, match="goodbye"):
            await asyncio.wait_for(lease.next_token(), PATIENCE_S)
        second = Decode()
        second.port = first.port
        async with serving(second):
            await until(lambda: link.usable)
            await Pair(second, cast(Any, None), link).works()


async def test_dialing_backs_off() -> None:
    """0.1 s, 0.2 s, 0.4 s ... between dials, each at least half of it."""
    dials: list[float] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dials.append(time.monotonic())
        writer.close()

    async with await asyncio.start_server(refuse, HOST, port := free_port()), linked(port):
        await until(lambda: len(dials) == 4)
    gaps = np.diff(dials)
    assert all(gap >= least for gap, least in zip(gaps, (0.05, 0.1, 0.2), strict=True))


# --- clocks ---


async def test_the_offset_between_clocks_of_one_machine_is_none() -> None:
    async with pair() as p:
        await until(lambda: p.link.session.clock.known)
        assert abs(p.link.session.clock.offset_s) < 0.05


def test_the_clock_offset_is_that_of_the_quickest_answer() -> None:
    clock = ClockOffset()
    assert clock.offset_s == 0.0
    clock.add(m.Pong(ping_sent_s=10.0, received_s=110.3, sent_s=110.3), now_s=10.4)  # slow on the way there
    clock.add(m.Pong(ping_sent_s=11.0, received_s=111.01, sent_s=111.05), now_s=11.06)
    clock.add(m.Pong(ping_sent_s=12.0, received_s=112.1, sent_s=112.1), now_s=13.0)  # slow on the way back
    assert clock.offset_s == pytest.approx(100.0)
    assert clock.to_ours(150.0) == pytest.approx(50.0)


# --- strangers ---


@pytest.mark.parametrize(
    ("decode", "prefill", "reason"),
    [
        ({}, {"fingerprint": b"x" * 32}, "the models differ"),
        ({"formats": ("bf16",)}, {"formats": ("int8", "bfp8")}, "'int8', 'bfp8'.* accepts 'bf16'"),
        ({}, {"version": "9.9.0"}, "run the same release"),
        ({"key": b"k" * 32}, {}, "cluster key"),
        ({"key": b"k" * 32}, {"key": b"j" * 32}, "cluster key differs"),
    ],
)
async def test_a_refused_link_knows_why(decode: dict[str, Any], prefill: dict[str, Any], reason: str) -> None:
    node = Decode(**decode)
    async with serving(node), linked(node.port, **prefill) as link:
        await until(lambda: link.trouble != "not connected yet")
        assert not link.usable
        with pytest.raises(RemoteError, match=reason):
            _ = link.session


async def test_a_cluster_key_that_both_have_lets_bytes_through() -> None:
    node = Decode(key=b"k" * 32)
    async with serving(node), linked(node.port, key=b"k" * 32) as link:
        await until(lambda: link.usable)
        await Pair(node, cast(Any, None), link).works()


async def test_a_silent_stranger_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_listener, "HANDSHAKE_S", 0.1)
    node = Decode()
    async with serving(node):
        reader, writer = await asyncio.open_connection(HOST, node.port)
        with suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()


async def test_a_port_that_does_not_answer_is_no_decode_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_link, "DIAL_S", 0.1)
    with socket.create_server((HOST, 0)) as mute:
        async with linked(mute.getsockname()[1]) as link:
            await until(lambda: "no answer to the handshake" in (link.trouble or ""))


def beginnings() -> Sequence[bytes]:
    """What strangers and broken peers may start with."""
    hello = encode_frame(PrefillHandshake(identity("prefill"), bytes(16), m.Channel.CONTROL, None).hello)
    random = Random(0)
    noise = [random.randbytes(random.randrange(1, 4096)) for _ in range(10)]
    cut = [hello[: random.randrange(1, len(hello))] for _ in range(10)]
    flipped = [hello[:i] + bytes([hello[i] ^ 1]) + hello[i + 1 :] for i in range(0, len(hello), 17)]
    return [b"GET / HTTP/1.1\r\n\r\n", *noise, *cut, *flipped, hello + hello, encode_frame(m.Ping(1.0))]


async def test_garbage_and_half_frames_disturb_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with pair() as p:
        for data in beginnings():
            _, writer = await asyncio.open_connection(HOST, p.decode.port)
            writer.write(data)
            writer.close()
        await p.works()
        await until(lambda: len(p.decode.listener.sessions) == 1)
    assert all(record.levelno < logging.ERROR for record in caplog.records)  # each was told what is wrong with it


async def test_garbage_on_a_bulk_connection_ends_only_its_session() -> None:
    async with by_hand() as (decode, hand), linked(decode.port) as link:
        await until(lambda: link.usable)
        await granted(hand, num_blocks=4)
        await hand.write(Random(1).randbytes(4096))
        assert await hand.ended()
        await until(lambda: decode.idle)
        await Pair(decode, cast(Any, None), link).works()


def test_no_delay_is_set_on_tcp_sockets_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket() as tcp:
        tune(ours)
        tune(tcp)
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
