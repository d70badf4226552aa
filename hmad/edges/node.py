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
from hmad.facts.config import Config
from hmad.facts.errors import ConfigError

log = logging.getLogger(__name__)


class Node(Protocol):
    """One role, built and ready to start."""

    services: RoleServices

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


def run(config: Config) -> int:
    """Serve until a signal; the exit code."""
    torch.set_num_threads(config.threads)
    numba.set_num_threads(min(config.threads, numba.config.NUMBA_NUM_THREADS))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the node is built, a signal ends the process at once
    uvloop.run(serve(config))
    return 0


async def serve(config: Config) -> None:
    """Build the role, start it, and stop it in order when asked to."""
    node = await build(config)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
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
        await stopping.wait()
        log.info("stopping")
    finally:
        await runner.cleanup()
        await node.stop()


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
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
