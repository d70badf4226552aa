"""Starts the nodes that are evaluated: real ones, in processes of their own, on loopback ports."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import aiohttp

from hmad.edges.evaluation.settings import PROGRAM, Row, Settings
from hmad.facts.errors import HmadError

UNHEALTHY_S = 30.0  # both nodes of a pair are up, and one of them cannot serve
POLL_S = 0.1
DYING_S = 2.0  # a broken connection is often the first that is seen of a dying node
STOP_S = 20.0
LOG_LINES = 15
QUEUE_TIMEOUT_S = 3600  # a slow machine with many questions at once is no mistake

T = TypeVar("T")


class EvaluationError(HmadError):
    """A node died, or would not answer; what is done is kept."""


class Node:
    """A running process, and where it writes its log."""

    def __init__(self, role: str, port: int, process: asyncio.subprocess.Process, log: Path) -> None:
        self.role = role
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._process = process

    async def died(self) -> None:
        """Wait for an end that nobody asked for, and raise EvaluationError."""
        code = await self._process.wait()
        raise EvaluationError(f"the {self.role} node ended with exit code {code}; {self.log} ends so:\n{self.tail}")

    @property
    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    async def wait_healthy(self, path: str) -> None:
        """Poll until it answers 200; loading a large model takes minutes. Raises EvaluationError with the last answer
        once it has answered otherwise for long.
        """
        answered_s = 0.0
        async with aiohttp.ClientSession() as session:
            while True:
                with suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(f"{self.url}{path}") as response:
                        if response.status == 200:
                            return
                        answered_s += POLL_S
                        if answered_s > UNHEALTHY_S:
                            raise EvaluationError(f"the {self.role} node says {path}: {await response.text()}")
                await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """Its stdin ends, and so does the node."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def while_alive(work: Awaitable[T], nodes: Sequence[Node]) -> T:
    """The work's result, or the death of a node if that comes first, also where it shows as a broken connection."""
    working = asyncio.ensure_future(work)
    deaths = [asyncio.create_task(node.died()) for node in nodes]
    try:
        await asyncio.wait([working, *deaths], return_when=asyncio.FIRST_COMPLETED)
        if working.done() and working.exception():
            await asyncio.wait(deaths, timeout=DYING_S, return_when=asyncio.FIRST_COMPLETED)
        for death in deaths:
            if death.done():
                death.result()
        return await working
    finally:
        for task in (working, *deaths):
            task.cancel()
        await asyncio.gather(working, *deaths, return_exceptions=True)


@asynccontextmanager
async def running_decode(settings: Settings) -> AsyncIterator[tuple[Node, int]]:
    """A decode node that takes every format, and its stream port."""
    stream_port = free_port()
    log = settings.output / "decode.log"
    async with _running("decode", PROGRAM, settings, log, {"stream_port": stream_port}) as node:
        await while_alive(node.wait_healthy("/livez"), [node])
        yield node, stream_port


@asynccontextmanager
async def running_prefill(settings: Settings, row: Row, stream_port: int) -> AsyncIterator[Node]:
    """The prefill node of a row, connected to its decode node."""
    flags = {
        "peer": f"127.0.0.1:{stream_port}",
        "precision": row.pair.precision,
        "kv_format": row.pair.kv_format,
        "queue_timeout": QUEUE_TIMEOUT_S,
    }
    log = settings.output / f"prefill-{row.file_stem}.log"
    async with _running("prefill", row.program, settings, log, flags) as node:
        await while_alive(node.wait_healthy("/health"), [node])
        yield node


@asynccontextmanager
async def _running(
    role: str, program: str, settings: Settings, log: Path, flags: Mapping[str, object]
) -> AsyncIterator[Node]:
    port = free_port()
    common: dict[str, object] = {
        "role": role,
        "model": settings.model,
        "port": port,
        "threads": settings.threads,
        "log_level": "warning",
    }
    if settings.node_config:
        common["config"] = settings.node_config
    words = [
        word for name, value in {**common, **flags}.items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HMAD_")}
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", program, *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
        )
    node = Node(role, port, process, log)
    try:
        yield node
    finally:
        await node.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
