"""The frame codec: one table of events and bytes, both directions; what must be refused; and fuzzing."""

import struct
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hmad.facts.errors import LocalProtocolError, RemoteProtocolError
from hmad.facts.sampling import SampledToken, TokenLogprobs
from hmad.wire import messages as m
from hmad.wire.extras import pack_extras, unpack_extras
from hmad.wire.frames import PREFIX_BYTES, FrameReader, FrameWriter, Received, encode_frame, encode_header

LIMITS = m.Limits(layer_bytes=4096, reserve_bytes=4096, tokens_bytes=4096)
ID, NONCE, DIGEST, PROOF = bytes(range(16)), bytes(range(32)), b"d" * 16, b"p" * 32
LAYER_PAYLOAD = bytes(range(200))
HANDSHAKE = (m.Hello, m.Welcome, m.Auth, m.Reject)

GEOMETRY_MAP = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 64}
LIMITS_MAP = {"layer_bytes": 4096, "reserve_bytes": 4096, "tokens_bytes": 4096}
SAMPLING = m.Sampling(7, 0.5, 1.0, 0, 0.0, 0.0, 0.0, 1.0, stop_token_ids=(3, 4))
SAMPLING_MAP = {
    "max_tokens": 7,
    "temperature": 0.5,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "stop_token_ids": [3, 4],
    "num_logprobs": None,
    "forced_token_ids": [],
    "want_logits": False,
}
NODE_MAP = {"version": "0.1.0", "node_id": "n1", "boot_id": ID}
OF_TRANSFER = {"transfer_id": ID, "epoch": 3}
RANGE_MAP = {"first_layer": 2, "num_layers": 1, "first_block": 5, "num_blocks": 1, "first_head": 0, "num_heads": 2}
LAYER_MAP = {**OF_TRANSFER, **RANGE_MAP, "digest": DIGEST, "via": "inline", "descriptor": None}

