"""A TCP proxy between a prefill node and a decode node that damages, loses and holds back what goes through it.

It runs in a thread of its own and has one loop there, so that tests and scripts of any kind can use it:

    with FaultProxy(decode.stream_port, Once("drop", FrameType.COMMIT)) as proxy:
        prefill = PrefillDaemon(model, [proxy])

It knows hmad's frames only so far as to find where each ends, and to write an altered one with a right checksum. A
**plan** is asked for every frame which fault, if any, befalls it; a **fault** is what is done in place of passing the
frame on. A **black hole** is a cable pulled: nothing comes through, nothing is closed, new connections are not
answered, and when it heals, whoever is still there gets what was held back, as TCP would do.
"""

import asyncio
import enum
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from types import TracebackType
from typing import Any

import msgspec
import xxhash

from hmad.wire.frames import PREFIX_BYTES
from hmad.wire.messages import FrameType

HOST = "127.0.0.1"
FIXED = struct.Struct("<4sBBHIQ")  # magic, version, type, number, header_len, payload_len
HANDSHAKE = {FrameType.HELLO, FrameType.WELCOME, FrameType.AUTH, FrameType.REJECT}
REMEMBERED = 32  # frames of each direction, to replay and to swap with
DELAY_S = 0.4


class To(enum.StrEnum):
    """The end that a frame is on its way to."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True)
class Frame:
    """One frame as it came, or altered."""

    to: To
    fixed: bytes
    checksum: bytes
    header: bytes
    payload: bytes

    @property
    def type(self) -> FrameType:
        return FrameType(self.fixed[5])

    @property
    def number(self) -> int:
        return int(FIXED.unpack(self.fixed)[3])

    @property
    def fields(self) -> dict[str, Any]:
        """The header's map."""
        fields: dict[str, Any] = msgspec.msgpack.decode(self.header)
        return fields

    @property
    def transfer_id(self) -> bytes | None:
        transfer_id: bytes | None = self.fields.get("transfer_id")
        return transfer_id

    @property
    def placement(self) -> tuple[bytes, int]:
        """Of a frame of one transfer: its id, and which of the request's placements it is."""
        return self.fields["transfer_id"], self.fields["epoch"]

    @property
    def data(self) -> bytes:
        return self.fixed + self.checksum + self.header + self.payload

    def saying(self, **changes: Any) -> "Frame":
        """The same frame with other header fields, and a right checksum."""
        return replace(self, header=msgspec.msgpack.encode(self.fields | changes)).sealed()

    def carrying(self, payload: bytes) -> "Frame":
        """The same frame with another payload, and a right checksum."""
        return replace(self, payload=payload).sealed()

    def numbered(self, number: int) -> "Frame":
        """The same frame at another place of its connection."""
        return self if self.type in HANDSHAKE else self.sealed(number % (1 << 16))

    def sealed(self, number: int | None = None) -> "Frame":
        """With lengths, number and checksum that go with the rest."""
        magic, version, kind, old_number, _, _ = FIXED.unpack(self.fixed)
        number = old_number if number is None else number
        fixed = FIXED.pack(magic, version, kind, number, len(self.header), len(self.payload))
        covered = fixed + self.header + (b"" if kind == FrameType.LAYER else self.payload)
        return replace(self, fixed=fixed, checksum=struct.pack("<I", xxhash.xxh32_intdigest(covered)))


async def read_frame(reader: asyncio.StreamReader, to: To) -> Frame:
    prefix = await reader.readexactly(PREFIX_BYTES)
    fixed, checksum = prefix[: FIXED.size], prefix[FIXED.size :]
    _, _, _, _, header_len, payload_len = FIXED.unpack(fixed)
    header = await reader.readexactly(header_len)
    return Frame(to, fixed, checksum, header, await reader.readexactly(payload_len))


class Lane:
    """One direction of one connection, as a fault sees it."""

    def __init__(self, to: To, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, proxy: "FaultProxy") -> None:
        self.to = to
        self.random = proxy.random
        self.earlier = proxy.earlier[to]
        self._reader, self._writer = reader, writer
        self._proxy = proxy
        self.num_extra = 0  # frames that a lying fault has slipped in, less those it took out: later ones count them

    async def next_frame(self) -> Frame:
        """The frame behind the present one."""
        frame = await read_frame(self._reader, self.to)
        self.earlier.append(frame)
        return frame

    async def send(self, *frames: Frame) -> None:
        """As they are; only a lie told before changes their numbers."""
        for frame in frames:
            told = frame.numbered(frame.number + self.num_extra) if self.num_extra else frame
            await self.write(told.data)

    async def write(self, data: bytes) -> None:
        await self._proxy.gates[self.to].wait()
        self._writer.write(data)
        await self._writer.drain()

    def close(self) -> None:
        """Both directions, as a FIN."""
        self._writer.close()

    def reset(self) -> None:
        """At once, as a RST."""
        break_off(self._writer)


