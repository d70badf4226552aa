"""Where there is no GPU: Triton's interpreter runs the kernels, a captured graph is the call that would have been
captured, and a stream is what stands here. All else of the CUDA devices is as it is on a GPU, but for two things: in
prefill, whose streams are one here, nothing is late, so that their order among each other is not tested; and logits are
copied to the host at once, so that no late test may ask for them.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hmad.compute import cuda_buffers, cuda_decode, cuda_prefill_graphs, cuda_shipping
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
    for module in (cuda_decode, cuda_prefill_graphs):
        monkeypatch.setattr(module, "captured", lambda run, pool: UncapturedGraph(run))
    monkeypatch.setattr(cuda_prefill_graphs, "can_be_captured", lambda dtype: True)  # what is not captured but called
    monkeypatch.setattr(cuda_buffers, "pinned_page", lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
    for module in (cuda_buffers, cuda_decode, cuda_shipping):
        monkeypatch.setattr(module, "pinned", lambda shape, dtype: torch.zeros(shape, dtype=dtype))


class LateStream(HostStream):
    """Does nothing before somebody waits for it."""

    current: "LateStream | None" = None

    def __init__(self, device: torch.device | None = None) -> None:
        self.is_late = False
        self._work: deque[Callable[[], object]] = deque()
        self._lock = threading.RLock()

    def do(self, run: Callable[[], object]) -> None:
        self._work.append(run)
        if not self.is_late:
            self.synchronize()

    def synchronize(self, until: "LateEvent | None" = None) -> None:
        with self._lock:
            while self._work and not (until and until.happened):
                self._work.popleft()()

    def wait_event(self, event: HostEvent) -> None:
        assert isinstance(event, LateEvent)
        event.stream.synchronize(until=event)


class LateEvent(HostEvent):
    stream: LateStream
    happened = False

    def record(self, stream: HostStream | None = None) -> None:
        into = stream or LateStream.current
        assert isinstance(into, LateStream)
        self.stream = into

        def happen() -> None:
            self._happened_s, self.happened = time.perf_counter(), True

        into.do(happen)

    def synchronize(self) -> None:
        """Other threads wait for what the thread that launches waits for."""
        while not self.happened and threading.current_thread() is not threading.main_thread():
            time.sleep(0.001)
        self.stream.synchronize(until=self)


def side_stream_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What prefill packs and copies happens at the last moment: when the compute stream waits for it, or the batch
    ends. Comes after ``stand_in``.
    """
    begin, finish = cuda_shipping.Shipping.layers_begin, cuda_shipping.Shipping.finish
    copy, pack = torch.Tensor.copy_, cuda_shipping.pack_blocks

    @contextmanager
    def stream(entered: LateStream) -> Iterator[None]:
        before, LateStream.current = LateStream.current, entered
        yield
        LateStream.current = before

    def launch(run: Callable[[], object]) -> None:
        assert LateStream.current is not None
        LateStream.current.do(run)

    def copy_late(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return copy(target, source)
        launch(lambda: copy(target, source))
        return target

    def begin_late(shipping: cuda_shipping.Shipping) -> None:
        side: Any = shipping._way.side_stream
        side.is_late = True
        begin(shipping)

    def finish_in_time(shipping: cuda_shipping.Shipping) -> None:
        side: Any = shipping._way.side_stream
        side.is_late = False
        side.synchronize()
        finish(shipping)

    monkeypatch.setattr(torch.cuda, "Stream", LateStream)
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_late)
    monkeypatch.setattr(cuda_shipping, "pack_blocks", lambda *arguments: launch(lambda: pack(*arguments)))
    monkeypatch.setattr(cuda_shipping.Shipping, "layers_begin", begin_late)
    monkeypatch.setattr(cuda_shipping.Shipping, "finish", finish_in_time)


def model_on_device(checkpoint: Path, precision: str = "fp32") -> Qwen3:
    """By the kernels of the GPU."""
    config = read_config(checkpoint)
    weights = open_weights(checkpoint, config, "safetensors", 0, DEVICE)
    aligned: Any = SimpleNamespace(read=lambda name: weights.read(name).clone())  # as they are on a GPU
    return Qwen3(config, precision, aligned, CudaBackend(precision, DEVICE))