# (frame type on the wire, event, its header as a plain map, its payload)
TABLE: list[tuple[int, m.AnyMessage, dict[str, Any], bytes]] = [
    (
        1,
        m.Hello(
            *("0.1.0", "n1", ID, "prefill", ID, m.Channel.BULK, PROOF, m.Geometry(4, 2, 64), 0, 2),
            *(("bfp8", "bf16"), LIMITS, ("xxh3-128",), NONCE),
        ),
        {
            **NODE_MAP,
            "role": "prefill",
            "session": ID,
            "channel": "bulk",
            "fingerprint": PROOF,
            "geometry": GEOMETRY_MAP,
            "first_head": 0,
            "num_heads": 2,
            "formats": ["bfp8", "bf16"],
            "limits": LIMITS_MAP,
            "digests": ["xxh3-128"],
            "nonce": NONCE,
        },
        b"",
    ),
    (
        2,
        m.Welcome(
            *("0.1.0", "n1", ID, "decode", PROOF, m.Geometry(4, 2, 64)),
            *("bf16", LIMITS, "xxh3-128", NONCE, 2**40, PROOF),
        ),
        {
            **NODE_MAP,
            "role": "decode",
            "fingerprint": PROOF,
            "geometry": GEOMETRY_MAP,
            "format": "bf16",
            "limits": LIMITS_MAP,
            "digest": "xxh3-128",
            "nonce": NONCE,
            "total_slots": 2**40,
            "proof": PROOF,
        },
        b"",
    ),
    (3, m.Auth(PROOF), {"proof": PROOF}, b""),
    (4, m.Reject("no"), {"reason": "no"}, b""),
    (
        5,
        m.Reserve(ID, 3, "bf16", 2, 1, SAMPLING),
        {**OF_TRANSFER, "format": "bf16", "num_prompt_tokens": 2, "num_choices": 1, "sampling": SAMPLING_MAP},
        struct.pack("<2I", 10, 11),
    ),
    (6, m.Grant(ID, 3, 2.5), {**OF_TRANSFER, "lease_s": 2.5, "num_cached_tokens": 0}, b""),
    (
        7,
        m.Deny(ID, 3, m.DenyReason.FULL, "full", 0.5),
        {**OF_TRANSFER, "reason": "full", "message": "full", "retry_after_s": 0.5},
        b"",
    ),
    (8, m.Layer(ID, 3, 2, 1, 5, 1, 0, 2, DIGEST), LAYER_MAP, LAYER_PAYLOAD),
    (
        8,
        m.Layer(ID, 3, 2, 1, 5, 1, 0, 2, DIGEST, m.Via.READ, m.Descriptor(1, 2, 3)),
        {**LAYER_MAP, "via": "read", "descriptor": {"region": 1, "offset": 2, "length": 3}},
        b"",
    ),
    (
        9,
        m.Landed(ID, 3, 2, 1, 5, 1, 0, 2, 1.5, 1.75),
        {**OF_TRANSFER, **RANGE_MAP, "landed_s": 1.5, "verified_s": 1.75},
        b"",
    ),
    (
        10,
        m.Commit(ID, 3, (m.Choice(0, 2**64 - 1, 99),), 4, DIGEST),
        {
            **OF_TRANSFER,
            "choices": [{"index": 0, "seed": 2**64 - 1, "first_token": 99}],
            "num_frames": 4,
            "root_digest": DIGEST,
        },
        b"",
    ),
    (
        11,
        m.Committed(ID, 3, 1.0, 2.0, 3.0),
        {**OF_TRANSFER, "last_landed_s": 1.0, "last_verified_s": 2.0, "committed_s": 3.0},
        b"",
    ),
    (
        12,
        m.Tokens((m.TokenEntry(ID, 0, 1, 55, None, 3), m.TokenEntry(ID, 1, 9, None, m.FinishReason.CANCELLED))),
        {"entries": [[ID, 0, 1, 55, None, 3], [ID, 1, 9, None, "cancelled", 0]]},
        b"abc",
    ),
    (13, m.Cancel(ID, 3, "gone", (1,)), {**OF_TRANSFER, "reason": "gone", "choices": [1]}, b""),
    (
        14,
        m.Abort(ID, 3, m.AbortReason.PREEMPTED, "later", 6),
        {**OF_TRANSFER, "reason": "preempted", "message": "later", "num_frames": 6},
        b"",
    ),
    (15, m.Load(1, 2, 3, 4), {"free_slots": 1, "total_slots": 2, "running": 3, "waiting": 4}, b""),
    (16, m.Ping(0.25), {"sent_s": 0.25}, b""),
    (17, m.Pong(0.25, 0.5, 0.75), {"ping_sent_s": 0.25, "received_s": 0.5, "sent_s": 0.75}, b""),
    (18, m.Drain("soon"), {"reason": "soon"}, b""),
    (19, m.Bye(), {"reason": ""}, b""),
]
EVENTS = [pytest.param(*row, id=f"{type(row[1]).__name__}-{len(row[3])}") for row in TABLE]


def frame_bytes(
    type_id: int,
    header: bytes | dict[str, Any],
    payload: bytes = b"",
    *,
    magic: bytes = b"HMAD",
    version: int = 1,
    number: int = 0,
    header_len: int | None = None,
    payload_len: int | None = None,
) -> bytes:
    """Prefix and header, made independently of the codec."""
    raw = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    length = len(raw) if header_len is None else header_len
    size = len(payload) if payload_len is None else payload_len
    fixed = magic + struct.pack("<BBHIQ", version, type_id, number, length, size)
    covered = fixed + raw + (b"" if type_id == 8 else payload)
    return fixed + struct.pack("<I", xxhash.xxh32_intdigest(covered, seed=0)) + raw


