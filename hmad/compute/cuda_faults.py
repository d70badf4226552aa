"""Errors of a CUDA device in our words."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hmad.facts.errors import DeviceFault

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


@contextmanager
def fatal_faults() -> Iterator[None]:
    """Name what no call on this device survives, such as an illegal access. A lack of memory passes through: it costs
    one batch or step.
    """
    try:
        yield
    except torch.AcceleratorError as error:
        if getattr(error, "error_code", None) == OUT_OF_MEMORY:  # of pinned memory, or of a graph
            raise
        raise DeviceFault(f"the device has failed, and everything on it is lost: {error}") from error
