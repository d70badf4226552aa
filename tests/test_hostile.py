"""Strangers at both ports: garbage, half frames, drip, floods, replays. They are shown out, and disturb nobody."""

import asyncio
import os
import re
import resource
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import web
from checkpoints import write_checkpoint
from daemons import Daemon, DecodeDaemon, PrefillDaemon, free_port, running, wait_for
from fake_generator import plain_services
from fault_proxy import FIXED, FaultProxy, Frame, To

from hmad.edges import rest_guard
from hmad.edges.api import build_app
from hmad.edges.node import start_rest
from hmad.edges.rest_guard import MAX_WAITING_PER_ADDRESS
from hmad.transport.strangers import Strangers
from hmad.wire.limits import MAX_STRANGERS_PER_ADDRESS
from hmad.wire.messages import FrameType

HOST = "127.0.0.1"
PATIENCE_S = 10.0
PROMPT = list(range(100))
FLOOD = 450  # connections to each port: beyond its limit
MIB = 1 << 20


@dataclass(frozen=True)
class Pair:
    """A prefill node and its decode node, with a cluster key and a proxy between them."""

    prefill: PrefillDaemon
    decode: DecodeDaemon
    proxy: FaultProxy
    expected: list[int]

    def answer(self) -> list[int]:
        tokens: list[int] = self.prefill.complete(PROMPT, max_tokens=150).choices[0]["token_ids"]
        return tokens

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Requests beside whatever happens here, one after the other; each comes out as it should."""
        answers: list[Any] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                try:
                    answers.append(self.answer())
                except (AssertionError, OSError) as error:
                    answers.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert [answer for answer in answers if answer != self.expected] == []
        assert answers


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("hostile")
    key = directory / "cluster.key"
    key.write_bytes(os.urandom(16).hex().encode())
    key.chmod(0o600)
    write_checkpoint(directory / "model", head_dim=64)
    decode = DecodeDaemon(directory / "model", cluster_key_file=key)
    with FaultProxy(decode.stream_port) as proxy:
        prefill = PrefillDaemon(directory / "model", [proxy], cluster_key_file=key)
        with running(decode, prefill):
            expected = prefill.complete(PROMPT, max_tokens=150).choices[0]["token_ids"]
            yield Pair(prefill, decode, proxy, expected)
            decode.wait_until_empty()


def connect(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=PATIENCE_S)


@contextmanager
def flood(*ports: int, first_bytes: bytes = b"", count: int = FLOOD) -> Iterator[None]:
    """Very many connections that never say more than the beginning of something."""
    with ExitStack() as stack:
        for port in ports * count:
            sock = stack.enter_context(closing(connect(port)))
            with suppress(OSError):  # shown out already
                sock.sendall(first_bytes)
        yield


def num_files(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def resident_bytes(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match
    return int(match[1]) << 10


# --- floods ---


def recorded(pair: Pair) -> dict[FrameType, Frame]:
    """The last frame of each type that went to the decode node, those of a fresh handshake among them."""
    num_connections = pair.proxy.num_connections
    pair.proxy.reset()
    wait_for(lambda: pair.proxy.num_connections >= num_connections + 2)
    pair.prefill.wait_until("/health")
    return {frame.type: frame for frame in pair.proxy.earlier[To.DECODE]}


BEGINNINGS: dict[str, Callable[[Pair], bytes]] = {
    "idle": lambda pair: b"",
    "half a frame": lambda pair: recorded(pair)[FrameType.HELLO].data[:100],
    "a request without its body": lambda pair: (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"
    ),
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_flood_locks_nobody_out(pair: Pair, kind: str) -> None:
    """Very many wait at each port; clients are served all the while, and a prefill node that was cut off comes back."""
    first_bytes = BEGINNINGS[kind](pair)
    daemons = (pair.prefill, pair.decode)
    files, memory = [num_files(d) for d in daemons], [resident_bytes(d) for d in daemons]
    most = [MAX_WAITING_PER_ADDRESS, MAX_WAITING_PER_ADDRESS + MAX_STRANGERS_PER_ADDRESS]
    with (
        pair.undisturbed(),
        flood(pair.decode.stream_port, pair.decode.port, pair.prefill.port, first_bytes=first_bytes),
    ):
        assert pair.answer() == pair.expected
        assert [n < d + m + 10 for n, d, m in zip(map(num_files, daemons), files, most, strict=True)] == [True] * 2
        assert [resident_bytes(d) < before + 64 * MIB for d, before in zip(daemons, memory, strict=True)] == [True] * 2
    with flood(pair.decode.stream_port, first_bytes=first_bytes, count=150):
        recorded(pair)
        assert pair.answer() == pair.expected


def test_garbage_at_both_ports(pair: Pair) -> None:
    random = Random(3)
    with pair.undisturbed():
        for port in (pair.decode.stream_port, pair.decode.port, pair.prefill.port) * 30:
            with connect(port) as sock, suppress(OSError):
                sock.sendall(random.randbytes(random.randrange(1, 1 << 14)))
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass


def test_no_more_files_than_there_are(pair: Pair) -> None:
    """Out of file descriptors a node goes on with what it has, and accepts again as soon as there are some."""
    limits = {}
    with pair.prefill.stream(prompt=PROMPT, max_tokens=400, temperature=0, ignore_eos=True) as lines:
        for daemon in (pair.prefill, pair.decode):
            limits[daemon] = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (num_files(daemon) + 20, limits[daemon][1]))
        with flood(pair.decode.stream_port, pair.decode.port, pair.prefill.port, count=100):
            streamed = b"".join(lines)
    for daemon, limit in limits.items():
        daemon.wait_until("/livez")
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limit)
    assert streamed.endswith(b"data: [DONE]\n\n")
    assert pair.answer() == pair.expected
    recorded(pair)  # a new session: the stream port accepts, too
    assert pair.answer() == pair.expected


# --- who has no right to be here ---


def converse(port: int, *frames: Frame) -> list[Frame]:
    """Send frames as a prefill node would, one answer awaited for each; all answers until the other side closes."""
    answers = []
    with connect(port) as sock, suppress(OSError):
        for frame in frames:
            sock.sendall(frame.data)
            if answer := receive(sock):
                answers.append(answer)
    return answers


def receive(sock: socket.socket) -> Frame | None:
    with sock.makefile("rb") as stream:
        prefix = stream.read(FIXED.size + 4)
        if len(prefix) < FIXED.size + 4:
            return None
        _, _, _, _, header_len, payload_len = FIXED.unpack(prefix[: FIXED.size])
        header = stream.read(header_len)
        return Frame(To.PREFILL, prefix[: FIXED.size], prefix[FIXED.size :], header, stream.read(payload_len))


def test_a_recorded_handshake_opens_nothing(pair: Pair) -> None:
    """HELLO and AUTH as a friend sent them a moment ago, byte by byte: the nonce they answered to was another."""
    frames = recorded(pair)
    num_nodes = len(pair.decode.status["prefill_nodes"])
    welcome, reject = converse(pair.decode.stream_port, frames[FrameType.HELLO], frames[FrameType.AUTH])
    assert welcome.type is FrameType.WELCOME
    assert reject.type is FrameType.REJECT
    assert "proof is wrong" in reject.fields["reason"]
    assert len(pair.decode.status["prefill_nodes"]) == num_nodes
    assert pair.answer() == pair.expected


def test_nothing_comes_before_the_handshake(pair: Pair) -> None:
    frames = recorded(pair)
    for frame, words in (
        (frames[FrameType.PING], "may not come before the peer is authenticated"),
        (frames[FrameType.AUTH], "out of order in the handshake"),
    ):
        [reject] = converse(pair.decode.stream_port, frame)
        assert reject.type is FrameType.REJECT
        assert words in reject.fields["reason"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("version", "9.0.0", "run the same release on both"), ("fingerprint", bytes(32), "the models differ")],
)
def test_other_versions_and_models_are_told_so(pair: Pair, field: str, value: Any, words: str) -> None:
    [reject] = converse(pair.decode.stream_port, recorded(pair)[FrameType.HELLO].saying(**{field: value}))
    assert reject.type is FrameType.REJECT
    assert words in reject.fields["reason"]


def test_another_protocol_is_told_so(pair: Pair) -> None:
    hello = recorded(pair)[FrameType.HELLO]
    [reject] = converse(pair.decode.stream_port, replace(hello, fixed=hello.fixed[:4] + b"\x02" + hello.fixed[5:]))
    assert reject.type is FrameType.REJECT
    assert "the peer speaks protocol version 2, this node 1: run the same release" in reject.fields["reason"]


# --- who makes room for whom ---


class Waiting:
    """A stranger that takes note of why it was shown out."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def show_out(self, reason: str) -> None:
        self.reason = reason


