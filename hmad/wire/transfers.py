"""What both sides of a transfer share: which frame is legal when, the states of one transfer, the digest of all.

Sans-IO and without a clock: times are parameters. ``prefill_transfers`` and ``decode_transfers`` keep the ledgers of
what was sent and what came. Their methods named after a frame either take one that came, and return what must be
answered, or make one to be sent. Each side sends exactly one terminal frame per transfer: P its COMMIT or ABORT, D its
DENY, ABORT or the TOKENS entry with which the last choice finishes. LAYERs travel on channels of their own, so they may
come after P's terminal frame; what D has ended stays as a tombstone until it has counted them all.

What a peer may not do raises RemoteProtocolError; what we may not do raises LocalProtocolError before a byte left.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import xxhash

from hmad.facts.errors import LocalProtocolError, RemoteProtocolError
from hmad.wire.messages import Choice, FinishReason, FrameType, KVRange, TokenEntry

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
_CANCELLED = FinishReason.CANCELLED

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
class Transfer:
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
        state = self.sends[frame].get(self.state)
        if state is None:
            raise LocalProtocolError(f"{_name(frame)} may not be sent while {self} is {self.state}")
        self.state = state

    def receive(self, frame: FrameType | str) -> None:
        state = self.receives[frame].get(self.state)
        if state is None:
            raise RemoteProtocolError(f"{_name(frame)} came while {self} is {self.state}")
        self.state = state

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
        if (entry.token_id is None) != (entry.finish_reason is _CANCELLED):
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


LayerKey = tuple[int, int, int]  # first layer, first block, first head


def layer_key(frame: KVRange) -> LayerKey:
    return (frame.first_layer, frame.first_block, frame.first_head)


def root_digest(digests: Mapping[LayerKey, bytes]) -> bytes:
    """xxh3-128 over the LAYERs' digests, in the order of first layer, first block, first head."""
    return xxhash.xxh3_128_digest(b"".join(digests[key] for key in sorted(digests)))
