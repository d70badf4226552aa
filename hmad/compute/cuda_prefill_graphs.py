"""Prefill of small batches in captured graphs: launched one after the other, their kernels would take longer than they
compute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hmad.compute import cuda_shipping
from hmad.compute.cuda_attention import AttentionRun, attend, can_be_captured, packed_attention, plan_attention
from hmad.compute.cuda_buffers import Bundle, Field
from hmad.compute.cuda_graphs import Pool, buckets_up_to, captured
from hmad.compute.cuda_shipping import Layout
from hmad.compute.device import PackedChunks
from hmad.compute.model import Qwen3

ALIGN_ROWS = 16  # of all that graphs are captured for
Ship: TypeAlias = Callable[[range, Tensor, Tensor], None]


@dataclass(frozen=True)
class Shape:
    """What graphs are captured for: passes over so many rows, in pieces of so many layers, attention in them or not."""

    padded_rows: int
    layers_of_a_piece: int
    attends: bool

    @property
    def layout(self) -> Layout:
        return Layout(self.layers_of_a_piece, self.padded_rows)


class PrefillGraphs:
    """A forward pass in captured pieces, for batches of up to ``max_rows`` rows.

    A piece begins with what follows the K and V of the layer before its own, attention included where all of a batch
    are whole prompts, and not too many. It ends when K and V of all its layers are there, side by side, to be packed in
    one launch. Where attention is launched between pieces, since its shapes are those of the chunks, a piece has one
    layer. The last piece has none, and ends with the final norm.

    Pieces take turns at two buffers: the device has read K and V of piece i on other streams before it begins piece
    i + 2. Rows beyond the batch are one more prompt, of arbitrary tokens.
    """

    STEPS = ((64, 16), (512, 64), (1024, 128), (2048, 256))
    MAX_ROWS = 2048
    # As many as are shipped and told of together; a divisor of the model's, so that all pieces have as many.
    MOST_LAYERS, PIECE_LAYER_ROWS = cuda_shipping.MOST_LAYERS, cuda_shipping.LAYER_ROWS_TOLD
    MOST_PROMPTS = 32  # each has a grid of attention for the longest there could be: with 64 a batch took 2 % longer

    def __init__(self, model: Qwen3, max_rows: int) -> None:
        config, device = model.config, model.device
        self._model = model
        self._pool: Pool = torch.cuda.graph_pool_handle()
        self.max_rows = min(-(-max_rows // ALIGN_ROWS) * ALIGN_ROWS, self.MAX_ROWS)
        self._buckets = buckets_up_to(self.max_rows, self.STEPS)
        self._pieces: dict[Shape, list[torch.cuda.CUDAGraph]] = {}

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
        self._attended = room(self.max_rows, config.num_heads * config.head_dim)  # where it is launched
        most_rows = max(rows * self._shape(rows, attends=True).layers_of_a_piece for rows in self._buckets)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._products = (room(most_rows, width), room(most_rows, width))  # of pieces with even and odd numbers

    def shape_of(self, packed: PackedChunks) -> Shape | None:
        """None of a batch that is launched kernel by kernel."""
        num_rows = len(packed.token_ids)
        if num_rows > self.max_rows:
            return None
        are_whole = all(c.is_last and not c.start and c.sequence.history is None for c, _ in packed)
        attends = are_whole and packed.num_chunks <= self.MOST_PROMPTS and can_be_captured(self._model.dtype)
        return self._shape(next(size for size in self._buckets if size >= num_rows), attends=attends)

    def _shape(self, padded_rows: int, *, attends: bool) -> Shape:
        most = min(self.PIECE_LAYER_ROWS // padded_rows, self.MOST_LAYERS) if attends else 1
        num_layers = self._model.config.num_layers
        return Shape(padded_rows, max(n for n in range(1, max(most, 1) + 1) if num_layers % n == 0), attends)

    def capture_all(self) -> None:
        """So that no request waits for it; the largest first, whose memory the others share."""
        for num_rows in reversed(self._buckets):
            for attends in {False, can_be_captured(self._model.dtype)}:
                self._pieces_for(self._shape(num_rows, attends=attends))

    def forward(self, packed: PackedChunks, shape: Shape, begins: Callable[[], None], ship: Ship) -> Tensor:
        """What ``Qwen3.forward`` does. ``begins`` hears of each piece before it is launched, ``ship`` after: of its
        layers, and their K and V [layers * padded rows, Hkv, D].
        """
        num_rows = len(packed.token_ids)
        self._bring(packed, shape)
        runs = [] if shape.attends else plan_attention(packed, self._model.device)
        pieces = self._pieces_for(shape)
        for number, piece in enumerate(pieces[:-1]):
            begins()
            piece.replay()
            layers = self._layers(number, shape)
            q, k, v = self._heads(self._products[number % 2][: len(layers) * shape.padded_rows])
            ship(layers, k, v)
            if not shape.attends:
                out = attend(layers.start, runs, q[:num_rows], k[:num_rows], v[:num_rows])
                self._attended[:num_rows] = out.view(num_rows, -1)
        pieces[-1].replay()
        return self._hidden[:num_rows]

    def _bring(self, packed: PackedChunks, shape: Shape) -> None:
        arrays, num_rows = self._given.arrays, len(packed.token_ids)
        arrays["token_ids"][:num_rows] = packed.token_ids.numpy()
        arrays["positions"][:num_rows] = packed.positions.numpy()
        if shape.attends:
            arrays["bounds"][:] = shape.padded_rows
            arrays["bounds"][: packed.num_chunks] = [rows.start for _, rows in packed]
            arrays["bounds"][packed.num_chunks] = num_rows
        self._given.upload()

    def _layers(self, number: int, shape: Shape) -> range:
        """Of a piece."""
        first = number * shape.layers_of_a_piece
        return range(first, min(first + shape.layers_of_a_piece, self._model.config.num_layers))

    def _pieces_for(self, shape: Shape) -> list[torch.cuda.CUDAGraph]:
        pieces = self._pieces.get(shape)
        if pieces is None:
            last = self._model.config.num_layers // shape.layers_of_a_piece
            for number in sorted({0, 1, last}):
                self._run(number, shape)
            torch.cuda.current_stream().synchronize()
            pieces = [captured(partial(self._run, number, shape), self._pool) for number in range(last + 1)]
            self._pieces[shape] = pieces
        return pieces

    def _run(self, number: int, shape: Shape) -> None:
        """One piece."""
        model, given, layers = self._model, self._given.on_device, self._layers(number, shape)
        residual = self._residual[: shape.padded_rows]
        if number == 0:
            residual.copy_(model.embed(given["token_ids"][: shape.padded_rows]))
        angles = model.angles(given["positions"][: shape.padded_rows])
        for layer_id in layers:
            delta = self._complete(layer_id - 1, shape) if layer_id else None
            rows = model.projected(layer_id, model.project(layer_id, residual, delta), angles)
            self._product(layer_id, shape).copy_(model.rotate(rows))
        if not layers:
            delta = self._complete(model.config.num_layers - 1, shape)
            self._hidden[: shape.padded_rows] = model.finish(residual, delta)

    def _complete(self, layer_id: int, shape: Shape) -> Any:
        """A layer from its attention on; what its MLP adds."""
        attended = self._attended[: shape.padded_rows]
        if shape.attends:
            q, k, v = self._heads(self._product(layer_id, shape))
            bounds = self._given.on_device["bounds"]
            whole = AttentionRun(slice(0, len(q)), None, bounds, bounds, len(q), len(q))
            attended = packed_attention(q, k, v, whole).reshape(len(q), -1)
        return self._model.feed_forward(layer_id, self._residual[: shape.padded_rows], attended)

    def _product(self, layer_id: int, shape: Shape) -> Tensor:
        """[padded rows, (H + 2 Hkv) * D] of a layer, rotated."""
        number, place = divmod(layer_id, shape.layers_of_a_piece)
        return self._products[number % 2][place * shape.padded_rows : (place + 1) * shape.padded_rows]

    def _heads(self, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of rows of any layers: rotated, they need no weights of theirs."""
        return self._model.heads(self._model.projected(0, products, None, is_rotated=True))
