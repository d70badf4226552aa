"""Captured graphs: many launches for the price of one.

torch's context manager would collect garbage before each capture, and hold up the event loop; so captures begin and end
by hand here. Other threads go on copying meanwhile: only the capturing thread's calls are part of a capture.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Pool: TypeAlias = Any  # what torch.cuda.graph_pool_handle returns


def captured(run: Callable[[], object], pool: Pool) -> torch.cuda.CUDAGraph:
    """What ``run`` launches, on the current stream, which is not the default one. It has run before: kernels are
    compiled, libraries have chosen theirs.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        run()
    finally:
        graph.capture_end()
    return graph


def buckets_up_to(most: int, steps: tuple[tuple[int, int], ...]) -> list[int]:
    """Sizes that graphs are captured for, the last of them ``most``; ``steps`` are (up to, in steps of)."""
    sizes, size = [], 0
    for up_to, step in steps:
        while size < min(up_to, most):
            size = min((size // step + 1) * step, most)
            sizes.append(size)
    return sizes
