"""Small arrays that travel together between host and device: one copy for all, ordered by the stream."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGN_BYTES = 16  # of every array, as kernels want it
TURNS = 2  # host copies: one is filled or read while the other is on its way


@dataclass(frozen=True)
class Field:
    """One array of a bundle."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Bundle:
    """Arrays by name, in one block of device memory and in pinned copies of it that take turns.

    Whoever uses a turn again has made sure that the copies of its last use are done.
    """

    def __init__(self, fields: Mapping[str, Field], device: torch.device) -> None:
        starts, size = {}, 0
        for name, field in fields.items():
            starts[name] = size
            size += -(-field.num_bytes // ALIGN_BYTES) * ALIGN_BYTES

        def views(memory: Tensor) -> dict[str, Tensor]:
            return {
                name: memory[starts[name] : starts[name] + field.num_bytes].view(field.dtype).view(field.shape)
                for name, field in fields.items()
            }

        self._starts = starts
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._host = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(TURNS)]
        self.on_device = views(self._device)
        self._arrays: list[dict[str, np.ndarray]] = [
            {name: view.numpy() for name, view in views(memory).items()} for memory in self._host
        ]
        self._turn = 0

    def next_turn(self) -> dict[str, np.ndarray]:
        """The host's arrays of the next copy."""
        self._turn = (self._turn + 1) % TURNS
        return self._arrays[self._turn]

    def upload(self, up_to: tuple[str, int] | None = None) -> None:
        """Bring this turn's arrays to the device, after what the current stream has to do before. ``up_to`` names one
        of them and how many of its values there are: nothing behind these is brought.
        """
        device, host = self._device, self._host[self._turn]
        if up_to is not None:
            name, length = up_to
            end = self._starts[name] + length * self._arrays[self._turn][name].itemsize
            device, host = device[:end], host[:end]
        device.copy_(host, non_blocking=True)

    def download(self) -> None:
        """Bring the device's arrays to this turn's, after what the current stream has to do before."""
        self._host[self._turn].copy_(self._device, non_blocking=True)
