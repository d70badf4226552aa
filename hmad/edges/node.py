"""A node's life: build, start, serve, stop. One process, one role, one event loop."""

import asyncio
import faulthandler
import gc
import resource
import signal
import sys
from typing import Any, Protocol

import numba
import torch
import uvloop
from aiohttp import web

from hmad.edges.api import RoleServices, build_app
from hmad.edges.health import keep_looking
from hmad.edges.loop_watch import LoopWatch
from hmad.edges.metrics import Metrics
from hmad.edges.node_model import SHUTDOWN_S, open_model
from hmad.edges.notify import Notifier
from hmad.edges.rest_guard import GuardedSite
from hmad.facts.config import Config
from hmad.facts.errors import ConfigError, ModelError
from hmad.facts.logs import get_logger
from hmad.roles.engine import Engine

log = get_logger(__name__)

# The loop, the threads that move KV and the one that launches GPU work take turns at Python. By default one that holds
# it may go on for 5 ms, in which a GPU computes several layers and a link carries several frames.
SWITCH_INTERVAL_S = 0.0005

EXIT_OK, EXIT_FAILED = 0, 1


class Node(Protocol):
    """One role, built and ready to start."""

    services: RoleServices
    engine: Engine

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
        loop.add_signal_handler(signal.SIGINT, self.end_at_once)

    def _terminate(self) -> None:
        (self.end if self.drain.is_set() else self.drain).set()

    def end_at_once(self) -> None:
        self.drain.set()
        self.end.set()


def run(config: Config) -> int:
    """Serve until a signal; the exit code. Not 0 where the engine died, so that a supervisor starts us again."""
    faulthandler.enable()  # a supervisor's watchdog ends us by SIGABRT: the log then has where each thread was
    raise_file_limit()
    torch.set_num_threads(config.threads)
    numba.set_num_threads(min(config.threads, numba.config.NUMBA_NUM_THREADS))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the node is built, a signal ends the process at once
    try:
        return uvloop.run(serve(config))
    except (ConfigError, ModelError):
        raise
    except Exception:
        log.exception("the node crashed")
        return EXIT_FAILED


def raise_file_limit() -> None:
    """Every stream and every peer is a file; a shell's usual soft limit of 1,024 is for programs of another time."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def serve(config: Config) -> int:
    """Build the role, start it, and, when asked to, let it finish what it has and stop it in order; the exit code."""
    notifier = Notifier()
    notifier.tell("STATUS=loading the model")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    node = await build(config)
    signals = Signals()
    loop = asyncio.get_running_loop()
    node.engine.on_death = lambda: loop.call_soon_threadsafe(signals.end_at_once)
    report_unhandled(loop, node.services.metrics)
    exempt_from_collection()
    loop_watch = LoopWatch(node.services.metrics.loop_busy_s.observe)
    runner = web.AppRunner(
        build_app(node.services),
        handler_cancellation=True,
        auto_decompress=False,
        access_log=None,
        shutdown_timeout=SHUTDOWN_S,
    )
    watching = asyncio.create_task(keep_looking(node.services.health, lambda: node.engine.trouble, notifier))
    try:
        await node.start()
        await start_rest(runner, config.host, config.port)
        log.info("serving", role=config.role, url=f"http://{config.host}:{config.port}")
        notifier.tell("READY=1")
        await signals.drain.wait()
        notifier.tell("STOPPING=1")
        await drain(node, config.drain_timeout_s, signals)
        log.info("stopping", reason=node.engine.trouble or "told to")
    finally:
        node.end_requests()
        await runner.cleanup()
        await node.stop()
        loop_watch.stop()
        watching.cancel()  # last: the watchdog is fed until the end
        notifier.close()
    return EXIT_FAILED if node.engine.failure else EXIT_OK


def report_unhandled(loop: asyncio.AbstractEventLoop, metrics: Metrics) -> None:
    """What nobody awaits and nobody catches is a bug: told with its traceback, and counted like any other error."""

    def report(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        metrics.count_error("unhandled")
        log.error("an error that nobody handles", what=context["message"], exc_info=context.get("exception"))

    loop.set_exception_handler(report)


async def drain(node: Node, timeout_s: float, signals: Signals) -> None:
    """Take nothing new and wait for what is here, until it is done, time is up, or a signal says that it is enough."""
    log.info("draining; a second signal ends at once", timeout_s=timeout_s)
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