def break_off(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# --- faults: what is done in place of passing a frame on ---

Fault = Callable[[Frame, Lane], Awaitable[None]]


def flipped(data: bytes, random: Random) -> bytes:
    """One bit is another."""
    bit = random.randrange(8 * len(data))
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


async def flip_header(frame: Frame, lane: Lane) -> None:
    await lane.send(replace(frame, header=flipped(frame.header, lane.random)))


async def flip_prefix(frame: Frame, lane: Lane) -> None:
    prefix = flipped(frame.fixed + frame.checksum, lane.random)
    await lane.send(replace(frame, fixed=prefix[: FIXED.size], checksum=prefix[FIXED.size :]))


async def flip_payload(frame: Frame, lane: Lane) -> None:
    await lane.send(replace(frame, payload=flipped(frame.payload, lane.random)) if frame.payload else frame)


async def cut(frame: Frame, lane: Lane) -> None:
    await lane.write(frame.data[: len(frame.data) // 2])
    lane.close()


async def reset(frame: Frame, lane: Lane) -> None:
    lane.reset()


async def stall(frame: Frame, lane: Lane) -> None:
    """Half of it, and never a byte more on this connection, which stays open."""
    await lane.write(frame.data[: len(frame.data) // 2])
    await asyncio.Event().wait()


async def drop(frame: Frame, lane: Lane) -> None:
    pass


async def duplicate(frame: Frame, lane: Lane) -> None:
    await lane.send(frame, frame)


async def reorder(frame: Frame, lane: Lane) -> None:
    await lane.send(await lane.next_frame(), frame)


async def delay(frame: Frame, lane: Lane) -> None:
    """Less than any patience: nothing comes of it."""
    await asyncio.sleep(DELAY_S)
    await lane.send(frame)


async def replay(frame: Frame, lane: Lane) -> None:
    """Some frame of long ago comes again before this one."""
    await lane.send(lane.random.choice(lane.earlier), frame)


async def lie_drop(frame: Frame, lane: Lane) -> None:
    """Lost, and the numbers of those that follow do not tell: as if the peer itself were mistaken."""
    lane.num_extra -= 1


async def lie_duplicate(frame: Frame, lane: Lane) -> None:
    await lane.send(frame)
    lane.num_extra += 1
    await lane.send(frame)


async def lie_replay(frame: Frame, lane: Lane) -> None:
    old = lane.random.choice([old for old in lane.earlier if old.type is frame.type])
    await lane.send(old.numbered(frame.number))
    lane.num_extra += 1
    await lane.send(frame)


async def swap(frame: Frame, lane: Lane) -> None:
    """The payload of another transfer's LAYER, under this one's header."""
    await lane.send(frame.carrying(_payload_of_another(frame, lane)))


async def swap_and_digest(frame: Frame, lane: Lane) -> None:
    """The same with a digest that goes with it: only the root digest can tell."""
    payload = _payload_of_another(frame, lane)
    await lane.send(frame.carrying(payload).saying(digest=xxhash.xxh3_128_digest(payload)))


def _payload_of_another(frame: Frame, lane: Lane) -> bytes:
    others = [old.payload for old in lane.earlier if old.type is frame.type and old.transfer_id != frame.transfer_id]
    same_size = [payload for payload in others if len(payload) == len(frame.payload) and payload != frame.payload]
    return lane.random.choice(same_size) if same_size else bytes(len(frame.payload))


def forge(**changes: Any) -> Fault:
    """Header fields say something else, under a right checksum; a function is told the true value."""

    async def forged(frame: Frame, lane: Lane) -> None:
        fields = frame.fields
        said = {name: change(fields[name]) if callable(change) else change for name, change in changes.items()}
        await lane.send(frame.saying(**said))

    return forged


async def lengthen(frame: Frame, lane: Lane) -> None:
    """More payload than the header speaks of."""
    await lane.send(frame.carrying(frame.payload + bytes(4)))


async def shorten(frame: Frame, lane: Lane) -> None:
    await lane.send(frame.carrying(frame.payload[:-4]))


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        *(flip_prefix, flip_header, flip_payload, cut, reset, stall, drop, duplicate, reorder, delay, replay),
        *(lie_drop, lie_duplicate, lie_replay, swap, swap_and_digest, lengthen, shorten),
    )
} | {
    "forge_layer": forge(first_layer=lambda layer: layer + 1),
    "forge_more_layers": forge(num_layers=lambda count: count + 1),
    "forge_block": forge(first_block=lambda block: block + 1),
    "forge_far_block": forge(first_block=1 << 30),
    "forge_heads": forge(first_head=lambda head: head + 1),
    "forge_epoch": forge(epoch=lambda epoch: epoch + 1),
    "forge_id": forge(transfer_id=bytes(16)),
    "forge_digest": forge(digest=bytes(16)),
    "forge_root": forge(root_digest=bytes(16)),
    "forge_fewer_frames": forge(num_frames=lambda count: count - 1),
    "forge_more_frames": forge(num_frames=lambda count: count + 1),
}


# --- plans: which fault befalls a frame ---

Plan = Callable[[Frame], Fault | None]


def no_faults(frame: Frame) -> Fault | None:
    """The plan of a good network."""
    return None


@dataclass
class Once:
    """One fault, for one frame of a type, after some others of it went through. Afterwards tells which, and when."""

    fault: str | Fault
    frame_type: FrameType
    after: int = 0
    struck: Frame | None = None
    struck_s: float = 0.0

    def __call__(self, frame: Frame) -> Fault | None:
        if self.struck is not None or frame.type is not self.frame_type:
            return None
        if self.after:
            self.after -= 1
            return None
        self.struck, self.struck_s = frame, time.monotonic()
        return FAULTS[self.fault] if isinstance(self.fault, str) else self.fault


class Often:
    """One frame in ``every`` meets one of these faults, by a seed; for as long as the plan is in force."""

    def __init__(self, seed: int, every: int, faults: Sequence[str]) -> None:
        self._random = Random(seed)
        self._every = every
        self._faults = faults
        self.num_struck = 0

    def __call__(self, frame: Frame) -> Fault | None:
        if self._random.randrange(self._every):
            return None
        self.num_struck += 1
        return FAULTS[self._random.choice(self._faults)]


# --- the proxy ---


class FaultProxy:
    """Listens on ``port`` and carries every connection to ``target_port``. ``plan`` may be replaced at any time."""

    def __init__(self, target_port: int, plan: Plan = no_faults, seed: int = 0) -> None:
        self.plan = plan
        self.random = Random(seed)
        self.earlier: dict[To, deque[Frame]] = {to: deque(maxlen=REMEMBERED) for to in To}
        self.num_connections = 0
        self._target_port = target_port
        self._listening = socket.create_server((HOST, 0), backlog=1024)
        self.port = int(self._listening.getsockname()[1])
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)

    # --- what a test says ---

    @property
    def peer(self) -> str:
        """For --peer."""
        return f"{HOST}:{self.port}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def black_hole(self, *directions: To) -> None:
        """Swallow everything, or what goes in these directions, and close nothing."""
        self._call(self._set_gates(directions or tuple(To), is_open=False))

    def heal(self) -> None:
        """A black hole ends."""
        self._call(self._set_gates(tuple(To), is_open=True))

    def reset(self) -> None:
        """Every connection breaks, at both ends."""
        self._call(self._reset())

    # --- inside, on the thread's loop ---

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _start(self) -> None:
        self.gates = {to: asyncio.Event() for to in To}
        await self._set_gates(tuple(To), is_open=True)
        self._server = await asyncio.start_server(self._accept, sock=self._listening, limit=1 << 20)

    async def _stop(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # the transports close their sockets in the loop's next turn

    async def _set_gates(self, directions: Sequence[To], is_open: bool) -> None:
        for to in directions:
            if is_open:
                self.gates[to].set()
            else:
                self.gates[to].clear()

    async def _reset(self) -> None:
        for writer in self._writers:
            break_off(writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self._writers.add(writer)
        self.num_connections += 1
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._carry(reader, writer)
        finally:
            writer.close()
            self._writers.discard(writer)
            self._connections.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for gate in self.gates.values():
            await gate.wait()
        there, back = await asyncio.open_connection(HOST, self._target_port, limit=1 << 20)
        self._writers.add(back)
        lanes = [
            asyncio.create_task(self._pass_on(Lane(To.DECODE, reader, back, self))),
            asyncio.create_task(self._pass_on(Lane(To.PREFILL, there, writer, self))),
        ]
        try:
            done, _ = await asyncio.wait(lanes, return_when=asyncio.FIRST_COMPLETED)
            for gate in self.gates.values():  # who hangs up in a black hole is not heard
                await gate.wait()
            for lane in done:
                lane.result()
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)
            back.close()
            self._writers.discard(back)

    async def _pass_on(self, lane: Lane) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                frame = await lane.next_frame()
                fault = self.plan(frame)
                await (lane.send(frame) if fault is None else fault(frame, lane))
