"""Prefill of short prompts in captured graphs, attention included."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hmad.compute.cuda_attention import AttentionRun, can_be_captured, packed_attention
from hmad.compute.cuda_buffers import Bundle, Field
from hmad.compute.cuda_graphs import Pool, buckets_up_to, captured
from hmad.compute.device import PackedChunks
from hmad.compute.model import Projected, Qwen3

ALIGN_ROWS = 16  # of all that graphs are captured for
Ship: TypeAlias = Callable[[range, Tensor, Tensor], None]


class PromptGraphs:
    """A forward pass over whole prompts in captured pieces, for batches so small that launching one kernel after the
    other would take longer than they compute.

    A piece begins with the attention of the last layer before its own, and ends when K and V of all its layers are
    there, side by side, to be packed in one launch. Pieces take turns at two buffers: whoever reads the K and V of
    piece i on another stream has done so before piece i + 2 is launched. The last piece ends with the final norm. Rows
    beyond the batch are one more prompt, of arbitrary tokens.
    """

    STEPS = ((64, 16), (512, 64), (1024, 128), (2048, 256))
    MAX_ROWS = 2048
    PIECE_ROWS = 2048  # times layers: about a millisecond of work, and whoever watches over progress waits for no more
    MOST_LAYERS = 12  # of a piece: a third of Qwen3-8B's, so that most of a short prompt leaves while it is computed
    MOST_PROMPTS = 32  # each has a grid of attention for the longest there could be: with 64 a batch took 2 % longer

    def __init__(self, model: Qwen3, max_rows: int) -> None:
        config, device = model.config, model.device
        self._model = model
        self._pool: Pool = torch.cuda.graph_pool_handle()
        most = self.MAX_ROWS if can_be_captured(model.dtype) else 0
        self.max_rows = min(-(-max_rows // ALIGN_ROWS) * ALIGN_ROWS, most)
        self._buckets = buckets_up_to(self.max_rows, self.STEPS)
        self._pieces: dict[int, list[torch.cuda.CUDAGraph]] = {}

        def room(num_rows: int, width: int) -> Tensor:
            return torch.zeros((num_rows, width), dtype=model.dtype, device=device)

        self._given = Bundle(
            {
                "token_ids": Field(torch.int64, (self.max_rows,)),
                "positions": Field(torch.int64, (self.max_rows,)),
                "bounds": Field(torch.int32, (self.MOST_PROMPTS + 2,)),
            },
            device,
        )
        self._residual, self._hidden = (room(self.max_rows, config.hidden_size) for _ in range(2))
        most_rows = max((num_rows * self.layers_of_a_piece(num_rows) for num_rows in self._buckets), default=0)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._products = (room(most_rows, width), room(most_rows, width))  # of pieces with even and odd numbers

    def takes(self, packed: PackedChunks) -> bool:
        """Whether all of a batch are whole prompts, and it is small enough."""
        is_small = len(packed.token_ids) <= self.max_rows and len(packed) <= self.MOST_PROMPTS
        return is_small and all(chunk.sequence.history is None for chunk, _ in packed)

    def padded_rows(self, num_rows: int) -> int:
        """The rows of a pass over so many: those of one layer's K and V follow those of the layer before so far on."""
        return next(size for size in self._buckets if size >= num_rows)

    def layers_of_a_piece(self, padded_rows: int) -> int:
        """All pieces have as many."""
        most, num_layers = min(self.PIECE_ROWS // padded_rows, self.MOST_LAYERS), self._model.config.num_layers
        return max(count for count in range(1, max(most, 1) + 1) if num_layers % count == 0)

    def capture_all(self) -> None:
        """So that no request waits for it; the largest first, whose memory the others share."""
        for num_rows in reversed(self._buckets):
            self._pieces_for(num_rows)

    def forward(self, packed: PackedChunks, begins: Callable[[], None], ship: Ship) -> Tensor:
        """What ``Qwen3.forward`` does, for a batch that it ``takes``. ``begins`` hears of each piece before, ``ship``
        after it is launched: its layers, and their K and V [layers * padded rows, Hkv, D].
        """
        padded_rows = self.padded_rows(len(packed.token_ids))
        self._bring(packed, padded_rows)
        pieces = self._pieces_for(padded_rows)
        for number, piece in enumerate(pieces[:-1]):
            begins()
            piece.replay()
            _, k, v = self._model.heads(self._projected(number, padded_rows))
            ship(self._layers(number, padded_rows), k, v)
        pieces[-1].replay()
        return self._hidden[: len(packed.token_ids)]

    def _bring(self, packed: PackedChunks, padded_rows: int) -> None:
        arrays, num_rows = self._given.arrays, len(packed.token_ids)
        arrays["token_ids"][:num_rows] = packed.token_ids.numpy()
        arrays["positions"][:num_rows] = packed.positions.numpy()
        arrays["bounds"][:] = padded_rows
        arrays["bounds"][: len(packed)] = [rows.start for _, rows in packed]
        arrays["bounds"][len(packed)] = num_rows
        self._given.upload()

    def _layers(self, number: int, padded_rows: int) -> range:
        """Of a piece; the last one has none."""
        count = self.layers_of_a_piece(padded_rows)
        return range(number * count, min((number + 1) * count, self._model.config.num_layers))

    def _projected(self, number: int, padded_rows: int) -> Projected:
        """Heads of all layers of a piece."""
        num_rows = padded_rows * self.layers_of_a_piece(padded_rows)
        return self._model.projected(0, self._products[number % 2][:num_rows], None, is_rotated=True)

    def _pieces_for(self, padded_rows: int) -> list[torch.cuda.CUDAGraph]:
        pieces = self._pieces.get(padded_rows)
        if pieces is None:
            last = self._model.config.num_layers // self.layers_of_a_piece(padded_rows)
            for number in sorted({0, 1, last}):
                self._run(number, padded_rows)
            torch.cuda.current_stream().synchronize()
            pieces = [captured(partial(self._run, number, padded_rows), self._pool) for number in range(last + 1)]
            self._pieces[padded_rows] = pieces
        return pieces

    def _run(self, number: int, padded_rows: int) -> None:
        """One piece."""
        model, given, layers = self._model, self._given.on_device, self._layers(number, padded_rows)
        residual = self._residual[:padded_rows]
        if number == 0:
            residual.copy_(model.embed(given["token_ids"][:padded_rows]))
        angles = model.angles(given["positions"][:padded_rows])
        for layer_id in layers:
            delta = self._complete(layer_id - 1, padded_rows) if layer_id else None
            rows = model.projected(layer_id, model.project(layer_id, residual, delta), angles)
            self._product_of(layer_id, padded_rows).copy_(model.rotate(rows))
        if not layers:
            delta = self._complete(model.config.num_layers - 1, padded_rows)
            self._hidden[:padded_rows] = model.finish(residual, delta)

    def _complete(self, layer_id: int, padded_rows: int) -> Any:
        """A layer from its attention on; what its MLP adds."""
        bounds = self._given.on_device["bounds"]
        whole = AttentionRun(slice(0, padded_rows), None, bounds, bounds, padded_rows, padded_rows)
        product = self._product_of(layer_id, padded_rows)
        q, k, v = self._model.heads(self._model.projected(layer_id, product, None, is_rotated=True))
        attended = packed_attention(q, k, v, whole).reshape(padded_rows, -1)
        return self._model.feed_forward(layer_id, self._residual[:padded_rows], attended)

    def _product_of(self, layer_id: int, padded_rows: int) -> Tensor:
        number, place = divmod(layer_id, self.layers_of_a_piece(padded_rows))
        return self._products[number % 2][place * padded_rows : (place + 1) * padded_rows]
