"""The prefill node's side of a session's transfers (``hmad.wire.transfers``)."""

from dataclasses import dataclass, field
from typing import ClassVar

from hmad.facts.errors import LocalError, LocalProtocolError, RemoteProtocolError
from hmad.wire.messages import (
    Abort,
    AbortReason,
    Cancel,
    Choice,
    Commit,
    Committed,
    Deny,
    FrameType,
    Grant,
    KVRange,
    Landed,
    Layer,
    Reserve,
    TokenEntry,
    Tokens,
)
from hmad.wire.transfers import (
    LAST_TOKENS,
    PREFILL_RECEIVES,
    PREFILL_SENDS,
    LayerKey,
    State,
    Table,
    Transfer,
    layer_key,
    root_digest,
)


@dataclass(eq=False, kw_only=True)
class PrefillTransfer(Transfer):
    """One transfer as P knows it."""

    sends: ClassVar[Table] = PREFILL_SENDS
    receives: ClassVar[Table] = PREFILL_RECEIVES

    max_tokens: int
    digests: dict[LayerKey, bytes] = field(default_factory=dict)  # of every LAYER sent or begun
    in_flight: dict[LayerKey, tuple[int, int, int]] = field(default_factory=dict)  # not landed: layers, blocks, heads

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
        transfer.in_flight[key] = _extent(layer)

    def landed(self, message: Landed) -> PrefillTransfer:
        """D has a LAYER in its slots."""
        transfer = self._peers(message)
        transfer.receive(FrameType.LANDED)
        key = layer_key(message)
        if transfer.in_flight.get(key) != _extent(message):
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


def _extent(frame: KVRange) -> tuple[int, int, int]:
    return (frame.num_layers, frame.num_blocks, frame.num_heads)
