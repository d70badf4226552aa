"""What the lanes of a GPU's arena receive, beside those of the host's."""

import threading

import numpy as np
import pytest
import torch
from decoders import PATIENCE_S

from hmad.compute.arena import Arena
from hmad.compute.cuda_landing import CudaLanding
from hmad.compute.landing import HostLane
from hmad.facts.errors import LocalError
from hmad.facts.formats import FORMATS, KVGeometry

GEOMETRY = KVGeometry(6, 2, 64)
NUM_SLOTS = 200
LAYER_BYTES = 1 << 20


def arena_on(device: torch.device) -> Arena:
    arena = Arena(GEOMETRY, NUM_SLOTS * GEOMETRY.num_layers * GEOMETRY.slot_bytes, device)
    arena.bytes.zero_()
    return arena


def lands_as_on_the_host(device: torch.device) -> None:
    """Frames of one to three layers, in every format, of some or all heads, into slots in any order, by two lanes."""
    arena, expected = arena_on(device), arena_on(torch.device("cpu"))
    freed = threading.Event()
    failures: list[Exception] = []
    landing = CudaLanding(arena, LAYER_BYTES, 4 * LAYER_BYTES, failures.append)
    lanes = [landing.open_lane(freed.set) for _ in range(2)]
    with pytest.raises(LocalError, match="landing memory for one more bulk channel"):
        landing.open_lane(freed.set)
    rng = np.random.default_rng(0)
    for number in range(60):
        lane, fmt = lanes[number % 2], list(FORMATS.values())[number % 6]
        layers = range(number % 6, min(GEOMETRY.num_layers, number % 6 + 1 + number % 3))
        slots = rng.permutation(NUM_SLOTS)[: 1 + number % 30].astype(np.int32)
        if number % 3:
            slots.sort()
        first_head, num_heads = ((0, 2), (1, 1), (0, 1))[number // 2 % 3]
        while not lane.is_free:
            assert freed.wait(PATIENCE_S)
            freed.clear()
        num_bytes = len(layers) * len(slots) * GEOMETRY.block_bytes(fmt, num_heads)
        payload = rng.integers(0, 256, num_bytes, dtype=np.uint8)
        for where in (lane, HostLane(expected)):
            start = 0
            for view in where.place(layers, slots, fmt, first_head, num_heads):
                view[:] = payload[start : start + len(view)].data
                start += len(view)
            assert start == num_bytes
            where.store()
    stored = threading.Event()
    landing.when_stored(stored.set)
    assert stored.wait(PATIENCE_S)
    assert torch.equal(arena.bytes.cpu(), expected.bytes)
    lanes[0].close()
    landing.when_stored(stored.set)
    landing.close()
    assert failures == []