async def test_the_oldest_of_the_most_crowded_address_makes_room() -> None:
    strangers = Strangers(most=6, most_per_address=4)
    crowd, [friend] = [Waiting() for _ in range(9)], [Waiting()]
    strangers.add(crowd[0], "a", 60)
    strangers.add(friend, "b", 60)
    for stranger in crowd[1:5]:
        strangers.add(stranger, "a", 60)
    assert [stranger.reason is None for stranger in crowd[:5]] == [False, True, True, True, True]
    assert "more than 4 connections from a" in str(crowd[0].reason)
    for stranger, address in zip(crowd[5:], "cdef", strict=True):  # six in all, then one too many, and another
        strangers.add(stranger, address, 60)
    assert [stranger.reason is None for stranger in crowd[1:]] == [False] * 3 + [True] * 5
    assert friend.reason is None
    for stranger in (friend, *crowd):
        strangers.discard(stranger)
    assert len(strangers) == 0


async def test_patience_ends() -> None:
    strangers, known, unknown = Strangers(8, 8), Waiting(), Waiting()
    for stranger in (known, unknown):
        strangers.add(stranger, "a", 0.05)
    strangers.discard(known)
    async with asyncio.timeout(PATIENCE_S):
        while unknown.reason is None:  # noqa: ASYNC110 - what is waited for has no event, by design
            await asyncio.sleep(0.01)
    assert "within 0.05 s" in unknown.reason
    assert known.reason is None
    assert len(strangers) == 0


@pytest.fixture
async def rest_port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """A REST port that waits for nobody long."""
    monkeypatch.setattr(rest_guard, "FIRST_REQUEST_S", 0.2)
    monkeypatch.setattr(rest_guard, "IDLE_S", 0.4)
    port = free_port()
    runner = web.AppRunner(build_app(plain_services()), access_log=None)
    await start_rest(runner, HOST, port)
    yield port
    await runner.cleanup()


async def test_a_request_that_drips_in_is_not_waited_for(rest_port: int) -> None:
    reader, writer = await asyncio.open_connection(HOST, rest_port)
    with suppress(ConnectionError):
        for byte in b"GET /livez HTTP/1.1\r\nX-Slow: " + b"z" * 300:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.01)
        await asyncio.wait_for(reader.read(), PATIENCE_S)
    assert writer.is_closing() or reader.at_eof() or reader.exception() is not None
    writer.close()


async def test_a_connection_may_serve_several_requests_and_idle_a_while(rest_port: int) -> None:
    reader, writer = await asyncio.open_connection(HOST, rest_port)
    for _ in range(3):
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b'"alive"}')
        await asyncio.sleep(0.25)  # longer than a first request may take
    with suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
    writer.close()