class Harness:
    """A reader whose LAYERs land in two views, so that destinations in parts are always tried."""

    def __init__(self, authenticated: bool = True, limits: m.Limits = LIMITS) -> None:
        self.reader = FrameReader(limits, self.place)
        self.reader.authenticated = authenticated
        self.landed = bytearray()
        self.num_places = 0

    def place(self, layer: m.Layer, payload_len: int) -> Sequence[memoryview]:
        self.num_places += 1
        self.landed = bytearray(payload_len)
        split = payload_len // 3
        view = memoryview(self.landed)
        return [view[:split], view[split:split], view[split:]]

    def payload_of(self, received: Received) -> bytes:
        return bytes(self.landed if isinstance(received.message, m.Layer) else received.payload or b"")


def reader_for(message: m.AnyMessage) -> Harness:
    return Harness(authenticated=not isinstance(message, HANDSHAKE))


def refused(data: bytes, words: str, harness: Harness | None = None) -> None:
    harness = harness or Harness()
    with pytest.raises(RemoteProtocolError, match=words):
        harness.reader.feed(data)


@pytest.mark.parametrize(("type_id", "message", "header", "payload"), EVENTS)
def test_event_to_bytes(type_id: int, message: m.AnyMessage, header: dict[str, Any], payload: bytes) -> None:
    number = 0 if isinstance(message, HANDSHAKE) else 70_000
    expected = frame_bytes(type_id, header, payload, number=number % 65_536)
    assert encode_frame(message, payload, number) == expected


@pytest.mark.parametrize(("type_id", "message", "header", "payload"), EVENTS)
@pytest.mark.parametrize("step", [1, 7, 10**6])
def test_bytes_to_event(type_id: int, message: m.AnyMessage, header: dict[str, Any], payload: bytes, step: int) -> None:
    harness = reader_for(message)
    data = frame_bytes(type_id, header, payload) + payload
    received = [r for at in range(0, len(data), step) for r in harness.reader.feed(data[at : at + step])]
    assert [r.message for r in received] == [message]
    assert harness.payload_of(received[0]) == payload
    assert received[0].header == msgspec.msgpack.encode(header)
    inline = isinstance(message, m.Layer) and message.via is m.Via.INLINE
    assert received[0].digest == (xxhash.xxh3_128_digest(payload) if inline else None)


@pytest.mark.parametrize(("type_id", "message", "header", "payload"), EVENTS)
def test_trailing_data_belongs_to_the_next_frame(
    type_id: int, message: m.AnyMessage, header: dict[str, Any], payload: bytes
) -> None:
    harness = reader_for(message)
    number = 0 if isinstance(message, HANDSHAKE) else 1
    first, second = (frame_bytes(type_id, header, payload, number=n) + payload for n in (0, number))
    received = harness.reader.feed(first + second + second[:10])
    assert [r.message for r in received] == [message, message]
    assert [len(harness.reader.get_buffer())] == [PREFIX_BYTES - 10]


def test_table_has_every_frame_type() -> None:
    assert {row[0] for row in TABLE} == set(m.FrameType)


def test_a_golden_frame() -> None:
    golden = "484d41440110000011000000000000000000000037d28ec481a673656e745f73cb3fd0000000000000"
    assert encode_frame(m.Ping(0.25)).hex() == golden


def test_get_buffer_is_exact_and_without_side_effects() -> None:
    harness = Harness()
    data = encode_frame(m.Layer(ID, 3, 2, 1, 5, 1, 0, 2, DIGEST), LAYER_PAYLOAD) + LAYER_PAYLOAD
    header_len = len(data) - 200 - PREFIX_BYTES
    seen = []
    while data:
        part = harness.reader.get_buffer()
        assert len(harness.reader.get_buffer()) == len(part)
        seen.append(len(part))
        part[:] = data[: len(part)]
        data = data[len(part) :]
        received = harness.reader.advance(len(part))
        assert (received is None) == bool(data)
    assert seen == [PREFIX_BYTES, header_len, 66, 134]
    assert harness.num_places == 1


