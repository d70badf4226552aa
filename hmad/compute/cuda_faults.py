"""Errors of a CUDA device in our words."""

from typing import Final

import torch

from hmad.facts.errors import DeviceFault

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


def lacks_memory(error: BaseException) -> bool:
    """Whether the device, or the host for it, had no memory left: of any kind, that of a graph too."""
    return isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) == OUT_OF_MEMORY


class FatalFaults:
    """A context that names what no call on this device survives, such as an illegal access. A lack of memory passes
    through: it costs one batch or step.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if not isinstance(error, torch.AcceleratorError) or lacks_memory(error):
            return
        raise DeviceFault(f"the device has failed, and everything on it is lost: {error}") from error


fatal_faults: Final = FatalFaults()
