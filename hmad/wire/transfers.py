"""The transfers of one session: which frame is legal when, and the ledgers of what was sent and what came.

Sans-IO and without a clock: times are parameters. Methods named after a frame either take one that came, and return
what must be answered, or make one to be sent. Each side sends exactly one terminal frame per transfer: P its COMMIT or
ABORT, D its DENY, ABORT or the TOKENS entry with which the last choice finishes. LAYERs travel on channels of their
own, so they may come after P's terminal frame; what D has ended stays as a tombstone until it has counted them all.

What a peer may not do raises RemoteProtocolError; what we may not do raises LocalProtocolError before a byte left.
"""

import enum
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import xxhash

from hmad.facts.errors import LocalError, LocalProtocolError, RemoteProtocolError
from hmad.facts.formats import FORMATS, KVGeometry
from hmad.wire import limits as bounds
from hmad.wire.messages import (
    Abort,
    AbortReason,
    Cancel,
    Choice,
    Commit,
    Committed,
    Deny,
    DenyReason,
    FinishReason,
    FrameType,
    Grant,
    Landed,
    Layer,
    Reserve,
    TokenEntry,
    Tokens,
    Via,
)

# --- The state table ---------------------------------------------------------------------------------------------


class State(enum.StrEnum):
    """Of one transfer, as one side knows it."""

    NEW = "new"
    RESERVING = "reserving"  # P asked, D has not answered
    SENDING = "sending"  # granted: LAYERs may flow
    COMMITTING = "committing"  # COMMIT is sent; D has not all of it yet
    DECODING = "decoding"
    OWING = "owing"  # the peer's terminal frame came; ours is due at once
    AWAITING = "awaiting"  # our terminal frame is sent; the peer's has not come
    ENDED = "ended"  # both are known; D may still have LAYERs to count


LAST_TOKENS = "TOKENS that finish the last choice"
Table = Mapping[FrameType | str, Mapping[State, State]]

_NEW, _RESERVING, _SENDING, _COMMITTING = State.NEW, State.RESERVING, State.SENDING, State.COMMITTING
_DECODING, _OWING, _AWAITING, _ENDED = State.DECODING, State.OWING, State.AWAITING, State.ENDED

# For each frame: in which states it is legal, and the state it leads to.
PREFILL_SENDS: Table = {
    FrameType.RESERVE: {_NEW: _RESERVING},
    FrameType.LAYER: {_SENDING: _SENDING},
    FrameType.COMMIT: {_SENDING: _COMMITTING},
    FrameType.CANCEL: {s: s for s in (_RESERVING, _SENDING, _COMMITTING, _DECODING)},
    FrameType.ABORT: {_RESERVING: _AWAITING, _SENDING: _AWAITING, _OWING: _ENDED},
}
PREFILL_RECEIVES: Table = {
    FrameType.GRANT: {_RESERVING: _SENDING, _AWAITING: _AWAITING},
    FrameType.DENY: {_RESERVING: _OWING, _AWAITING: _ENDED},
    FrameType.LANDED: {s: s for s in (_SENDING, _COMMITTING, _AWAITING)},
    FrameType.COMMITTED: {_COMMITTING: _DECODING},
    FrameType.TOKENS: {_DECODING: _DECODING},
    LAST_TOKENS: {_DECODING: _ENDED},
    FrameType.ABORT: {
        _RESERVING: _OWING,
        _SENDING: _OWING,
        _COMMITTING: _ENDED,
        _DECODING: _ENDED,
        _AWAITING: _ENDED,
    },
}
DECODE_RECEIVES: Table = {
    FrameType.RESERVE: {_NEW: _RESERVING},
    FrameType.LAYER: {s: s for s in (_SENDING, _COMMITTING, _AWAITING, _ENDED)},
    FrameType.COMMIT: {_SENDING: _COMMITTING, _AWAITING: _ENDED},
    FrameType.CANCEL: {s: s for s in (_RESERVING, _SENDING, _COMMITTING, _DECODING, _AWAITING, _ENDED)},
    FrameType.ABORT: {_RESERVING: _OWING, _SENDING: _OWING, _AWAITING: _ENDED},
}
DECODE_SENDS: Table = {
    FrameType.GRANT: {_RESERVING: _SENDING},
    FrameType.DENY: {_RESERVING: _AWAITING},
    FrameType.LANDED: {_SENDING: _SENDING, _COMMITTING: _COMMITTING},
    FrameType.COMMITTED: {_COMMITTING: _DECODING},
    FrameType.TOKENS: {_DECODING: _DECODING},
    LAST_TOKENS: {_DECODING: _ENDED},
    FrameType.ABORT: {
        _RESERVING: _AWAITING,
        _SENDING: _AWAITING,
        _COMMITTING: _ENDED,
        _DECODING: _ENDED,
        _OWING: _ENDED,
    },
}


