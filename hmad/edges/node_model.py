"""What both roles build on: the model, who this node says it is, and what it tells of itself."""

import asyncio
import secrets
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hmad import __version__
from hmad.compute.checkpoint import ModelConfig, fingerprint, read_config
from hmad.compute.loading import emulated_precisions
from hmad.facts.config import Config
from hmad.facts.errors import ConfigError
from hmad.facts.formats import FORMATS, KVGeometry, preferred_formats
from hmad.facts.keys import load_cluster_key
from hmad.wire.frames import DIGEST_NONE
from hmad.wire.handshake import NodeIdentity
from hmad.wire.messages import Limits

SHUTDOWN_S = 5.0
# What we are willing to receive. On a CPU, LAYERs land in leased slots, so their bound costs no memory; with a GPU they
# land in pinned pages first.
MAX_LAYER_BYTES = 64 << 20
LANDING_PAGE_BYTES = 8 << 20
MAX_TOKENS_BYTES = 64 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class NodeModel:
    """The model as both roles need it, and who this node says it is."""

    config: ModelConfig
    geometry: KVGeometry
    max_model_len: int
    identity: NodeIdentity
    cluster_key: bytes | None


async def in_passing_thread(function: Callable[[], T]) -> T:
    """Run heavy set-up work in a thread that ends with it.

    Its OpenMP team ends then, too. A team that idles on would count as busy, and the engine's own team, two threads on
    two cores, would put itself to sleep at every barrier: a decode step of a small model then takes twice the time.
    """
    with ThreadPoolExecutor(1) as executor:
        return await asyncio.get_running_loop().run_in_executor(executor, function)


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
        limits=Limits(max_layer_bytes(config), reserve_bytes=4 * max_model_len, tokens_bytes=MAX_TOKENS_BYTES),
        digests=(config.digest,) if config.digest != DIGEST_NONE else (DIGEST_NONE, "xxh3-128"),
    )


def max_layer_bytes(config: Config) -> int:
    return MAX_LAYER_BYTES if config.device == "cpu" else LANDING_PAGE_BYTES


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


def common_status(config: Config, model: NodeModel) -> dict[str, Any]:
    """What /status says on both roles."""
    return {
        "role": config.role,
        "version": __version__,
        "node_id": model.identity.node_id,
        "precision": config.precision,
        "device": config.device,
        "emulated": config.precision in emulated_precisions(config.device),
        "kv_formats": model.identity.formats,
        "max_model_len": model.max_model_len,
        "model_fingerprint": model.identity.fingerprint.hex(),
    }
