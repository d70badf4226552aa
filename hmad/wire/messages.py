"""The typed header of every frame (docs/design.md section 4).

One frozen struct per frame type: msgspec decodes the msgpack map straight into it, so every field is typed and
bounded before anyone sees it. Unknown keys are an error except in HELLO and WELCOME, which older peers must be
able to read. Byte strings are ids, nonces and digests; times are seconds of the sender's monotonic clock.
"""

import enum
from typing import Annotated

import msgspec
from msgspec import Meta


class FrameType(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    AUTH = 3
    REJECT = 4
    RESERVE = 5
    GRANT = 6
    DENY = 7
    LAYER = 8
    LANDED = 9
    COMMIT = 10
    COMMITTED = 11
    TOKENS = 12
    CANCEL = 13
    ABORT = 14
    LOAD = 15
    PING = 16
    PONG = 17
    DRAIN = 18
    BYE = 19


class DenyReason(enum.StrEnum):
    FULL = "full"  # later, or elsewhere
    NEVER_FITS = "never_fits"  # larger than this node's whole arena or its limits
    DRAINING = "draining"
    BAD_REQUEST = "bad_request"  # the parameters themselves: another peer would say the same


class AbortReason(enum.StrEnum):
    CANCELLED = "cancelled"  # the other side asked for it
    PREEMPTED = "preempted"  # place me again
    LEASE_EXPIRED = "lease_expired"
    DIGEST_MISMATCH = "digest_mismatch"
    NON_FINITE = "non_finite"  # NaN or infinity in K, V or the logits
    SHUTDOWN = "shutdown"
    INTERNAL = "internal"


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Channel(enum.StrEnum):
    CONTROL = "control"
    BULK = "bulk"


class Via(enum.StrEnum):
    INLINE = "inline"  # the payload follows
    READ = "read"  # D reads P's registered staging by RDMA; the descriptor says where


Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Proof = Annotated[bytes, Meta(min_length=32, max_length=32)]
Word = Annotated[str, Meta(min_length=1, max_length=64)]
Sentence = Annotated[str, Meta(max_length=2048)]
U16 = Annotated[int, Meta(ge=0, le=2**16 - 1)]
U31 = Annotated[int, Meta(ge=0, le=2**31 - 1)]
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
NumChoices = Annotated[int, Meta(ge=1, le=8)]
ChoiceIndex = Annotated[int, Meta(ge=0, le=7)]
TokenIds = Annotated[tuple[U31, ...], Meta(max_length=4096)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all headers."""


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """KV shape of the model; the head range a node holds is beside it."""

    num_layers: Annotated[int, Meta(ge=1, le=4096)]
    num_kv_heads: Annotated[int, Meta(ge=1, le=4096)]
    head_dim: Annotated[int, Meta(ge=1, le=4096)]


class Limits(msgspec.Struct, frozen=True):
    """The largest payloads this side is willing to receive, in bytes."""

    layer_bytes: U63
    reserve_bytes: U63
    tokens_bytes: U63


class Hello(msgspec.Struct, frozen=True):
    """P opens a connection. The same on the control and the bulk channels of a session."""

    version: Word
    node_id: Word
    boot_id: Id
    role: Word
    session: Id
    channel: Channel
    fingerprint: Proof
    geometry: Geometry
    first_head: U16
    num_heads: Annotated[int, Meta(ge=1, le=4096)]
    formats: Annotated[tuple[Word, ...], Meta(min_length=1, max_length=16)]
    limits: Limits
    digests: Annotated[tuple[Word, ...], Meta(min_length=1, max_length=8)]
    nonce: Nonce


class Welcome(msgspec.Struct, frozen=True):
    """D answers HELLO: what was agreed, and D's proof that it knows the cluster key (zeros without a key)."""

    version: Word
    node_id: Word
    boot_id: Id
    role: Word
    fingerprint: Proof
    geometry: Geometry
    format: Word
    limits: Limits
    digest: Word
    nonce: Nonce
    total_slots: U63
    proof: Proof


class Auth(Message, frozen=True):
    """P's proof; after it the connection is authenticated."""

    proof: Proof


class Reject(Message, frozen=True):
    """Why we will not talk, in words a person can act on."""

    reason: Sentence


class Sampling(Message, frozen=True):
    """SamplingParams on the wire (hmad.facts.sampling says what each means)."""

    max_tokens: Positive
    temperature: Annotated[float, Meta(ge=0, le=100)]
    top_p: Annotated[float, Meta(gt=0, le=1)]
    top_k: U31
    min_p: Annotated[float, Meta(ge=0, le=1)]
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)]
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)]
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)]
    stop_token_ids: TokenIds = ()
    num_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    forced_token_ids: TokenIds = ()
    want_logits: bool = False


class Reserve(Message, frozen=True):
    """P asks for a lease. Payload: the prompt's token ids, u32 little-endian."""

    transfer_id: Id
    epoch: U32
    format: Word
    num_prompt_tokens: Positive
    num_choices: NumChoices
    sampling: Sampling


class Grant(Message, frozen=True):
    transfer_id: Id
    epoch: U32
    lease_s: Seconds
    num_cached_tokens: U31 = 0


class Deny(Message, frozen=True):
    transfer_id: Id
    epoch: U32
    reason: DenyReason
    message: Sentence
    retry_after_s: Seconds


