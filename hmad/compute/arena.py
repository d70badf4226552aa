"""The decode node's memory: one flat uint8 allocation on its device, indexed [layer][slot][slot_bytes].

One slot id spans all layers. Slots are reference-counted, so that the choices of one request share its raw prefix.
The allocator stores only the reference counts and derives the rest from them.
"""

from collections.abc import Iterable

import numpy as np
import torch

from hmad.facts.errors import ConfigError, LocalError
from hmad.facts.formats import KVGeometry


class ArenaFull(LocalError):
    """Fewer free slots than were asked for: nothing was reserved."""


def free_runs(free_slots: np.ndarray) -> list[np.ndarray]:
    """Split ascending slot ids into their contiguous runs."""
    return np.split(free_slots, np.flatnonzero(np.diff(free_slots) != 1) + 1) if free_slots.size else []


def pick_slots(free_slots: np.ndarray, num_slots: int) -> np.ndarray:
    """Choose ``num_slots`` of the ascending free ids in as few runs as possible: best fit, else largest first."""
    runs = sorted(free_runs(free_slots), key=len)
    fitting = next((run for run in runs if len(run) >= num_slots), None)
    if fitting is not None:
        return fitting[:num_slots]
    return np.concatenate(runs[::-1])[:num_slots]


class Arena:
    """Slots for KV blocks of any format. Not thread-safe: reserve, retain and release belong to one thread."""

    def __init__(self, geometry: KVGeometry, arena_bytes: int, device: str | torch.device = "cpu") -> None:
        self.geometry = geometry
        self.num_slots = arena_bytes // (geometry.num_layers * geometry.slot_bytes)
        if self.num_slots < 1:
            raise ConfigError(
                f"arena-bytes = {arena_bytes} is less than one slot of this model "
                f"({geometry.num_layers} layers x {geometry.slot_bytes} bytes): give the arena more memory"
            )
        shape = (geometry.num_layers, self.num_slots, geometry.slot_bytes)
        self.bytes = torch.empty(shape, dtype=torch.uint8, device=device)
        self._references = np.zeros(self.num_slots, dtype=np.int32)

    @property
    def free_slots(self) -> int:
        return self.num_slots - int(np.count_nonzero(self._references))

    @property
    def used_slots(self) -> int:
        return int(np.count_nonzero(self._references))

    def reserve(self, num_slots: int) -> np.ndarray:
        """Take ``num_slots`` slots, each with one reference; int32 ids. Raises ArenaFull and takes none."""
        free = np.flatnonzero(self._references == 0)
        if len(free) < num_slots:
            raise ArenaFull(f"{num_slots} slots asked for, {len(free)} of {self.num_slots} free")
        slots = pick_slots(free, num_slots).astype(np.int32) if num_slots else np.empty(0, np.int32)
        self._references[slots] = 1
        return slots

    def retain(self, slots: np.ndarray) -> None:
        """One more owner of each slot."""
        self._require_used(slots)
        self._references[slots] += 1

    def release(self, slots: np.ndarray) -> None:
        """One owner less; a slot without owners is free."""
        self._require_used(slots)
        self._references[slots] -= 1

    def _require_used(self, slots: np.ndarray) -> None:
        if len(slots) and int(self._references[slots].min()) < 1:
            raise LocalError("a slot that nobody owns was retained or released")

    def layer(self, layer_id: int) -> torch.Tensor:
        """uint8 [num_slots, slot_bytes] of one layer."""
        return self.bytes[layer_id]

    def check_integrity(self, owners: Iterable[np.ndarray]) -> None:
        """Raise LocalError unless the reference counts are exactly those of the given owners' slots."""
        expected = np.zeros_like(self._references)
        for slots in owners:
            np.add.at(expected, slots, 1)
        if not np.array_equal(expected, self._references):
            wrong = np.flatnonzero(expected != self._references)
            raise LocalError(
                f"arena: {len(wrong)} slots have another reference count than their owners, e.g. {wrong[:8]}"
            )
