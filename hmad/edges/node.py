"""A node's life: build, start, serve, stop. One process, one role, one event loop."""

import asyncio
import gc
import logging
import secrets
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numba
import torch
import uvloop
from aiohttp import web

from hmad import __version__
from hmad.compute.checkpoint import ModelConfig, fingerprint, read_config
from hmad.compute.cpu import EMULATED_PRECISIONS, warm_up
from hmad.compute.model import Qwen3, load_model
from hmad.edges.api import RoleServices, build_app
from hmad.facts.config import Config
from hmad.facts.errors import ConfigError
from hmad.facts.formats import FORMATS, KVGeometry, preferred_formats
from hmad.facts.keys import load_cluster_key
from hmad.wire.frames import DIGEST_NONE
from hmad.wire.handshake import NodeIdentity
from hmad.wire.messages import Limits

log = logging.getLogger(__name__)

# What we are willing to receive. LAYERs land in leased slots, so their bound costs no memory.
MAX_LAYER_BYTES = 1 << 30
MAX_TOKENS_BYTES = 64 << 20
SHUTDOWN_S = 5.0


class Node(Protocol):
    """One role, built and ready to start."""

    services: RoleServices

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True)
class NodeModel:
    """The model as both roles need it, and who this node says it is."""

    config: ModelConfig
    geometry: KVGeometry
    max_model_len: int
    identity: NodeIdentity
    cluster_key: bytes | None


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


T = TypeVar("T")


async def in_passing_thread(function: Callable[[], T]) -> T:
    """Run heavy set-up work in a thread that ends with it.

    Its OpenMP team ends then, too. A team that idles on would count as busy, and the engine's own team, two threads on
    two cores, would put itself to sleep at every barrier: a decode step of a small model then takes twice the time.
    """
    with ThreadPoolExecutor(1) as executor:
        return await asyncio.get_running_loop().run_in_executor(executor, function)


async def build(config: Config) -> Node:
    """Load the model and make the role. Raises ModelError or ConfigError."""
    # Each role imports only what it needs, and only when it is the one.
    if config.role == "decode":
        from hmad.edges.decode_node import DecodeNode

        return await DecodeNode.build(config, open_model(config))
    from hmad.edges.prefill_node import PrefillNode

    return await PrefillNode.build(config, open_model(config))


def load_warm_model(config: Config) -> Qwen3:
    """The weights, and every kernel compiled, so that the first request waits for neither."""
    model = load_model(config.model, config.precision, config.load_format, config.dummy_seed)
    warm_up()
    return model


def open_model(config: Config) -> NodeModel:
    """Everything about the model but its weights. Raises ModelError or ConfigError."""
    model = read_config(Path(config.model))
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is beyond the model's {model.max_position_embeddings} positions"
        )
    geometry = KVGeometry(model.num_layers, model.num_kv_heads, model.head_dim)
    key = load_cluster_key(config.cluster_key_file) if config.cluster_key_file else None
    return NodeModel(model, geometry, max_model_len, make_identity(config, model, geometry, max_model_len), key)


def make_identity(config: Config, model: ModelConfig, geometry: KVGeometry, max_model_len: int) -> NodeIdentity:
    """Who this node says it is. A node that wants digests takes no peer that sends none."""
    return NodeIdentity(
        node_id=f"{socket.gethostname()[:40]}-{config.role}-{config.port}",
        boot_id=secrets.token_bytes(16),
        role=config.role,
        version=__version__,
        fingerprint=fingerprint(Path(config.model), config.load_format, config.dummy_seed),
        geometry=geometry,
        first_head=0,
        num_heads=geometry.num_kv_heads,
        formats=offered_formats(config, geometry),
        limits=Limits(layer_bytes=MAX_LAYER_BYTES, reserve_bytes=4 * max_model_len, tokens_bytes=MAX_TOKENS_BYTES),
        digests=(config.digest,) if config.digest != DIGEST_NONE else (DIGEST_NONE, "xxh3-128"),
    )


def offered_formats(config: Config, geometry: KVGeometry) -> tuple[str, ...]:
    """The KV formats a prefill node sends, best first, or a decode node reads; those that this head_dim allows."""
    if config.role == "decode":
        wanted = [FORMATS[name] for name in config.accept_formats]
    else:
        wanted = preferred_formats(config.kv_format, config.precision)
    formats = tuple(fmt.name for fmt in wanted if fmt.fits(geometry.head_dim))
    if not formats:
        raise ConfigError(
            f"none of the KV formats asked for is defined for this model's head_dim of {geometry.head_dim}"
        )
    return formats


async def start_rest(runner: web.AppRunner, host: str, port: int) -> None:
    """Listen for REST. Raises ConfigError when the port cannot be had."""
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def common_status(config: Config, model: NodeModel) -> dict[str, Any]:
    """What /status says on both roles."""
    return {
        "role": config.role,
        "version": __version__,
        "node_id": model.identity.node_id,
        "precision": config.precision,
        "emulated": config.precision in EMULATED_PRECISIONS,
        "kv_formats": model.identity.formats,
        "max_model_len": model.max_model_len,
        "model_fingerprint": model.identity.fingerprint.hex(),
    }
