"""Small arrays between host and device: up in one copy, ordered by the stream; down as kernels write them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

ALIGN_BYTES = 16  # of every array, as kernels want it
TURNS = 2  # copies on the host: one is filled or read while the other is on its way


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in host memory that the device reads and writes by itself."""
    return torch.zeros(shape, dtype=dtype, pin_memory=True)


def pinned_page(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] of such memory, whatever it holds."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def brought(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """int64 [n] on the device, behind what the current stream has to do before; nobody waits for it."""
    on_host = pinned((len(values),), torch.int64)
    on_host.numpy()[:] = values
    return on_host.to(device, non_blocking=True)  # torch keeps the pinned memory until it is read


def fetched(*tensors: Tensor) -> list[np.ndarray]:
    """Their values on the host, once the current stream is through. Only the caller waits, by an event: a copy into
    memory that is not pinned waits inside the driver, and holds up every other thread of the process meanwhile.
    """
    on_host = [pinned_page(tensor.nbytes).view(tensor.dtype).view(tensor.shape) for tensor in tensors]
    for values, tensor in zip(on_host, tensors, strict=True):
        values.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event(blocking=True)
    done.record()
    done.synchronize()
    return [values.numpy() for values in on_host]


@dataclass(frozen=True)
class Field:
    """One array of a bundle."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Bundle:
    """Arrays by name, in one block of device memory and on the host, which brings all of them at once.

    What is to be uploaded is written to ``arrays``. The pinned copies that it passes through take turns: whoever
    uploads again has made sure that the upload so many ``turns`` ago is done.
    """

    def __init__(self, fields: Mapping[str, Field], device: torch.device, turns: int = TURNS) -> None:
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
        self.on_device = views(self._device)
        values = torch.zeros(size, dtype=torch.uint8)
        self._values = values.numpy()
        self.arrays = {name: view.numpy() for name, view in views(values).items()}
        self._turns = cycle([pinned((size,), torch.uint8) for _ in range(turns)])

    def upload(self, up_to: tuple[str, int] | None = None) -> None:
        """Bring the host's arrays to the device, after what the current stream has to do before. ``up_to`` names one
        of them and how many of its values there are: nothing behind these is brought.
        """
        turn, end = next(self._turns), len(self._values)
        if up_to is not None:
            name, length = up_to
            end = self._starts[name] + length * self.arrays[name].itemsize
        turn.numpy()[:end] = self._values[:end]
        self._bring(turn[:end])

    def _bring(self, values: Tensor) -> None:
        self._device[: len(values)].copy_(values, non_blocking=True)
