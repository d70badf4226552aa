"""A node's life: build, start, serve, stop. One process, one role, one event loop."""

import asyncio
import gc
import logging
import signal
from typing import Protocol

import numba
import torch
import uvloop
from aiohttp import web

from hmad.edges.api import RoleServices, build_app
from hmad.edges.node_model import SHUTDOWN_S, open_model
from hmad.edges.rest_guard import GuardedSite
from hmad.facts.config import Config
from hmad.facts.errors import ConfigError

log = logging.getLogger(__name__)


class Node(Protocol):
    """One role, built and ready to start."""

    services: RoleServices

    async def start(self) -> None: ...

    def drain(self) -> None:
        """Tell everybody that nothing new is taken; what is here goes on."""

    async def drained(self) -> None:
        """Wait until nothing is here any more."""

    def end_requests(self) -> None:
        """End whatever is still here with a typed error to whoever waits for it."""

    async def stop(self) -> None: ...


class Signals:
    """SIGTERM asks to drain, a second one to end at once. SIGINT, a person's Ctrl-C, asks for both."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.end = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)

    def _terminate(self) -> None:
        (self.end if self.drain.is_set() else self.drain).set()

    def _interrupt(self) -> None:
        self.drain.set()
        self.end.set()


def run(config: Config) -> int:
    """Serve until a signal; the exit code."""
    torch.set_num_threads(config.threads)
    numba.set_num_threads(min(config.threads, numba.config.NUMBA_NUM_THREADS))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the node is built, a signal ends the process at once
    uvloop.run(serve(config))
    return 0


async def serve(config: Config) -> None:
    """Build the role, start it, and, when asked to, let it finish what it has and stop it in order."""
    node = await build(config)
    signals = Signals()
    exempt_from_collection()
    runner = web.AppRunner(
        build_app(node.services),
        handler_cancellation=True,
        auto_decompress=False,
        access_log=None,
        shutdown_timeout=SHUTDOWN_S,
    )
    try:
        await node.start()
        await start_rest(runner, config.host, config.port)
        log.info("%s node serves on http://%s:%d", config.role, config.host, config.port)
        await signals.drain.wait()
        await drain(node, config.drain_timeout_s, signals)
        log.info("stopping")
    finally:
        node.end_requests()
        await runner.cleanup()
        await node.stop()


async def drain(node: Node, timeout_s: float, signals: Signals) -> None:
    """Take nothing new and wait for what is here, until it is done, time is up, or a signal says that it is enough."""
    log.info("draining, for at most %g s; a second signal ends at once", timeout_s)
    node.drain()
    ends = [asyncio.create_task(node.drained()), asyncio.create_task(signals.end.wait())]
    await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()


def exempt_from_collection() -> None:
    """Hide what is here for good (libraries, model) from the garbage collector: each full sweep over it would hold up
    every stream for a few hundred milliseconds, and the end of the process too."""
    gc.collect()
    gc.freeze()


async def build(config: Config) -> Node:
    """Load the model and make the role. Raises ModelError or ConfigError."""
    # Each role imports only what it needs, and only when it is the one.
    if config.role == "decode":
        from hmad.edges.decode_node import DecodeNode

        return await DecodeNode.build(config, open_model(config))
    from hmad.edges.prefill_node import PrefillNode

    return await PrefillNode.build(config, open_model(config))


async def start_rest(runner: web.AppRunner, host: str, port: int) -> None:
    """Listen for REST. Raises ConfigError when the port cannot be had."""
    await runner.setup()
    try:
        await GuardedSite(runner, host, port).start()
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