def test_digest_none_hashes_nothing() -> None:
    harness = Harness()
    harness.reader.digest = "none"
    layer = m.Layer(ID, 3, 2, 1, 5, 1, 0, 2, DIGEST)
    (received,) = harness.reader.feed(encode_frame(layer, LAYER_PAYLOAD) + LAYER_PAYLOAD)
    assert received.digest is None
    assert harness.landed == LAYER_PAYLOAD


def test_a_layer_payload_is_never_copied() -> None:
    arena = bytearray(4096)
    reader = FrameReader(LIMITS, lambda layer, payload_len: [memoryview(arena)[100 : 100 + payload_len]])
    reader.authenticated = True
    (received,) = reader.feed(encode_frame(m.Layer(ID, 3, 2, 1, 5, 1, 0, 2, DIGEST), LAYER_PAYLOAD) + LAYER_PAYLOAD)
    assert received.payload is None
    assert bytes(arena) == bytes(100) + LAYER_PAYLOAD + bytes(4096 - 300)


PING = {"sent_s": 0.5}
BAD_PREFIX = {
    "magic": (frame_bytes(16, PING, magic=b"HTTP"), "does not speak hmad"),
    "version": (frame_bytes(16, PING, version=2), "protocol version 2, this node 1"),
    "number": (frame_bytes(16, PING, number=1), "PING is frame 1 of its connection, 0 is next"),
    "type 0": (frame_bytes(0, PING), "unknown frame type 0"),
    "type 20": (frame_bytes(20, PING), "unknown frame type 20"),
    "empty header": (frame_bytes(16, b""), "header of 0 bytes"),
    "long header": (frame_bytes(16, PING, header_len=65_537), "header of 65537 bytes, must be 1 to 65536"),
    "payload of a PING": (frame_bytes(16, PING, b"x"), "payload of 1 bytes, at most 0"),
    "huge payload": (frame_bytes(8, LAYER_MAP, payload_len=2**64 - 1), "at most 4096"),
    "huge RESERVE": (frame_bytes(5, {}, payload_len=4097), "at most 4096"),
    "huge TOKENS": (frame_bytes(12, {}, payload_len=4097), "at most 4096"),
    "checksum": (frame_bytes(16, PING)[:-1] + b"\x01", "checksum"),
    "checksum of the prefix": (frame_bytes(16, PING)[:5] + b"\x12" + frame_bytes(16, PING)[6:], "DRAIN: the checksum"),
    "HELLO again": (frame_bytes(1, TABLE[0][2]), "HELLO may not come after"),
    "AUTH again": (frame_bytes(3, TABLE[2][2]), "AUTH may not come after"),
}


@pytest.mark.parametrize(("data", "words"), BAD_PREFIX.values(), ids=BAD_PREFIX)
def test_bad_prefix(data: bytes, words: str) -> None:
    refused(data, words)


def test_a_prefix_is_refused_before_its_header_is_read() -> None:
    refused(frame_bytes(16, PING, header_len=65_537)[:PREFIX_BYTES], "header of")
    refused(frame_bytes(8, LAYER_MAP, payload_len=2**40)[:PREFIX_BYTES], "payload of")


@pytest.mark.parametrize("frame_type", sorted(set(m.FrameType) - {1, 2, 3, 4}))
def test_strangers_may_only_shake_hands(frame_type: m.FrameType) -> None:
    refused(frame_bytes(frame_type, PING), "may not come before", Harness(authenticated=False))


def test_strangers_have_small_headers() -> None:
    most = frame_bytes(4, b"\x00" * 4096)
    refused(most, "REJECT: bad header", Harness(authenticated=False))
    refused(frame_bytes(4, b"\x00" * 4097), "must be 1 to 4096", Harness(authenticated=False))


