"""One transfer as the decode node knows it: the lease, and the ledger of the LAYERs that fill it."""

from dataclasses import dataclass, field
from typing import ClassVar

from hmad.facts.errors import LocalError, RemoteProtocolError
from hmad.wire.messages import Layer
from hmad.wire.transfers import DECODE_RECEIVES, DECODE_SENDS, LayerKey, State, Table, Transfer, layer_key

_OVER = (State.AWAITING, State.ENDED)  # named once: this is asked for every token, and an enum's members cost a search


@dataclass(frozen=True)
class Lease:
    """The layers, blocks and heads that P may fill, as *cells*: one block of one head of one layer."""

    num_layers: int
    num_blocks: int
    first_head: int
    num_heads: int
    cell_bytes: int

    @property
    def cells_per_layer(self) -> int:
        return self.num_blocks * self.num_heads

    @property
    def num_cells(self) -> int:
        return self.num_layers * self.cells_per_layer

    @property
    def full(self) -> int:
        """The mask of a layer that is covered."""
        return (1 << self.cells_per_layer) - 1

    def cells(self, layer: Layer) -> int:
        """Mask of the cells that a LAYER fills in each of its layers: bit ``block * num_heads + head``.
        RemoteProtocolError outside the lease."""
        first_head = layer.first_head - self.first_head
        if layer.first_layer + layer.num_layers > self.num_layers:
            layers = f"{layer.first_layer} to {layer.first_layer + layer.num_layers - 1}"
            raise RemoteProtocolError(f"LAYER names layers {layers}, the lease has {self.num_layers}")
        if layer.first_block + layer.num_blocks > self.num_blocks:
            blocks = f"{layer.first_block} to {layer.first_block + layer.num_blocks - 1}"
            raise RemoteProtocolError(f"LAYER names blocks {blocks}, the lease has {self.num_blocks}")
        if first_head < 0 or first_head + layer.num_heads > self.num_heads:
            heads = f"{layer.first_head} to {layer.first_head + layer.num_heads - 1}"
            raise RemoteProtocolError(
                f"LAYER names heads {heads}, the lease has {self.num_heads} from {self.first_head}"
            )
        heads_mask = ((1 << layer.num_heads) - 1) << first_head
        every_block = ((1 << self.num_heads * layer.num_blocks) - 1) // ((1 << self.num_heads) - 1)  # bit 0 of each
        return (heads_mask * every_block) << (self.num_heads * layer.first_block)


@dataclass(eq=False, kw_only=True)
class DecodeTransfer(Transfer):
    """One transfer as D knows it. ``lease_until_s`` is by the clock whose times the caller passes."""

    sends: ClassVar[Table] = DECODE_SENDS
    receives: ClassVar[Table] = DECODE_RECEIVES

    lease: Lease
    lease_s: float = 0.0
    lease_until_s: float = 0.0
    holds_slots: bool = False
    covered: list[int]  # per layer, a mask of cells
    digests: dict[LayerKey, bytes] = field(default_factory=dict)
    num_begun: int = 0  # LAYERs whose header came
    num_arrived: int = 0  # ... whose last byte came
    num_filling: int = 0  # LAYERs whose bytes are being received into the slots
    num_frames: int | None = None  # as P's terminal frame announced
    root_digest: bytes = b""
    last_landed_s: float = 0.0
    last_verified_s: float = 0.0
    cancelled_choices: set[int] = field(default_factory=set)  # wished for before COMMITTED

    @property
    def over(self) -> bool:
        """D has sent its terminal frame."""
        return self.state in _OVER

    @property
    def complete(self) -> bool:
        """COMMIT and every LAYER it announced are there."""
        return self.state is State.COMMITTING and self.num_arrived == self.num_frames

    @property
    def forgettable(self) -> bool:
        """Nothing more can come for it."""
        return self.state is State.ENDED and self.num_arrived == self.num_frames

    def renew(self, now_s: float) -> None:
        self.lease_until_s = now_s + self.lease_s

    def announce(self, num_frames: int) -> None:
        """P's terminal frame says how many LAYERs it has sent or begun."""
        if not self.num_begun <= num_frames <= self.lease.num_cells:
            raise RemoteProtocolError(
                f"{self}: {num_frames} LAYERs announced, {self.num_begun} came, {self.lease.num_cells} is the most"
            )
        self.num_frames = num_frames

    def begin_layer(self) -> None:
        most = self.lease.num_cells if self.num_frames is None else self.num_frames
        if self.num_begun >= most:
            raise RemoteProtocolError(f"{self}: more LAYERs than the {most} that there can be")
        self.num_begun += 1

    def cover(self, layer: Layer, payload_len: int) -> None:
        """Mark the cells of a LAYER as filled, once each."""
        cells = self.lease.cells(layer)
        expected = layer.num_layers * layer.num_blocks * layer.num_heads * self.lease.cell_bytes
        if payload_len != expected:
            raise RemoteProtocolError(f"LAYER has {payload_len} bytes, its layers, blocks and heads have {expected}")
        if any(self.covered[layer_id] & cells for layer_id in layer.layers):
            raise RemoteProtocolError(f"{self}: LAYER {layer_key(layer)} covers blocks that came before")
        for layer_id in layer.layers:
            self.covered[layer_id] |= cells
        self.digests[layer_key(layer)] = layer.digest

    def check_integrity(self) -> None:
        """Raise LocalError where its counts contradict themselves."""
        most = self.lease.num_cells if self.num_frames is None else self.num_frames
        in_order = 0 <= self.num_filling <= self.num_begun - self.num_arrived <= self.num_begun <= most
        if not in_order:
            raise LocalError(f"{self}: LAYERs are miscounted")
        if any(mask & ~self.lease.full for mask in self.covered):
            raise LocalError(f"{self}: covered outside its lease")
        if self.state in (State.NEW, State.OWING):
            raise LocalError(f"{self} should not be kept while {self.state}")
        if self.state is State.DECODING and not self.next_index:
            raise LocalError(f"{self} decodes no choice")
