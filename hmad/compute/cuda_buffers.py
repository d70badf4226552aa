"""Small arrays that travel together between host and device: one copy for all, ordered by the stream."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle

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


@dataclass(frozen=True)
class PinnedCopy:
    """One pinned copy of a bundle."""

    memory: Tensor
    bytes: np.ndarray  # the same
    arrays: dict[str, np.ndarray]


class Bundle:
    """Arrays by name, in one block of device memory, on the host, and in pinned copies of it that take turns.

    What is to be uploaded is written to ``arrays``, which keep it: only what changes is written again. Whoever uses a
    turn again has made sure that the copies of its last use are done.
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

        def arrays_of(memory: Tensor) -> dict[str, np.ndarray]:
            return {name: view.numpy() for name, view in views(memory).items()}

        self._starts = starts
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.on_device = views(self._device)
        values = torch.zeros(size, dtype=torch.uint8)
        self._values = values.numpy()
        self.arrays = arrays_of(values)
        pinned = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(TURNS)]
        self._turns = cycle([PinnedCopy(memory, memory.numpy(), arrays_of(memory)) for memory in pinned])

    def upload(self, up_to: tuple[str, int] | None = None) -> None:
        """Bring the host's arrays to the device, after what the current stream has to do before. ``up_to`` names one
        of them and how many of its values there are: nothing behind these is brought.
        """
        turn = next(self._turns)
        if up_to is None:
            turn.bytes[:] = self._values
            self._device.copy_(turn.memory, non_blocking=True)
        else:
            name, length = up_to
            end = self._starts[name] + length * self.arrays[name].itemsize
            turn.bytes[:end] = self._values[:end]
            self._device[:end].copy_(turn.memory[:end], non_blocking=True)

    def download(self) -> dict[str, np.ndarray]:
        """Bring the device's arrays to those returned, after what the current stream has to do before."""
        turn = next(self._turns)
        turn.memory.copy_(self._device, non_blocking=True)
        return turn.arrays