NAN, INF = float("nan"), float("inf")
RESERVE_MAP = TABLE[4][2]
BAD_HEADER: dict[str, tuple[int, Any, int]] = {
    "nan": (16, {"sent_s": NAN}, 0),
    "infinity": (16, {"sent_s": INF}, 0),
    "nan temperature": (5, {**RESERVE_MAP, "sampling": {**SAMPLING_MAP, "temperature": NAN}}, 8),
    "nan penalty": (5, {**RESERVE_MAP, "sampling": {**SAMPLING_MAP, "presence_penalty": NAN}}, 8),
    "unknown key": (16, {**PING, "more": 1}, 0),
    "unknown nested key": (5, {**RESERVE_MAP, "sampling": {**SAMPLING_MAP, "more": 1}}, 8),
    "unknown choice key": (10, {**TABLE[10][2], "choices": [{"index": 0, "seed": 1, "first_token": 2, "x": 0}]}, 0),
    "long entry": (12, {"entries": [[ID, 0, 1, 55, None, 0, 0]]}, 0),
    "missing key": (16, {}, 0),
    "trailing bytes": (16, msgspec.msgpack.encode(PING) + b"\x00", 0),
    "truncated": (16, msgspec.msgpack.encode(PING)[:-1], 0),
    "not a map": (16, [0.5], 0),
    "wrong type": (16, {"sent_s": "0.5"}, 0),
    "bad UTF-8": (19, b"\x81\xa6reason\xa2\xff\xfe", 0),
    "short id": (13, {**OF_TRANSFER, "transfer_id": b"short", "reason": "x"}, 0),
    "negative": (13, {**OF_TRANSFER, "epoch": -1, "reason": "x"}, 0),
    "negative seed": (10, {**TABLE[10][2], "choices": [{"index": 0, "seed": -1, "first_token": 2}]}, 0),
    "no choices": (10, {**TABLE[10][2], "choices": []}, 0),
    "too many entries": (12, {"entries": [[ID, 0, 1, 55, None, 0]] * 513}, 0),
    "array of four thousand million": (12, b"\x81\xa7entries\xdd\xff\xff\xff\xff", 0),
    "unknown reason": (14, {**OF_TRANSFER, "reason": "bored"}, 0),
}


@pytest.mark.parametrize(("type_id", "header", "payload_len"), BAD_HEADER.values(), ids=BAD_HEADER)
def test_bad_header(type_id: int, header: Any, payload_len: int) -> None:
    raw = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    payload = bytes(payload_len)
    refused(frame_bytes(type_id, raw, payload) + payload, "bad header")


BAD_PAYLOAD = {
    "prompt too short": (5, RESERVE_MAP, 4),
    "prompt too long": (5, RESERVE_MAP, 12),
    "prompt missing": (5, RESERVE_MAP, 0),
    "extras longer than announced": (12, TABLE[12][2], 4),
    "extras missing": (12, TABLE[12][2], 0),
    "inline without payload": (8, LAYER_MAP, 0),
    "inline with descriptor": (8, {**TABLE[8][2], "via": "inline"}, 5),
    "read with payload": (8, TABLE[8][2], 5),
    "read without descriptor": (8, {**LAYER_MAP, "via": "read"}, 0),
}


@pytest.mark.parametrize(("type_id", "header", "payload_len"), BAD_PAYLOAD.values(), ids=BAD_PAYLOAD)
def test_payload_that_does_not_go_with_its_header(type_id: int, header: dict[str, Any], payload_len: int) -> None:
    harness, payload = Harness(), bytes(payload_len)
    refused(frame_bytes(type_id, header, payload) + payload, "payload|descriptor", harness)
    assert harness.num_places == 0


@pytest.mark.parametrize("row", TABLE[:2], ids=["HELLO", "WELCOME"])
def test_greetings_of_newer_peers_are_understood(row: tuple[int, m.AnyMessage, dict[str, Any], bytes]) -> None:
    type_id, message, header, _ = row
    newer = {"colour": [1, {"x": None}], **header, "limits": {**LIMITS_MAP, "colour_bytes": 1}}
    (received,) = Harness(authenticated=False).reader.feed(frame_bytes(type_id, newer))
    assert received.message == message


