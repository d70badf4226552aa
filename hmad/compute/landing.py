"""How a LAYER's bytes come into the arena: the seam between the wire and the memory of a device."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from hmad.compute.arena import Arena
from hmad.facts.formats import KVFormat


class Lane(Protocol):
    """Where the LAYERs of one bulk connection land, one after the other. Belongs to the loop's thread."""

    @property
    def is_free(self) -> bool:
        """Whether the next LAYER has room. If not, ``when_free`` is called once it has, and perhaps before."""

    def place(
        self, layers: range, slots: np.ndarray, fmt: KVFormat, first_head: int, num_heads: int
    ) -> list[memoryview]:
        """Where the bytes of these layers, blocks and heads are to be received, in wire order. LocalError unless it is
        free.
        """

    def store(self) -> None:
        """What was received into the last ``place`` is verified: bring it to its slots."""

    def close(self) -> None:
        """The connection is gone."""


class Landing(Protocol):
    """All lanes into one arena."""

    def open_lane(self, when_free: Callable[[], object]) -> Lane:
        """A lane for one more connection; ``when_free`` may be called on any thread. Raises LocalError when there is no
        memory for one.
        """

    def when_stored(self, then: Callable[[], object]) -> None:
        """Call ``then``, on any thread, once everything given to ``store`` so far lies in its slots."""

    def close(self) -> None:
        """No lane is used any more."""


class HostLanding:
    """An arena in the host's memory: bytes are received straight into their slots."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def open_lane(self, when_free: Callable[[], object]) -> "HostLane":
        return HostLane(self._arena)

    def when_stored(self, then: Callable[[], object]) -> None:
        then()

    def close(self) -> None:
        pass


class HostLane:
    """Every lane of a host's arena: there is nothing to wait for."""

    is_free = True

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._bytes = arena.bytes.numpy().data.cast("B")

    def place(
        self, layers: range, slots: np.ndarray, fmt: KVFormat, first_head: int, num_heads: int
    ) -> list[memoryview]:
        """The arena's own memory: one view per contiguous run."""
        geometry = self._arena.geometry
        stride = geometry.slot_bytes
        offset, size = geometry.block_bytes(fmt, first_head), geometry.block_bytes(fmt, num_heads)
        in_layer, layer_bytes = [offset + slot * stride for slot in slots.tolist()], self._arena.num_slots * stride
        starts = [layer_id * layer_bytes + start for layer_id in layers for start in in_layer]
        return [self._bytes[start:end] for start, end in merge_runs(starts, size)]

    def store(self) -> None:
        pass

    def close(self) -> None:
        pass


def merge_runs(starts: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Join [start, start + size) ranges that touch, keeping their order."""
    merged: list[tuple[int, int]] = []
    for start in starts:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], start + size)
        else:
            merged.append((start, start + size))
    return merged
