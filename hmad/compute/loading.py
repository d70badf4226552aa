"""From a directory to a model on a device."""

from pathlib import Path

import torch

from hmad.compute.checkpoint import open_weights, read_config
from hmad.compute.cpu import CpuBackend
from hmad.compute.model import Backend, Qwen3


def emulated_precisions(device: str) -> frozenset[str]:
    """Precisions of exact numerics but no gain in speed: the device has no such products."""
    return frozenset({"fp8", "bfp8"}) if device == "cpu" else frozenset({"bfp8"})


def make_backend(precision: str, device: torch.device) -> Backend:
    """What a device brings to the model. Raises ConfigError where it cannot compute in this precision."""
    if device.type == "cpu":
        return CpuBackend(precision)
    from hmad.compute.cuda_backend import CudaBackend  # Triton is slow to import, and not everywhere

    return CudaBackend(precision, device)


def load_model(
    model_dir: Path, precision: str, load_format: str = "safetensors", seed: int = 0, device: str = "cpu"
) -> Qwen3:
    """The model of a directory; ``load_format`` is safetensors or dummy (random weights of ``seed``)."""
    config = read_config(model_dir)
    place = torch.device(device)
    weights = open_weights(model_dir, config, load_format, seed, place)
    return Qwen3(config, precision, weights, make_backend(precision, place))