@dataclass(eq=False)
class _Transfer:
    """One placement of a request, and where it stands in the table."""

    sends: ClassVar[Table]
    receives: ClassVar[Table]

    transfer_id: bytes
    epoch: int
    num_choices: int
    state: State = State.NEW
    next_index: dict[int, int] = field(default_factory=dict)  # of each unfinished choice, the next token's index

    def __str__(self) -> str:
        return f"transfer {self.transfer_id.hex()} epoch {self.epoch}"

    def send(self, frame: FrameType | str) -> None:
        if self.state not in self.sends[frame]:
            raise LocalProtocolError(f"{_name(frame)} may not be sent while {self} is {self.state}")
        self.state = self.sends[frame][self.state]

    def receive(self, frame: FrameType | str) -> None:
        if self.state not in self.receives[frame]:
            raise RemoteProtocolError(f"{_name(frame)} came while {self} is {self.state}")
        self.state = self.receives[frame][self.state]

    def start_choices(self, choices: Iterable[Choice]) -> None:
        """P has sampled token 0 of each; the next is token 1."""
        self.next_index = {choice.index: 1 for choice in choices}

    def token_fault(self, entry: TokenEntry) -> str | None:
        """Why this cannot be the next entry of its choice, or None."""
        expected = self.next_index.get(entry.choice)
        if expected is None:
            return f"{self} has no unfinished choice {entry.choice}"
        if entry.index != expected:
            return f"{self} choice {entry.choice}: token index {entry.index}, {expected} is next"
        if (entry.token_id is None) != (entry.finish_reason is FinishReason.CANCELLED):
            return f"{self} choice {entry.choice}: a cancelled choice ends without a token, every other entry has one"
        return None

    def count_token(self, entry: TokenEntry) -> bool:
        """Take note of the next entry. Returns whether it finishes the last choice."""
        if entry.finish_reason is None:
            self.next_index[entry.choice] += 1
        else:
            del self.next_index[entry.choice]
        return not self.next_index


def _name(frame: FrameType | str) -> str:
    return frame.name if isinstance(frame, FrameType) else frame


LayerKey = tuple[int, int, int]  # layer, first block, first head


def layer_key(frame: Layer | Landed) -> LayerKey:
    return (frame.layer, frame.first_block, frame.first_head)


def root_digest(digests: Mapping[LayerKey, bytes]) -> bytes:
    """xxh3-128 over the LAYERs' digests, in the order of layer, first block, first head."""
    return xxhash.xxh3_128_digest(b"".join(digests[key] for key in sorted(digests)))


# --- The decode node's side --------------------------------------------------------------------------------------


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
        """Mask of the cells a LAYER fills: bit ``block * num_heads + head``. RemoteProtocolError outside the lease."""
        first_head = layer.first_head - self.first_head
        if layer.layer >= self.num_layers:
            raise RemoteProtocolError(f"LAYER names layer {layer.layer} of {self.num_layers}")
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
class DecodeTransfer(_Transfer):
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
        return self.state in (State.AWAITING, State.ENDED)

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
        expected = layer.num_blocks * layer.num_heads * self.lease.cell_bytes
        if payload_len != expected:
            raise RemoteProtocolError(f"LAYER has {payload_len} bytes, its blocks and heads have {expected}")
        if self.covered[layer.layer] & cells:
            raise RemoteProtocolError(f"{self}: LAYER {layer_key(layer)} covers blocks that came before")
        self.covered[layer.layer] |= cells
        self.digests[layer_key(layer)] = layer.digest


