"""The decode node's side of a session's transfers (``hmad.wire.transfers``): leases, LAYERs, digests, tombstones."""

import enum
from dataclasses import dataclass

from hmad.facts.errors import LocalError, LocalProtocolError, RemoteProtocolError
from hmad.facts.formats import FORMATS, KVGeometry
from hmad.wire import limits as bounds
from hmad.wire.decode_transfer import DecodeTransfer, Lease
from hmad.wire.messages import (
    Abort,
    AbortReason,
    Cancel,
    Commit,
    Committed,
    Deny,
    DenyReason,
    FrameType,
    Grant,
    Landed,
    Layer,
    Reserve,
    TokenEntry,
    Via,
)
from hmad.wire.transfers import LAST_TOKENS, State, layer_key, root_digest


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
            first_layer=layer.first_layer,
            num_layers=layer.num_layers,
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
            transfer.check_integrity()

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