def test_deep_nesting_in_an_ignored_key_is_refused() -> None:
    header = b"\x81\xa1x" + b"\x91" * 4000 + b"\x01"
    refused(frame_bytes(1, header), "bad header", Harness(authenticated=False))


def test_after_an_error_nothing_is_read() -> None:
    harness = Harness()
    refused(frame_bytes(16, PING, number=1), "lost", harness)
    assert len(harness.reader.get_buffer()) > 0
    refused(frame_bytes(16, PING), "lost", harness)


def test_frames_of_a_connection_are_counted() -> None:
    """What TCP never does, a broken proxy may: one of three frames lost, said twice, or overtaken by the next."""
    writer = FrameWriter()
    first, second, third = (writer.encode(m.Ping(float(n))) for n in range(3))
    assert len(Harness().reader.feed(first + second + third)) == 3
    for wrong in (second, first + third, first + first, first + second + first):
        refused(wrong, "lost, repeated or reordered")


def test_numbers_begin_again_and_pass_over_the_handshake() -> None:
    writer, harness = FrameWriter(), Harness()
    for _ in range(65_537):
        assert len(harness.reader.feed(writer.encode(m.Ping(0.5)))) == 1
    assert len(harness.reader.feed(writer.encode(m.Reject("no")) + writer.encode(m.Ping(0.5)))) == 2


@pytest.mark.parametrize("row", [row for row in TABLE if row[3] and row[0] != 8], ids=lambda row: type(row[1]).__name__)
def test_damage_to_a_control_payload_is_found(row: tuple[int, m.AnyMessage, dict[str, Any], bytes]) -> None:
    """A prompt's token ids, logprobs and logits: no digest in the header covers them, the checksum does."""
    _, message, _, payload = row
    frame = encode_frame(message, payload) + payload
    assert len(reader_for(message).reader.feed(frame)) == 1
    for at in range(len(payload)):
        damaged = bytearray(frame)
        damaged[len(frame) - 1 - at] ^= 1
        refused(bytes(damaged), "checksum", reader_for(message))


def test_what_place_refuses_is_refused() -> None:
    def place(layer: m.Layer, payload_len: int) -> Sequence[memoryview]:
        raise RemoteProtocolError("not yours")

    reader = FrameReader(LIMITS, place)
    reader.authenticated = True
    with pytest.raises(RemoteProtocolError, match="not yours"):
        reader.feed(encode_frame(m.Layer(ID, 3, 2, 1, 5, 1, 0, 2, DIGEST), LAYER_PAYLOAD))


def test_place_must_give_exactly_the_room_needed() -> None:
    reader = FrameReader(LIMITS, lambda layer, payload_len: [memoryview(bytearray(payload_len + 1))])
    reader.authenticated = True
    with pytest.raises(LocalProtocolError, match="201 bytes of room"):
        reader.feed(encode_frame(m.Layer(ID, 3, 2, 1, 5, 1, 0, 2, DIGEST), LAYER_PAYLOAD))


def test_more_bytes_than_asked_for_is_our_bug() -> None:
    with pytest.raises(LocalProtocolError, match="25 bytes received"):
        Harness().reader.advance(25)


@pytest.mark.parametrize(
    ("message", "payload_len"),
    [
        (m.Ping(0.5), 1),
        (TABLE[4][1], 4),
        (TABLE[12][1], 0),
        (TABLE[7][1], 0),
        (m.Bye("x" * 70_000), 0),
    ],
)
def test_we_do_not_send_what_the_peer_must_refuse(message: m.AnyMessage, payload_len: int) -> None:
    with pytest.raises(LocalProtocolError):
        encode_frame(message, bytes(payload_len))


