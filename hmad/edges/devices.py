"""A node's device: its model, its memory, and whichever implementation of the device seam it asks for.

Loading is heavy work: it belongs into a passing thread (``node_model.in_passing_thread``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hmad.compute import cpu
from hmad.compute.arena import Arena
from hmad.compute.cpu import CpuDecode, CpuPrefill
from hmad.compute.cuda_faults import lacks_memory
from hmad.compute.device import DecodeDevice, PrefillDevice
from hmad.compute.landing import HostLanding, Landing
from hmad.compute.loading import load_model
from hmad.compute.model import Qwen3
from hmad.compute.staging import StagingPool
from hmad.edges.node_model import LANDING_PAGE_BYTES, NodeModel
from hmad.facts.config import GIB, Config
from hmad.facts.errors import ConfigError
from hmad.facts.formats import FORMATS

CPU_ARENA_BYTES = GIB  # where the configuration says nothing


@dataclass(frozen=True)
class Prefilling:
    """What a prefill node computes with."""

    device: PrefillDevice
    staging: StagingPool


@dataclass(frozen=True)
class Decoding:
    """What a decode node computes with."""

    device: DecodeDevice
    arena: Arena
    landing: Landing


def open_prefill(config: Config, model: NodeModel) -> Prefilling:
    """Load the weights, take the memory, compile the kernels. Raises ConfigError or ModelError."""
    with enough_memory(config):
        return _cpu_prefill(config, model) if config.device == "cpu" else _cuda_prefill(config, model)


def open_decode(config: Config, model: NodeModel, lost: Callable[[Exception], object]) -> Decoding:
    """The same for a decode node. ``lost`` hears, on any thread, that the device is lost."""
    with enough_memory(config):
        return _cpu_decode(config, model) if config.device == "cpu" else _cuda_decode(config, model, lost)


@contextmanager
def enough_memory(config: Config) -> Iterator[None]:
    """What was reckoned beforehand was not there: another process took of the GPU meanwhile."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise ConfigError(
            f"--device {config.device} ran out of memory while the node was being built: nodes that share a GPU need a "
            f"--device-memory each ({error})"
        ) from error


def _load(config: Config, device: str) -> Qwen3:
    return load_model(config.model, config.precision, config.load_format, config.dummy_seed, device)


def make_staging(config: Config, model: NodeModel) -> StagingPool:
    """Pages of one frame each; a frame holds at least one block of any format we may send."""
    blocks = [model.geometry.block_bytes(FORMATS[name]) for name in model.identity.formats]
    return StagingPool(config.staging_bytes, max(config.frame_bytes, *blocks), pinned=config.device != "cpu")


def _cpu_prefill(config: Config, model: NodeModel) -> Prefilling:
    staging = make_staging(config, model)
    device = CpuPrefill(_load(config, "cpu"), model.geometry, staging)
    cpu.warm_up()
    return Prefilling(device, staging)


def _cpu_decode(config: Config, model: NodeModel) -> Decoding:
    arena = Arena(model.geometry, config.arena_bytes or CPU_ARENA_BYTES)
    device = CpuDecode(_load(config, "cpu"), arena, FORMATS[config.precision], config.threads)
    cpu.warm_up()
    return Decoding(device, arena, HostLanding(arena))


def _cuda_prefill(config: Config, model: NodeModel) -> Prefilling:
    from hmad.compute import cuda_memory  # Triton is slow to import, and not everywhere
    from hmad.compute.cuda_prefill import CudaPrefill

    place = cuda_memory.open_device(config.device, model.config)
    budget = cuda_memory.budget_bytes(place, config.device_memory)
    parts = {"weights": cuda_memory.weight_bytes(model.config, config.precision)}
    parts |= cuda_memory.prefill_bytes(model.config, config.max_batch_tokens, config.history_bytes)
    cuda_memory.check_budget(place, budget, parts)
    staging = make_staging(config, model)
    device = CudaPrefill(_load(config, str(place)), model.geometry, staging, config.max_batch_tokens)
    device.warm_up([FORMATS[name] for name in model.identity.formats])
    return Prefilling(device, staging)


def _cuda_decode(config: Config, model: NodeModel, lost: Callable[[Exception], object]) -> Decoding:
    from hmad.compute import cuda_memory
    from hmad.compute.cuda_decode import CudaDecode
    from hmad.compute.cuda_landing import CudaLanding

    place = cuda_memory.open_device(config.device, model.config)
    budget = cuda_memory.budget_bytes(place, config.device_memory)
    parts = {"weights": cuda_memory.weight_bytes(model.config, config.precision)}
    parts |= cuda_memory.decode_bytes(model.config, config.max_batch_size) | {"landing": LANDING_PAGE_BYTES}
    one_slot = model.geometry.num_layers * model.geometry.slot_bytes
    arena_bytes = config.arena_bytes or max(one_slot, budget - sum(parts.values()))
    cuda_memory.check_budget(place, budget, parts | {"arena": arena_bytes})
    arena = Arena(model.geometry, arena_bytes, place)
    device = CudaDecode(_load(config, str(place)), arena, FORMATS[config.precision], config.max_batch_size)
    device.warm_up(model.identity.formats)
    landing = CudaLanding(arena, LANDING_PAGE_BYTES, config.landing_bytes, lost)
    return Decoding(device, arena, landing)
