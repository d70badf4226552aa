"""A real node that breaks when told to: SIGUSR1 makes its device's next call never return, SIGUSR2 its engine die,
SIGURG its GPU write where it must not.

Run as ``python faulty_node.py --role decode ...``; everything else is the node as it is.
"""

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from hmad.compute.cpu import CpuDecode, CpuPrefill
from hmad.edges import cli
from hmad.roles.decode_engine import DecodeEngine

hanging = threading.Event()
dying = threading.Event()
straying = threading.Event()


def hangs_when_told(call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        if hanging.is_set():
            threading.Event().wait()
        return call(*arguments)

    return wrapped


def dies_when_told(call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        if dying.is_set():
            raise KeyError("a bug in the engine's books")
        return call(*arguments)

    return wrapped


def strays_when_told(replay: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(device: Any, *arguments: Any) -> Any:
        if straying.is_set():
            device._on_device["blocks"].fill_(1 << 30)  # slots that no arena has
        return replay(device, *arguments)

    return wrapped


if __name__ == "__main__":
    signal.signal(signal.SIGURG, lambda *_: straying.set())
    if torch.cuda.is_available():
        from hmad.compute.cuda_decode import CudaDecode

        CudaDecode._replay = strays_when_told(CudaDecode._replay)  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, lambda *_: hanging.set())
    signal.signal(signal.SIGUSR2, lambda *_: dying.set())
    CpuDecode.launch = hangs_when_told(CpuDecode.launch)  # type: ignore[method-assign]
    CpuPrefill.prefill = hangs_when_told(CpuPrefill.prefill)  # type: ignore[method-assign]
    DecodeEngine._compose = dies_when_told(DecodeEngine._compose)  # type: ignore[method-assign]
    sys.exit(cli.main())
