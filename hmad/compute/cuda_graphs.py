"""Captured graphs: many launches for the price of one.

torch's context manager would collect garbage before each capture, and hold up the event loop; so captures begin and end
by hand here. Other threads go on copying meanwhile: only the capturing thread's calls are part of a capture.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hmad.compute.model import Attend, Qwen3

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


class LayerGraphs:
    """A forward pass of prefill in captured pieces, for batches so small that launching them one kernel after the other
    would take longer than they compute. Attention is not captured: its shapes are those of the prompts.

    Piece i is what stands between the attention of layer i - 1 and that of layer i, rotary embedding included; the last
    one ends with the final norm. Whoever reads the K and V of layer i on another stream has done so before piece i + 2
    is launched.
    """

    STEPS = ((64, 16), (512, 64), (1024, 128), (2048, 256))
    MAX_ROWS = 2048

    def __init__(self, model: Qwen3, max_rows: int) -> None:
        config, device = model.config, model.device
        self._model = model
        self._pool: Pool = torch.cuda.graph_pool_handle()
        self.max_rows = min(max_rows, self.MAX_ROWS)
        self._buckets = buckets_up_to(self.max_rows, self.STEPS)
        self._pieces: dict[int, list[torch.cuda.CUDAGraph]] = {}

        def room(width: int) -> Tensor:
            return torch.zeros((self.max_rows, width), dtype=model.dtype, device=device)

        self._positions = torch.zeros(self.max_rows, dtype=torch.int64, device=device)
        self._residual, self._hidden = room(config.hidden_size), room(config.hidden_size)
        self._attended = room(config.num_heads * config.head_dim)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._products = (room(width), room(width))  # of layers with even and odd numbers

    def capture_all(self) -> None:
        """So that no request waits for it; the largest first, whose memory the others share."""
        for num_rows in reversed(self._buckets):
            self._pieces_for(num_rows)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, before_layer: Callable[[int], None]
    ) -> Tensor:
        """What ``Qwen3.forward`` does, for up to ``max_rows`` rows."""
        num_rows = len(token_ids)
        pieces = self._pieces_for(next(size for size in self._buckets if size >= num_rows))
        self._residual[:num_rows] = self._model.embed(token_ids)
        self._positions[:num_rows] = positions
        for layer_id, piece in enumerate(pieces[:-1]):
            before_layer(layer_id)
            piece.replay()
            product = self._products[layer_id % 2][:num_rows]
            attended = attend(layer_id, self._model.projected(layer_id, product, None, is_rotated=True))
            self._attended[:num_rows] = attended.view(num_rows, -1)
        pieces[-1].replay()
        return self._hidden[:num_rows]

    def _pieces_for(self, num_rows: int) -> list[torch.cuda.CUDAGraph]:
        pieces = self._pieces.get(num_rows)
        if pieces is None:
            for number in (0, 1, self._model.config.num_layers):
                self._run(number, num_rows)
            torch.cuda.current_stream().synchronize()
            numbers = range(self._model.config.num_layers + 1)
            pieces = [captured(lambda n=number: self._run(n, num_rows), self._pool) for number in numbers]  # type: ignore[misc]
            self._pieces[num_rows] = pieces
        return pieces

    def _run(self, number: int, num_rows: int) -> None:
        """One piece over padded rows, whose content is arbitrary: rows do not see each other here."""
        model, residual = self._model, self._residual[:num_rows]
        delta = model.feed_forward(number - 1, residual, self._attended[:num_rows]) if number else None
        if number == model.config.num_layers:
            self._hidden[:num_rows] = model.finish(residual, delta)
        else:
            angles = model.angles(self._positions[:num_rows])
            rows = model.projected(number, model.project(number, residual, delta), angles)
            self._products[number % 2][:num_rows] = model.rotate(rows)