class Verdict(enum.StrEnum):
    WAITING = "waiting"  # right so far, more must come
    READY = "ready"  # everything is there and verified: put it into the batch, then ``committed``
    DISCARDED = "discarded"  # for a transfer that has ended: counted, nothing else
    DIGEST_MISMATCH = "digest_mismatch"  # the transfer is aborted; count a strike


@dataclass(frozen=True)
class Outcome:
    """What came of a frame: a verdict, the transfer where it is known, and the frames to answer with."""

    verdict: Verdict
    transfer: DecodeTransfer | None = None
    replies: tuple[Landed | Abort, ...] = ()


@dataclass(frozen=True)
class LayerPlace:
    """Where a LAYER's payload goes: into the slots of ``transfer``, or, where ``discard`` says so, nowhere.

    Made when its header is there and given back when its last byte is.
    """

    layer: Layer
    transfer: DecodeTransfer | None
    discard: bool


@dataclass(frozen=True)
class Cancellation:
    """What a CANCEL asks of D: an ABORT to send (the transfer is over), or choices to finish as ``cancelled``."""

    abort: Abort | None = None
    choices: tuple[int, ...] = ()


class DecodeTransfers:
    """D's transfers of one session with one P.

    Slots outlive a transfer while bytes are being received into them: give them back when ``take_released`` names
    the transfer, never earlier. ``num_discarded`` counts LAYERs of ended transfers, ``num_stale`` frames of a
    placement older than any known.
    """

    def __init__(
        self, geometry: KVGeometry, first_head: int, num_heads: int, format_name: str, check_digests: bool = True
    ) -> None:
        self._num_layers = geometry.num_layers
        self._first_head = first_head
        self._num_heads = num_heads
        self._format = FORMATS[format_name]
        self._cell_bytes = geometry.block_bytes(self._format, num_heads=1)
        self._check_digests = check_digests
        self._by_id: dict[bytes, dict[int, DecodeTransfer]] = {}  # at most the newest epoch of an id is not over
        self._num_known = 0
        self._released: list[DecodeTransfer] = []
        self.num_discarded = 0
        self.num_stale = 0

    # Reserving

    def reserve(self, message: Reserve) -> DecodeTransfer:
        """P asks for a lease: answer with ``grant``, ``deny`` or ``abort``, at once or later."""
        self._check_new(message)
        if message.format != self._format.name:
            raise RemoteProtocolError(f"RESERVE wants {message.format!r}, {self._format.name!r} was agreed on")
        num_blocks = self._format.num_blocks(message.num_prompt_tokens)
        lease = Lease(self._num_layers, num_blocks, self._first_head, self._num_heads, self._cell_bytes)
        transfer = DecodeTransfer(
            message.transfer_id, message.epoch, message.num_choices, lease=lease, covered=[0] * self._num_layers
        )
        transfer.receive(FrameType.RESERVE)
        self._by_id.setdefault(message.transfer_id, {})[message.epoch] = transfer
        self._num_known += 1
        return transfer

    def grant(self, transfer_id: bytes, lease_s: float, now_s: float) -> Grant:
        """The slots are reserved: the lease runs ``lease_s`` from now, and anew from every LAYER."""
        transfer = self._current(transfer_id)
        transfer.send(FrameType.GRANT)
        transfer.holds_slots = True
        transfer.lease_s = lease_s
        transfer.renew(now_s)
        return Grant(transfer_id, transfer.epoch, lease_s)

    def deny(self, transfer_id: bytes, reason: DenyReason, message: str, retry_after_s: float) -> Deny:
        transfer = self._current(transfer_id)
        transfer.send(FrameType.DENY)
        return Deny(transfer_id, transfer.epoch, reason, message, retry_after_s)

    # Landing

    def layer_destination(self, layer: Layer, payload_len: int, now_s: float) -> LayerPlace:
        """A LAYER's header is there: check it, mark what it covers, say where its payload goes."""
        if layer.via is not Via.INLINE:
            raise RemoteProtocolError(f"LAYER via {layer.via}: no staging was ever registered with this node")
        transfer = self._find(layer)
        if transfer is None:
            return LayerPlace(layer, None, discard=True)
        transfer.receive(FrameType.LAYER)
        transfer.begin_layer()
        if transfer.over:
            return LayerPlace(layer, transfer, discard=True)
        transfer.cover(layer, payload_len)
        transfer.num_filling += 1
        transfer.renew(now_s)
        return LayerPlace(layer, transfer, discard=False)

    def layer_landed(self, place: LayerPlace, digest: bytes | None, landed_s: float, now_s: float) -> Outcome:
        """Its last byte came at ``landed_s``; ``digest`` is that of the bytes, verified here and now."""
        transfer = place.transfer
        self.num_discarded += place.discard
        if transfer is None:
            return Outcome(Verdict.DISCARDED)
        transfer.num_arrived += 1
        transfer.num_filling -= not place.discard
        if transfer.over:
            self._settle(transfer)
            return Outcome(Verdict.DISCARDED, transfer)
        if self._check_digests and digest != place.layer.digest:
            return self._mismatch(transfer, f"LAYER {layer_key(place.layer)}")
        return self._verified(transfer, place.layer, landed_s, now_s)

    def _verified(self, transfer: DecodeTransfer, layer: Layer, landed_s: float, now_s: float) -> Outcome:
        transfer.send(FrameType.LANDED)
        transfer.renew(now_s)
        transfer.last_landed_s, transfer.last_verified_s = landed_s, now_s
        landed = Landed(
            transfer_id=layer.transfer_id,
            epoch=layer.epoch,
            layer=layer.layer,
            first_block=layer.first_block,
            num_blocks=layer.num_blocks,
            first_head=layer.first_head,
            num_heads=layer.num_heads,
            landed_s=landed_s,
            verified_s=now_s,
        )
        outcome = self._completed(transfer)
        return Outcome(outcome.verdict, transfer, (landed, *outcome.replies))

    # Committing

    def commit(self, message: Commit) -> Outcome:
        """P has sent everything, though LAYERs may still be on their way."""
        transfer = self._find(message)
        if transfer is None:
            return Outcome(Verdict.DISCARDED)
        _check_choices(message, transfer)
        transfer.receive(FrameType.COMMIT)
        transfer.announce(message.num_frames)
        if transfer.over:
            self._settle(transfer)
            return Outcome(Verdict.DISCARDED, transfer)
        transfer.root_digest = message.root_digest
        transfer.start_choices(message.choices)
        return self._completed(transfer)

    def committed(self, transfer_id: bytes, now_s: float) -> Committed:
        """The READY transfer has joined the batch. Finish its ``cancelled_choices`` as ``cancelled``."""
        transfer = self._current(transfer_id)
        if not transfer.complete:
            raise LocalProtocolError(f"{transfer} is not ready: {transfer.num_arrived} LAYERs of {transfer.num_frames}")
        transfer.send(FrameType.COMMITTED)
        transfer.cancelled_choices &= transfer.next_index.keys()
        return Committed(transfer_id, transfer.epoch, transfer.last_landed_s, transfer.last_verified_s, now_s)

    def _completed(self, transfer: DecodeTransfer) -> Outcome:
        if not transfer.complete:
            return Outcome(Verdict.WAITING, transfer)
        if any(mask != transfer.lease.full for mask in transfer.covered):
            raise RemoteProtocolError(f"{transfer}: all {transfer.num_frames} LAYERs came and blocks are missing")
        if root_digest(transfer.digests) != transfer.root_digest:
            return self._mismatch(transfer, "COMMIT's root")
        return Outcome(Verdict.READY, transfer)

    def _mismatch(self, transfer: DecodeTransfer, what: str) -> Outcome:
        abort = self.abort(transfer.transfer_id, AbortReason.DIGEST_MISMATCH, f"the digest of {what} is wrong")
        return Outcome(Verdict.DIGEST_MISMATCH, transfer, (abort,))

    # Decoding and ending

    def token(self, entry: TokenEntry) -> bool:
        """An entry is about to be sent. Returns whether it ends the transfer."""
        transfer = self._current(entry.transfer_id)
        fault = transfer.token_fault(entry)
        if fault:
            raise LocalProtocolError(fault)
        transfer.send(FrameType.TOKENS)
        last = transfer.count_token(entry)
        if last:
            transfer.send(LAST_TOKENS)
            self._settle(transfer)
        return last

    def cancel(self, message: Cancel) -> Cancellation:
        """P's wish. Nothing comes of it when the transfer is over; the two cross all the time."""
        transfer = self._by_id.get(message.transfer_id, {}).get(message.epoch)
        if transfer is None:
            self._check_cancel_of_unknown(message)
            return Cancellation()
        transfer.receive(FrameType.CANCEL)
        wished = set(message.choices or range(transfer.num_choices))
        if max(wished) >= transfer.num_choices:
            raise RemoteProtocolError(f"CANCEL names choice {max(wished)}, {transfer} has {transfer.num_choices}")
        if transfer.over:
            return Cancellation()
        if transfer.state is State.DECODING:
            return Cancellation(choices=tuple(sorted(wished & transfer.next_index.keys())))
        return self._cancel_before_committed(transfer, wished)

    def _cancel_before_committed(self, transfer: DecodeTransfer, wished: set[int]) -> Cancellation:
        transfer.cancelled_choices |= wished
        if transfer.cancelled_choices >= (transfer.next_index.keys() or set(range(transfer.num_choices))):
            return Cancellation(abort=self.abort(transfer.transfer_id, AbortReason.CANCELLED))
        return Cancellation()

    def abort(self, transfer_id: bytes, reason: AbortReason, message: str = "") -> Abort:
        """End the transfer, whatever it is doing."""
        transfer = self._current(transfer_id)
        transfer.send(FrameType.ABORT)
        self._settle(transfer)
        return Abort(transfer_id, transfer.epoch, reason, message)

    def aborted(self, message: Abort) -> Abort | None:
        """P has ended it. Returns our own ABORT, where our terminal frame is not yet sent."""
        transfer = self._find(message)
        if transfer is None:
            return None
        transfer.receive(FrameType.ABORT)
        transfer.announce(message.num_frames)
        if transfer.state is State.OWING:
            return self.abort(transfer.transfer_id, AbortReason.CANCELLED)
        self._settle(transfer)
        return None

    def expired(self, now_s: float) -> tuple[DecodeTransfer, ...]:
        """Those whose lease ran out while LAYERs were missing: ``abort`` them."""
        return tuple(
            transfer
            for transfer in self._all()
            if transfer.state in (State.SENDING, State.COMMITTING)
            and not transfer.complete
            and transfer.lease_until_s < now_s
        )

    def take_released(self) -> tuple[DecodeTransfer, ...]:
        """Granted transfers that are over and into whose slots no byte is coming any more; each is named once."""
        released, self._released = tuple(self._released), []
        return released

    def close(self) -> tuple[DecodeTransfer, ...]:
        """The session's connections are gone: forget everything. Returns every transfer that still holds slots."""
        held = (*self.take_released(), *(transfer for transfer in self._all() if transfer.holds_slots))
        self._by_id.clear()
        self._num_known = 0
        return held

    def live(self) -> tuple[DecodeTransfer, ...]:
        """Transfers that are not over."""
        return tuple(transfer for transfer in self._all() if not transfer.over)

    @property
    def num_tombstones(self) -> int:
        return self._num_known - len(self.live())

    def check_integrity(self) -> None:
        """Raise LocalError where the tables contradict themselves."""
        if self._num_known != sum(map(len, self._by_id.values())):
            raise LocalError("transfers are miscounted")
        for epochs in self._by_id.values():
            if all(transfer.forgettable for transfer in epochs.values()):
                raise LocalError("transfers are kept for which nothing can come")
            if any(not transfer.over for epoch, transfer in epochs.items() if epoch != max(epochs)):
                raise LocalError("an older placement is alive beside a newer one")
        for transfer in self._all():
            _check_transfer(transfer)

    def _all(self) -> tuple[DecodeTransfer, ...]:
        return tuple(transfer for epochs in self._by_id.values() for transfer in epochs.values())

    def _check_new(self, message: Reserve) -> None:
        epochs = self._by_id.get(message.transfer_id, {})
        if any(transfer.state is not State.ENDED for transfer in epochs.values()):
            raise RemoteProtocolError(f"transfer {message.transfer_id.hex()} is reserved twice while alive")
        if epochs and message.epoch <= max(epochs):
            raise RemoteProtocolError(
                f"transfer {message.transfer_id.hex()} is reserved again with epoch {message.epoch}, "
                f"must be newer than {max(epochs)}"
            )
        if self._num_known >= bounds.MAX_OPEN_TRANSFERS:
            raise RemoteProtocolError(f"more than {bounds.MAX_OPEN_TRANSFERS} open transfers in one session")

    def _current(self, transfer_id: bytes) -> DecodeTransfer:
        """The newest placement of an id, for frames that we send."""
        epochs = self._by_id.get(transfer_id)
        if not epochs:
            raise LocalProtocolError(f"transfer {transfer_id.hex()} is unknown: it was never reserved or has ended")
        return epochs[max(epochs)]

    def _find(self, message: Layer | Commit | Abort) -> DecodeTransfer | None:
        """The placement a frame is about; None for one that is older than any we know, and is counted."""
        epochs = self._by_id.get(message.transfer_id)
        if not epochs:
            raise RemoteProtocolError(f"transfer {message.transfer_id.hex()} was never reserved or has ended")
        if message.epoch > max(epochs):
            raise RemoteProtocolError(
                f"transfer {message.transfer_id.hex()}: epoch {message.epoch} is newer than {max(epochs)}, the newest"
            )
        transfer = epochs.get(message.epoch)
        self.num_stale += transfer is None
        return transfer

    def _check_cancel_of_unknown(self, message: Cancel) -> None:
        """An id we do not know may have ended; an epoch that is yet to be reserved cannot."""
        epochs = self._by_id.get(message.transfer_id)
        if epochs and message.epoch > max(epochs):
            raise RemoteProtocolError(f"CANCEL of epoch {message.epoch}, the newest is {max(epochs)}")
        self.num_stale += 1

    def _settle(self, transfer: DecodeTransfer) -> None:
        """Free what an ended transfer still holds, as far as nothing is on its way to it."""
        if not transfer.over:
            return
        if transfer.holds_slots and not transfer.num_filling:
            transfer.holds_slots = False
            self._released.append(transfer)
        # All placements of an id go together: while one is kept, the newest epoch must be known.
        epochs = self._by_id[transfer.transfer_id]
        if all(placement.forgettable for placement in epochs.values()):
            del self._by_id[transfer.transfer_id]
            self._num_known -= len(epochs)


