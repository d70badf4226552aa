"""The prefill node's wire staging: fixed pages that hold encoded blocks until the decode node has them.

Full staging slows prefill down (``acquire`` waits); memory never grows.
"""

import threading

import numpy as np
import torch

from hmad.compute.cuda_faults import lacks_memory
from hmad.facts.config import GIB
from hmad.facts.errors import ConfigError, LocalError


class StagingPool:
    """A pool of equal pages. The engine thread acquires, any thread releases."""

    def __init__(self, staging_bytes: int, page_bytes: int, *, pinned: bool = False) -> None:
        self.page_bytes = page_bytes
        self.num_pages = staging_bytes // page_bytes
        if self.num_pages < 1:
            raise ConfigError(f"staging-bytes = {staging_bytes} is less than one frame of {page_bytes} bytes: raise it")
        # Pinned where a device copies into it: uint8 [num_pages, page_bytes].
        try:
            self.memory = torch.empty((self.num_pages, page_bytes), dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError) and not lacks_memory(error):
                raise
            size, kind = f"{staging_bytes / GIB:.2f} GiB", "pinned memory" if pinned else "memory"
            raise ConfigError(
                f"this machine does not give {size} of {kind}: lower --staging-bytes ({error})"
            ) from error
        self._pages: list[np.ndarray] = list(self.memory.numpy())
        self._free = list(range(self.num_pages))  # last in, first out: a page that is still in cache is taken first
        self._used: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False
        self.is_waited_for = False  # the engine can only go on once a page comes back

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def acquire(self) -> int:
        """A page's number; waits while all pages are on the wire. Raises LocalError once the pool is closed."""
        with self._changed:
            self.is_waited_for = not self._free
            self._changed.wait_for(lambda: self._free or self._closed)
            self.is_waited_for = False
            if self._closed:
                raise LocalError("staging is closed: the node is stopping")
            number = self._free.pop()
            self._used.add(number)
            return number

    def page(self, number: int) -> np.ndarray:
        """uint8 [page_bytes] of one page."""
        return self._pages[number]

    def release(self, number: int) -> None:
        with self._changed:
            if number not in self._used:
                raise LocalError(f"staging page {number} was released twice, or never acquired")
            self._used.remove(number)
            self._free.append(number)
            self._changed.notify()

    def close(self) -> None:
        """Wake a waiting engine, so that it can end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
