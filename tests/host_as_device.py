"""Where there is no GPU: Triton's interpreter runs the kernels, a captured graph is the call that would have been
captured, and a stream is what stands here. All else of the CUDA devices is as it is on a GPU, but for two things: in
prefill, whose streams are one here, nothing is late, so that their order among each other is not tested; and logits are
copied to the host at once, so that no late test may ask for them.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hmad.compute import cuda_buffers, cuda_decode, cuda_prompt_graphs, cuda_shipping
from hmad.compute.checkpoint import open_weights, read_config
from hmad.compute.cuda_backend import CudaBackend
from hmad.compute.cuda_decode import CudaDecode
from hmad.compute.model import Qwen3

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


class HostAsDevice:
    """A stream of the host. It does at once what it is asked for; or, ``late``, nothing before somebody waits. What a
    GPU does lies between the two.
    """

    def __init__(self) -> None:
        self.late = False
        self._work: deque[Callable[[], object]] = deque()

    def do(self, run: Callable[[], object]) -> None:
        self._work.append(run)
        if not self.late:
            self.synchronize()

    def synchronize(self, until: Callable[[], object] | None = None) -> None:
        while self._work:
            run = self._work.popleft()
            run()
            if run is until:
                return

    def is_ahead(self, run: Callable[[], object]) -> bool:
        return run in self._work


STREAM = HostAsDevice()


class HostEvent:
    def __init__(self, **options: bool) -> None:
        self._happened_s = 0.0
        self._happen: Callable[[], object] = lambda: None

    def record(self, stream: "HostStream | None" = None) -> None:
        def happen() -> None:
            self._happened_s = time.perf_counter()

        self._happen = happen
        STREAM.do(happen)

    def synchronize(self) -> None:
        if STREAM.is_ahead(self._happen):
            STREAM.synchronize(self._happen)

    def elapsed_time(self, later: "HostEvent") -> float:
        return 1e3 * (later._happened_s - self._happened_s)


class HostStream:
    """All are one."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def synchronize(self) -> None:
        STREAM.synchronize()

    def wait_event(self, event: HostEvent) -> None:
        event.synchronize()


class UncapturedGraph:
    """What a graph would replay, called."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = torch.inference_mode()(run)

    def replay(self) -> None:
        STREAM.do(self._run)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host stand in for the device for as long as a test lasts; nothing, where there is a GPU."""
    if not INTERPRETED:
        return
    capture, bring, reset = CudaDecode._capture, cuda_buffers.Bundle._bring, cuda_decode.reset_counts

    def capture_at_once(*arguments: Any) -> Any:
        """A capture waits for the stream; what it runs is not of the host, and does not wait for events."""
        STREAM.synchronize()
        late, STREAM.late = STREAM.late, False
        graph = capture(*arguments)
        STREAM.late = late
        return graph

    def reset_in_order(*arguments: Any) -> None:
        STREAM.do(lambda: reset(*arguments))

    def nothing(*arguments: object) -> None:
        pass

    for name in ("synchronize", "set_stream", "empty_cache", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, "Stream", HostStream)
    monkeypatch.setattr(torch.cuda, "current_stream", HostStream)
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.Tensor, "record_stream", nothing)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(CudaDecode, "_capture", capture_at_once)
    monkeypatch.setattr(cuda_decode, "reset_counts", reset_in_order)
    monkeypatch.setattr(cuda_buffers.Bundle, "_bring", lambda *arguments: STREAM.do(lambda: bring(*arguments)))
    for module in (cuda_decode, cuda_prompt_graphs):
        monkeypatch.setattr(module, "captured", lambda run, pool: UncapturedGraph(run))
    monkeypatch.setattr(cuda_prompt_graphs, "can_be_captured", lambda dtype: True)  # what is not captured but called
    for module in (cuda_buffers, cuda_decode, cuda_shipping):
        monkeypatch.setattr(module, "pinned", lambda shape, dtype: torch.zeros(shape, dtype=dtype))


def model_on_device(checkpoint: Path, precision: str = "fp32") -> Qwen3:
    """By the kernels of the GPU."""
    config = read_config(checkpoint)
    weights = open_weights(checkpoint, config, "safetensors", 0, DEVICE)
    aligned: Any = SimpleNamespace(read=lambda name: weights.read(name).clone())  # as they are on a GPU
    return Qwen3(config, precision, aligned, CudaBackend(precision, DEVICE))