class Descriptor(Message, frozen=True):
    """Where in P's registered staging D reads a payload (``via`` read): a region P announced and an offset in it."""

    region: U32
    offset: U63
    length: U63


class KVRange(Message, frozen=True):
    """Part of a transfer: ``num_layers`` layers from ``first_layer`` on, of each of them ``num_blocks`` blocks from
    ``first_block`` on, of each of these ``num_heads`` heads from ``first_head`` on."""

    transfer_id: Id
    epoch: U32
    first_layer: U16
    num_layers: Annotated[int, Meta(ge=1, le=4096)]
    first_block: U31
    num_blocks: Positive
    first_head: U16
    num_heads: Annotated[int, Meta(ge=1, le=4096)]

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)


class Layer(KVRange, frozen=True):
    """These blocks, one layer after the other."""

    digest: Digest
    via: Via = Via.INLINE
    descriptor: Descriptor | None = None


class Landed(KVRange, frozen=True):
    """A LAYER is in its slots: when its last byte came and when its digest was verified, by D's clock."""

    landed_s: Seconds
    verified_s: Seconds


class Choice(Message, frozen=True):
    """One of n: its seed, and the first token, which P sampled."""

    index: ChoiceIndex
    seed: Annotated[int, Meta(ge=0)]  # at most 2^64 - 1, as any msgpack integer; msgspec cannot state that bound
    first_token: U31


class Commit(Message, frozen=True):
    """All LAYERs are sent. ``root_digest`` is over their digests, ordered by first layer, block and head."""

    transfer_id: Id
    epoch: U32
    choices: Annotated[tuple[Choice, ...], Meta(min_length=1, max_length=8)]
    num_frames: U31
    root_digest: Digest


class Committed(Message, frozen=True):
    transfer_id: Id
    epoch: U32
    last_landed_s: Seconds
    last_verified_s: Seconds
    committed_s: Seconds


class TokenEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One new token of one choice. ``index`` counts the choice's tokens from 0 (P's first token), so D starts at 1.

    Every choice ends in exactly one entry with a finish reason; a cancelled one has no token in it.
    ``payload_bytes`` of the frame's payload belong to this entry, in entry order: logprobs, then logits
    (``pack_extras`` in hmad.wire.extras says how).
    """

    transfer_id: Id
    choice: ChoiceIndex
    index: U31
    token_id: U31 | None
    finish_reason: FinishReason | None = None
    payload_bytes: U32 = 0


class Tokens(Message, frozen=True):
    """New tokens of one step, all sequences of this session; a step may take several frames."""

    entries: Annotated[tuple[TokenEntry, ...], Meta(min_length=1, max_length=512)]


class Cancel(Message, frozen=True):
    """A wish: please end this transfer, or only some of its choices (empty: all)."""

    transfer_id: Id
    epoch: U32
    reason: Word
    choices: Annotated[tuple[ChoiceIndex, ...], Meta(max_length=8)] = ()


class Abort(Message, frozen=True):
    """A fact: this side has ended the transfer. From P, ``num_frames`` says how many LAYERs it had sent or begun."""

    transfer_id: Id
    epoch: U32
    reason: AbortReason
    message: Sentence = ""
    num_frames: U31 = 0


class Load(Message, frozen=True):
    """D's state, on change and as its heartbeat."""

    free_slots: U63
    total_slots: U63
    running: U31
    waiting: U31


class Ping(Message, frozen=True):
    sent_s: Seconds


class Pong(Message, frozen=True):
    """Echo of a PING: when it was sent (sender's clock), received and answered (ours)."""

    ping_sent_s: Seconds
    received_s: Seconds
    sent_s: Seconds


class Drain(Message, frozen=True):
    """No new work for me; what runs is finished."""

    reason: Sentence = ""


class Bye(Message, frozen=True):
    """Orderly end of the session."""

    reason: Sentence = ""


AnyMessage = (
    Hello
    | Welcome
    | Auth
    | Reject
    | Reserve
    | Grant
    | Deny
    | Layer
    | Landed
    | Commit
    | Committed
    | Tokens
    | Cancel
    | Abort
    | Load
    | Ping
    | Pong
    | Drain
    | Bye
)

STRUCT_OF: dict[FrameType, type[msgspec.Struct]] = {
    FrameType.HELLO: Hello,
    FrameType.WELCOME: Welcome,
    FrameType.AUTH: Auth,
    FrameType.REJECT: Reject,
    FrameType.RESERVE: Reserve,
    FrameType.GRANT: Grant,
    FrameType.DENY: Deny,
    FrameType.LAYER: Layer,
    FrameType.LANDED: Landed,
    FrameType.COMMIT: Commit,
    FrameType.COMMITTED: Committed,
    FrameType.TOKENS: Tokens,
    FrameType.CANCEL: Cancel,
    FrameType.ABORT: Abort,
    FrameType.LOAD: Load,
    FrameType.PING: Ping,
    FrameType.PONG: Pong,
    FrameType.DRAIN: Drain,
    FrameType.BYE: Bye,
}
TYPE_OF: dict[type[msgspec.Struct], FrameType] = {struct: frame_type for frame_type, struct in STRUCT_OF.items()}