def _check_choices(message: Commit, transfer: DecodeTransfer) -> None:
    """At least one; fewer than reserved where choices ended with the token that P sampled."""
    indices = [choice.index for choice in message.choices]
    if len(set(indices)) != len(indices):
        raise RemoteProtocolError(f"{transfer}: COMMIT names a choice twice: {indices}")
    if max(indices) >= transfer.num_choices:
        raise RemoteProtocolError(f"{transfer}: COMMIT names choice {max(indices)} of {transfer.num_choices}")


def _check_transfer(transfer: DecodeTransfer) -> None:
    most = transfer.lease.num_cells if transfer.num_frames is None else transfer.num_frames
    in_order = 0 <= transfer.num_filling <= transfer.num_begun - transfer.num_arrived <= transfer.num_begun <= most
    if not in_order:
        raise LocalError(f"{transfer}: LAYERs are miscounted")
    if any(mask & ~transfer.lease.full for mask in transfer.covered):
        raise LocalError(f"{transfer}: covered outside its lease")
    if transfer.state in (State.NEW, State.OWING):
        raise LocalError(f"{transfer} should not be kept while {transfer.state}")
    if transfer.state is State.DECODING and not transfer.next_index:
        raise LocalError(f"{transfer} decodes no choice")


class DigestStrikes:
    """Wrong digests of one session: accidents happen, three within a minute are no accident."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=bounds.DIGEST_STRIKES)

    def add(self, now_s: float) -> bool:
        """Count one. Returns whether the session must end."""
        self._times_s.append(now_s)
        full = len(self._times_s) == bounds.DIGEST_STRIKES
        return full and now_s - self._times_s[0] <= bounds.DIGEST_STRIKES_WINDOW_S


# --- The prefill node's side -------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class PrefillTransfer(_Transfer):
    """One transfer as P knows it."""

    sends: ClassVar[Table] = PREFILL_SENDS
    receives: ClassVar[Table] = PREFILL_RECEIVES

    max_tokens: int
    digests: dict[LayerKey, bytes] = field(default_factory=dict)  # of every LAYER sent or begun
    in_flight: dict[LayerKey, tuple[int, int]] = field(default_factory=dict)  # not landed: number of blocks, of heads

    def token_fault(self, entry: TokenEntry) -> str | None:
        if entry.token_id is not None and entry.index >= self.max_tokens:
            return f"{self} choice {entry.choice}: token index {entry.index}, at most {self.max_tokens} were asked for"
        return super().token_fault(entry)


class PrefillTransfers:
    """P's transfers of one session with one D. One is forgotten when both terminal frames are exchanged.

    Where D's terminal frame comes first, the methods that take it return the ABORT that P owes.
    """

    def __init__(self) -> None:
        self._by_id: dict[bytes, PrefillTransfer] = {}

    def reserve(self, message: Reserve) -> PrefillTransfer:
        """RESERVE is about to be sent."""
        if message.transfer_id in self._by_id:
            raise LocalProtocolError(f"transfer {message.transfer_id.hex()} is reserved twice while alive")
        transfer = PrefillTransfer(
            message.transfer_id, message.epoch, message.num_choices, max_tokens=message.sampling.max_tokens
        )
        transfer.send(FrameType.RESERVE)
        self._by_id[message.transfer_id] = transfer
        return transfer

    def granted(self, message: Grant) -> PrefillTransfer:
        """LAYERs may be sent, unless the transfer's state says that P has aborted it meanwhile."""
        transfer = self._peers(message)
        transfer.receive(FrameType.GRANT)
        if message.num_cached_tokens:
            raise RemoteProtocolError(f"{transfer}: GRANT skips {message.num_cached_tokens} tokens, P offered none")
        return transfer

    def denied(self, message: Deny) -> Abort | None:
        transfer = self._peers(message)
        transfer.receive(FrameType.DENY)
        return self._answer(transfer, AbortReason.CANCELLED)

    def layer_sent(self, layer: Layer) -> None:
        """A LAYER is about to be sent: from its first byte on it counts."""
        transfer = self._ours(layer.transfer_id)
        transfer.send(FrameType.LAYER)
        key = layer_key(layer)
        if key in transfer.digests or layer.epoch != transfer.epoch:
            raise LocalProtocolError(f"{transfer}: LAYER {key} of epoch {layer.epoch} is sent twice or too late")
        transfer.digests[key] = layer.digest
        transfer.in_flight[key] = (layer.num_blocks, layer.num_heads)

    def landed(self, message: Landed) -> PrefillTransfer:
        """D has a LAYER in its slots."""
        transfer = self._peers(message)
        transfer.receive(FrameType.LANDED)
        key = layer_key(message)
        if transfer.in_flight.get(key) != (message.num_blocks, message.num_heads):
            raise RemoteProtocolError(f"{transfer}: LANDED {key} matches no LAYER on its way")
        del transfer.in_flight[key]
        return transfer

    def commit(self, transfer_id: bytes, choices: tuple[Choice, ...]) -> Commit:
        """Every LAYER is sent or begun; ``choices`` are those that token 0 did not finish."""
        transfer = self._ours(transfer_id)
        transfer.send(FrameType.COMMIT)
        transfer.start_choices(choices)
        return Commit(transfer_id, transfer.epoch, choices, len(transfer.digests), root_digest(transfer.digests))

    def committed(self, message: Committed) -> PrefillTransfer:
        transfer = self._peers(message)
        transfer.receive(FrameType.COMMITTED)
        if transfer.in_flight:
            raise RemoteProtocolError(f"{transfer}: COMMITTED with {len(transfer.in_flight)} LAYERs not LANDED")
        return transfer

    def tokens(self, message: Tokens) -> None:
        """Check every entry and take note of it; a transfer ends with the entry that finishes its last choice."""
        for entry in message.entries:
            transfer = self._by_id.get(entry.transfer_id)
            if transfer is None:
                raise RemoteProtocolError(f"TOKENS for transfer {entry.transfer_id.hex()}: unknown, or it has ended")
            transfer.receive(FrameType.TOKENS)
            if fault := transfer.token_fault(entry):
                raise RemoteProtocolError(f"TOKENS: {fault}")
            if transfer.count_token(entry):
                transfer.receive(LAST_TOKENS)
                del self._by_id[entry.transfer_id]

    def cancel(self, transfer_id: bytes, reason: str, choices: tuple[int, ...] = ()) -> Cancel | None:
        """Wish for the end of a transfer or of some choices. None: it is over, or will be without asking."""
        transfer = self._by_id.get(transfer_id)
        if transfer is None or transfer.state is State.AWAITING:
            return None
        transfer.send(FrameType.CANCEL)
        return Cancel(transfer_id, transfer.epoch, reason, choices)

    def abort(self, transfer_id: bytes, reason: AbortReason, message: str = "") -> Abort:
        """End a transfer that is not committed; after COMMIT only ``cancel`` is left."""
        transfer = self._ours(transfer_id)
        transfer.send(FrameType.ABORT)
        return Abort(transfer_id, transfer.epoch, reason, message, num_frames=len(transfer.digests))

    def aborted(self, message: Abort) -> Abort | None:
        """D has ended the transfer."""
        transfer = self._peers(message)
        transfer.receive(FrameType.ABORT)
        return self._answer(transfer, message.reason)

    def state(self, transfer_id: bytes) -> State:
        """``ended`` for every id that is not known."""
        transfer = self._by_id.get(transfer_id)
        return State.ENDED if transfer is None else transfer.state

    def close(self) -> tuple[PrefillTransfer, ...]:
        """The session's connections are gone: forget everything. Returns every transfer that had not ended."""
        lost = tuple(self._by_id.values())
        self._by_id.clear()
        return lost

    def check_integrity(self) -> None:
        """Raise LocalError where the tables contradict themselves."""
        for transfer in self._by_id.values():
            if transfer.state in (State.NEW, State.OWING, State.ENDED):
                raise LocalError(f"{transfer} should not be kept while {transfer.state}")
            if not transfer.in_flight.keys() <= transfer.digests.keys():
                raise LocalError(f"{transfer}: more LAYERs in flight than sent")
            if transfer.state is State.DECODING and not transfer.next_index:
                raise LocalError(f"{transfer} decodes no choice")

    def _answer(self, transfer: PrefillTransfer, reason: AbortReason) -> Abort | None:
        """D's terminal frame came: send ours, if it is due, and forget."""
        owed = self.abort(transfer.transfer_id, reason) if transfer.state is State.OWING else None
        del self._by_id[transfer.transfer_id]
        return owed

    def _ours(self, transfer_id: bytes) -> PrefillTransfer:
        transfer = self._by_id.get(transfer_id)
        if transfer is None:
            raise LocalProtocolError(f"transfer {transfer_id.hex()} is unknown: it was never reserved or has ended")
        return transfer

    def _peers(self, message: Grant | Deny | Landed | Committed | Abort) -> PrefillTransfer:
        """What a frame from D is about. D's terminal frame is its last, so an ended transfer is an error."""
        transfer = self._by_id.get(message.transfer_id)
        name = type(message).__name__.upper()
        if transfer is None:
            raise RemoteProtocolError(f"{name} for transfer {message.transfer_id.hex()}: unknown, or it has ended")
        if message.epoch != transfer.epoch:
            raise RemoteProtocolError(f"{name} for epoch {message.epoch} of {transfer}")
        return transfer