VALID = [frame_bytes(row[0], row[2], row[3]) + row[3] for row in TABLE]
MAPS = st.dictionaries(
    st.sampled_from(sorted({key for row in TABLE for key in row[2]})),
    st.recursive(
        st.one_of(
            *(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats()),
            *(st.text(max_size=5), st.binary(max_size=33)),
        ),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=6,
    ),
    max_size=6,
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Valid frames with some bytes replaced, and the checksum made good again half of the time."""
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        (header_len,) = struct.unpack_from("<I", data, 8)
        header = data[PREFIX_BYTES : PREFIX_BYTES + header_len] if data[5] == 8 else data[PREFIX_BYTES:]
        struct.pack_into("<I", data, 20, xxhash.xxh32_intdigest(bytes(data[:20] + header)))
    return bytes(data)


@st.composite
def invented(draw: st.DrawFn) -> bytes:
    """A right prefix and checksum before an invented header."""
    header = draw(st.binary(min_size=1, max_size=40) | MAPS.map(msgspec.msgpack.encode))
    payload_len = draw(st.sampled_from([0, 0, 0, 3, 8, 4096, 2**63]))
    payload = bytes(payload_len if payload_len < 4097 else 0)
    return frame_bytes(draw(st.integers(0, 20)), header, payload, payload_len=payload_len) + payload


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(damaged(), damaged(), invented(), st.binary(max_size=60)), max_size=4), st.booleans())
@example([frame_bytes(1, b"\x81\xa1x" + b"\x91" * 4000)], False)
def test_fuzz_parses_or_refuses_within_bounds(frames: list[bytes], authenticated: bool) -> None:
    harness = Harness(authenticated)
    tracemalloc.start()
    try:
        for received in harness.reader.feed(b"".join(frames)):
            assert len(encode_header(received.message)) <= 65_536
    except RemoteProtocolError:
        pass
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(harness.reader.get_buffer()) <= 65_536
    assert peak_bytes < 1 << 20


def test_extras_round_trip() -> None:
    logits = struct.pack("<4f", 1.0, -2.0, 3.0, 0.5)
    top = ((3, -0.25), (1, -1.5))
    for logprobs in (None, TokenLogprobs(-0.5, ()), TokenLogprobs(-0.5, top)):
        for row in (None, logits):
            packed = pack_extras(SampledToken(7, logprobs, row))
            assert unpack_extras(memoryview(packed), logprobs is not None, row is not None, 4) == (logprobs, row)


def test_extras_bytes() -> None:
    packed = pack_extras(SampledToken(7, TokenLogprobs(-0.5, ((258, -1.0),)), b"\x01\x02\x03\x04"))
    assert packed == bytes.fromhex("000000bf 0100 02010000 000080bf 01020304")


GOOD_EXTRAS = pack_extras(SampledToken(7, TokenLogprobs(-0.5, ((3, -1.0),)), b"\0" * 16))


@pytest.mark.parametrize(
    ("view", "want_logprobs", "want_logits", "words"),
    [
        (GOOD_EXTRAS, True, False, "do not make"),
        (GOOD_EXTRAS, False, True, "should be logits"),
        (GOOD_EXTRAS, False, False, "should be logits"),
        (GOOD_EXTRAS[:-1], True, True, "do not make"),
        (GOOD_EXTRAS + b"\0", True, True, "do not make"),
        (b"\0" * 15, False, True, "should be logits"),
        (b"\0" * 5, True, False, "at least 6"),
        (struct.pack("<fH", -1.0, 21) + b"\0" * 168, True, False, "21 top"),
        (struct.pack("<fHIf", -1.0, 1, 4, -1.0), True, False, "outside the vocabulary of 4"),
        (struct.pack("<fH", NAN, 0), True, False, "not finite"),
        (struct.pack("<fHIf", -1.0, 1, 3, INF), True, False, "not finite"),
    ],
)
def test_bad_extras(view: bytes, want_logprobs: bool, want_logits: bool, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        unpack_extras(view, want_logprobs, want_logits, 4)


@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_fuzz_extras(data: bytes, want_logprobs: bool, want_logits: bool) -> None:
    try:
        logprobs, logits = unpack_extras(data, want_logprobs, want_logits, 4)
    except RemoteProtocolError:
        return
    assert pack_extras(SampledToken(0, logprobs, logits)) == data
