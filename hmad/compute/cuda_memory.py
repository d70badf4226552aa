"""What a node takes of a GPU's memory: reckoned before anything is loaded, so that too much is one clear error."""

from collections.abc import Mapping
from math import prod

import torch

from hmad.compute.checkpoint import ModelConfig, expected_tensors
from hmad.compute.cuda_prefill_graphs import PrefillGraphs
from hmad.facts.config import GIB
from hmad.facts.errors import ConfigError
from hmad_kernels.triton_attention import MAX_GROUP
from hmad_kernels.triton_common import HEAD_DIMS

SHARE_OF_FREE = 0.9  # of what is free at the start, where the configuration sets no budget
LIBRARY_BYTES = 768 << 20  # of matrix libraries, compiled kernels and captured graphs; the CUDA context is not counted
LINEAR_BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "fp8": 1, "bfp8": 2}  # a weight, as held
LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 products, and attention over them


def open_device(name: str, config: ModelConfig) -> torch.device:
    """The CUDA device that is asked for; ``cuda`` is cuda:0. Raises ConfigError where there is none, or it is too old,
    or its kernels do not know the model's shape.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            f"--device {name}: torch {torch.__version__} finds no GPU here; see nvidia-smi, install a torch that is "
            "built for it, or use --device cpu"
        )
    device = torch.device(name)
    device = torch.device("cuda", device.index or 0)
    if device.index >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        raise ConfigError(
            f"--device {name}: {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and hmad needs {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or more: "
            "use a newer GPU, or --device cpu"
        )
    group = config.num_heads // config.num_kv_heads
    if config.head_dim not in HEAD_DIMS or group > MAX_GROUP:
        raise ConfigError(
            f"--device {name} serves models with a head_dim of {' or '.join(map(str, HEAD_DIMS))} "
            f"and up to {MAX_GROUP} query heads for each KV head; not {config.head_dim} and {group}: use --device cpu"
        )
    torch.cuda.set_device(device)
    return device


def weight_bytes(config: ModelConfig, precision: str) -> int:
    """All weights as they will be held: linear layers in the precision, all else in 16 bits (32 in fp32)."""
    plain = LINEAR_BYTES["fp32" if precision == "fp32" else "bf16"]
    return sum(
        prod(shape) * (LINEAR_BYTES[precision] if "_proj" in name else plain)
        for name, shape in expected_tensors(config).items()
    )


def prefill_bytes(config: ModelConfig, max_batch_tokens: int, history_bytes: int) -> dict[str, int]:
    """What a forward pass of prefill needs beside the weights."""
    widths = 4 * config.hidden_size + 5 * config.intermediate_size
    heads_width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widths += 3 * heads_width
    graph_rows = min(PrefillGraphs.MAX_ROWS, max_batch_tokens)
    pieces_width = 2 * heads_width  # of all rows of all layers of a piece, at most
    return {
        "one batch": 4 * max_batch_tokens * widths,
        "graphs": 4 * (graph_rows * widths + PrefillGraphs.PIECE_LAYER_ROWS * pieces_width),
        "history": history_bytes,
        "libraries": LIBRARY_BYTES,
    }


def decode_bytes(config: ModelConfig, max_batch_size: int) -> dict[str, int]:
    """What a decode step needs beside weights and arena: logits thrice, and counts for penalties."""
    return {"one step": 16 * max_batch_size * config.vocab_size, "libraries": LIBRARY_BYTES}


def budget_bytes(device: torch.device, asked_bytes: int | None) -> int:
    """How much this process may take; what torch takes is held to it."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    budget = asked_bytes if asked_bytes is not None else int(SHARE_OF_FREE * free_bytes)
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total_bytes), device)
    return min(budget, free_bytes)


def check_budget(device: torch.device, budget: int, parts: Mapping[str, int]) -> None:
    """Raise ConfigError with the sums that were asked for, unless they fit."""
    needed = sum(parts.values())
    if needed <= budget:
        return
    name = torch.cuda.get_device_name(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    sums = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    raise ConfigError(
        f"{device} ({name}) has {free_bytes / GIB:.2f} of {total_bytes / GIB:.2f} GiB free, "
        f"this node may take {budget / GIB:.2f} and asks for {needed / GIB:.2f}: {sums}. Take a smaller model or a "
        "narrower precision, give this node more with --device-memory, or lower --arena-bytes, --history-bytes, "
        "--max-batch-tokens or --max-batch-size"
    )
