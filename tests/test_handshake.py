"""Both sides of the handshake: what is agreed, what is refused and in which words, and that proofs prove something."""

import dataclasses
from typing import Any

import msgspec
import pytest

from hmad.facts.errors import HandshakeRejected, RemoteProtocolError
from hmad.facts.formats import KVGeometry
from hmad.wire import messages as m
from hmad.wire.frames import FrameReader, Received, encode_frame, encode_header
from hmad.wire.handshake import (
    NO_PROOF,
    DecodeHandshake,
    NodeIdentity,
    PrefillHandshake,
    make_reject,
)
from hmad.wire.limits import MAX_REASON_CHARS

KEY = b"k" * 32
SESSION = b"s" * 16
PREFILL = NodeIdentity(
    node_id="p1",
    boot_id=b"p" * 16,
    role="prefill",
    version="0.1.0",
    fingerprint=b"\x5e" * 32,
    geometry=KVGeometry(28, 8, 128),
    first_head=0,
    num_heads=8,
    formats=("bfp8", "int8", "bf16"),
    limits=m.Limits(0, 0, 1000),
    digests=("xxh3-128",),
)
DECODE = dataclasses.replace(
    PREFILL,
    node_id="d1",
    boot_id=b"d" * 16,
    role="decode",
    formats=("bf16", "int8"),
    limits=m.Limits(5000, 4000, 0),
    digests=("xxh3-128", "none"),
)


def over_the_wire(message: m.AnyMessage) -> Received:
    """As the other side receives it: a real frame through a real reader."""
    reader = FrameReader(m.Limits(0, 0, 0), lambda layer, payload_len: [])
    (received,) = reader.feed(encode_frame(message))
    return received


def raw(message: m.AnyMessage, header: bytes) -> Received:
    return Received(message, None, None, header)


def pair(
    prefill: NodeIdentity = PREFILL,
    decode: NodeIdentity = DECODE,
    p_key: bytes | None = KEY,
    d_key: bytes | None = KEY,
    channel: m.Channel = m.Channel.CONTROL,
) -> tuple[PrefillHandshake, DecodeHandshake]:
    return PrefillHandshake(prefill, SESSION, channel, p_key), DecodeHandshake(decode, 1000, d_key)


def welcome_of(p: PrefillHandshake, d: DecodeHandshake) -> m.Welcome:
    answer = d.receive(over_the_wire(p.hello))
    assert isinstance(answer, m.Welcome), answer
    return answer


def reject_of(**changes: Any) -> str:
    """What D answers to a P that differs from ours in one thing."""
    p, d = pair(dataclasses.replace(PREFILL, **changes))
    answer = d.receive(over_the_wire(p.hello))
    assert isinstance(answer, m.Reject)
    assert d.agreement is None
    return answer.reason


def objection_to(**changes: Any) -> str:
    """What P says to a WELCOME that differs from D's in one thing (keyless, so that the proof is not the reason)."""
    p, d = pair(p_key=None, d_key=None)
    welcome = msgspec.structs.replace(welcome_of(p, d), **changes)
    with pytest.raises(HandshakeRejected) as caught:
        p.receive(over_the_wire(welcome))
    assert p.agreement is None
    return str(caught.value)


@pytest.mark.parametrize("key", [KEY, None], ids=["key", "no key"])
@pytest.mark.parametrize("channel", list(m.Channel))
def test_both_sides_agree(key: bytes | None, channel: m.Channel) -> None:
    p, d = pair(p_key=key, d_key=key, channel=channel)
    auth = p.receive(over_the_wire(welcome_of(p, d)))
    agreed_before_auth = d.agreement
    assert d.receive(over_the_wire(auth)) is None
    assert agreed_before_auth is None
    for ours, peer in ((p.agreement, DECODE), (d.agreement, PREFILL)):
        assert ours is not None
        assert (ours.session, ours.channel, ours.format, ours.digest) == (SESSION, channel, "int8", "xxh3-128")
        assert (ours.peer_node_id, ours.peer_boot_id, ours.limits) == (peer.node_id, peer.boot_id, peer.limits)
        assert ours.total_slots == 1000


def test_the_first_of_ps_formats_that_d_accepts() -> None:
    p, d = pair(decode=dataclasses.replace(DECODE, formats=("bf16", "int8", "bfp8")))
    assert welcome_of(p, d).format == "bfp8"


def test_the_first_of_ps_digests_that_d_accepts() -> None:
    p, d = pair(dataclasses.replace(PREFILL, digests=("none", "xxh3-128")))
    assert welcome_of(p, d).digest == "none"


def test_greetings_with_words_of_a_newer_release_are_proven_too() -> None:
    p, d = pair()
    newer = {**msgspec.to_builtins(p.hello, builtin_types=(bytes,)), "colour": "blue"}
    header = msgspec.msgpack.encode(newer)
    welcome = d.receive(raw(p.hello, header))
    assert isinstance(welcome, m.Welcome)
    with pytest.raises(HandshakeRejected, match="proof is wrong"):
        p.receive(over_the_wire(welcome))  # D saw another HELLO than P sent


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "0.2.0"}, ["hmad 0.1.0", "'0.2.0'", "same release"]),
        ({"fingerprint": b"\x77" * 32}, ["models differ", "5e" * 32, "77" * 32, "model directory"]),
        ({"geometry": KVGeometry(28, 8, 64)}, ["geometries differ", "head_dim=128", "head_dim=64"]),
        ({"first_head": 4, "num_heads": 4}, ["4 KV heads from head 4", "8 from head 0"]),
        ({"formats": ("bfp8", "mxfp8")}, ["no common KV format", "'bfp8', 'mxfp8'", "'bf16', 'int8'"]),
        ({"digests": ("sha3",)}, ["no common digest", "'sha3'", "'xxh3-128', 'none'"]),
        ({"role": "decode"}, ["talks to a prefill node", "'decode'"]),
    ],
)
def test_d_rejects_and_names_both_values(change: dict[str, object], words: list[str]) -> None:
    reason = reject_of(**change)
    assert all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "0.2.0"}, ["hmad 0.1.0", "'0.2.0'"]),
        ({"fingerprint": b"\x77" * 32}, ["models differ", "5e" * 32, "77" * 32]),
        ({"geometry": m.Geometry(28, 8, 64)}, ["geometries differ", "head_dim=128", "head_dim=64"]),
        ({"format": "mxfp8"}, ["chose the KV format 'mxfp8'", "'bfp8', 'int8', 'bf16'"]),
        ({"digest": "none"}, ["chose the digest 'none'", "'xxh3-128'"]),
        ({"role": "prefill"}, ["talks to a decode node", "'prefill'"]),
    ],
)
def test_p_objects_and_names_both_values(change: dict[str, object], words: list[str]) -> None:
    reason = objection_to(**change)
    assert all(word in reason for word in words), reason


def test_patch_releases_talk_to_each_other() -> None:
    p, d = pair(dataclasses.replace(PREFILL, version="0.1.7"))
    p.receive(over_the_wire(welcome_of(p, d)))
    assert p.agreement is not None
    assert p.agreement.peer_version == "0.1.0"


def test_p_repeats_what_d_refuses() -> None:
    p, _ = pair()
    with pytest.raises(HandshakeRejected, match="the decode node refuses: no room"):
        p.receive(over_the_wire(m.Reject("no room")))


def test_d_repeats_what_p_refuses() -> None:
    p, d = pair()
    welcome_of(p, d)
    with pytest.raises(HandshakeRejected, match="the prefill node refuses: wrong proof"):
        d.receive(over_the_wire(m.Reject("wrong proof")))


@pytest.mark.parametrize(
    ("p_key", "d_key", "words"),
    [
        (None, KEY, "the decode node has a cluster key, this prefill node has none"),
        (KEY, None, "this prefill node has a cluster key, the decode node has none"),
        (b"x" * 32, KEY, "the decode node's proof is wrong: its cluster key differs"),
    ],
)
def test_p_checks_the_key(p_key: bytes | None, d_key: bytes | None, words: str) -> None:
    p, d = pair(p_key=p_key, d_key=d_key)
    with pytest.raises(HandshakeRejected, match=words):
        p.receive(over_the_wire(welcome_of(p, d)))


@pytest.mark.parametrize(
    ("d_key", "proof", "words"),
    [
        (KEY, NO_PROOF, "this decode node has a cluster key, the prefill node has none"),
        (None, b"x" * 32, "the prefill node has a cluster key, this decode node has none"),
        (KEY, b"x" * 32, "the prefill node's proof is wrong: its cluster key differs"),
    ],
)
def test_d_checks_the_key(d_key: bytes | None, proof: bytes, words: str) -> None:
    p, d = pair(d_key=d_key)
    welcome_of(p, d)
    answer = d.receive(over_the_wire(m.Auth(proof)))
    assert isinstance(answer, m.Reject)
    assert words in answer.reason
    assert d.agreement is None


def test_a_proof_cannot_be_reflected() -> None:
    p, d = pair()
    answer = d.receive(over_the_wire(m.Auth(welcome_of(p, d).proof)))
    assert isinstance(answer, m.Reject)


def test_a_proof_cannot_be_replayed() -> None:
    p, d = pair()
    auth = p.receive(over_the_wire(welcome_of(p, d)))
    assert d.receive(over_the_wire(auth)) is None
    _, another = pair()
    assert isinstance(another.receive(over_the_wire(p.hello)), m.Welcome)
    assert isinstance(another.receive(over_the_wire(auth)), m.Reject)


def test_a_welcome_cannot_be_replayed() -> None:
    p, d = pair()
    welcome = welcome_of(p, d)
    with pytest.raises(HandshakeRejected, match="proof is wrong"):
        pair()[0].receive(over_the_wire(welcome))


@pytest.mark.parametrize("change", [{"total_slots": 7}, {"format": "bf16"}, {"limits": m.Limits(9, 9, 9)}])
def test_an_altered_welcome_is_found_out(change: dict[str, object]) -> None:
    p, d = pair()
    welcome = msgspec.structs.replace(welcome_of(p, d), **change)
    with pytest.raises(HandshakeRejected, match="proof is wrong"):
        p.receive(over_the_wire(welcome))


def test_an_altered_hello_is_found_out() -> None:
    p, d = pair()
    answer = d.receive(over_the_wire(msgspec.structs.replace(p.hello, formats=("bf16",))))
    with pytest.raises(HandshakeRejected, match="proof is wrong"):
        p.receive(over_the_wire(answer))  # type: ignore[arg-type]


def test_the_proof_ends_the_welcome() -> None:
    p, d = pair()
    welcome = welcome_of(p, d)
    assert encode_header(welcome).endswith(welcome.proof)
    with pytest.raises(RemoteProtocolError, match="does not end with its proof"):
        p.receive(raw(welcome, encode_header(welcome) + b"x"))


def test_nonces_are_fresh() -> None:
    hellos = {pair()[0].hello.nonce for _ in range(3)}
    welcomes = {welcome_of(*pair()).nonce for _ in range(3)}
    assert len(hellos | welcomes) == 6


def test_d_takes_one_hello_then_one_auth() -> None:
    p, d = pair()
    with pytest.raises(RemoteProtocolError, match="Auth out of order"):
        d.receive(over_the_wire(m.Auth(NO_PROOF)))
    auth = p.receive(over_the_wire(welcome_of(p, d)))
    with pytest.raises(RemoteProtocolError, match="Hello out of order"):
        d.receive(over_the_wire(p.hello))
    assert d.receive(over_the_wire(auth)) is None
    with pytest.raises(RemoteProtocolError, match="Auth out of order"):
        d.receive(over_the_wire(auth))


def test_a_wrong_auth_is_not_followed_by_a_second_try() -> None:
    p, d = pair()
    auth = p.receive(over_the_wire(welcome_of(p, d)))
    assert isinstance(d.receive(over_the_wire(m.Auth(b"x" * 32))), m.Reject)
    with pytest.raises(RemoteProtocolError, match="Auth out of order"):
        d.receive(over_the_wire(auth))


def test_p_takes_one_answer_to_its_hello() -> None:
    p, d = pair()
    welcome = welcome_of(p, d)
    with pytest.raises(RemoteProtocolError, match="Auth instead of an answer"):
        p.receive(over_the_wire(m.Auth(NO_PROOF)))
    p.receive(over_the_wire(welcome))
    with pytest.raises(RemoteProtocolError, match="twice"):
        p.receive(over_the_wire(welcome))


def test_a_reject_always_fits_a_strangers_header() -> None:
    reason = reject_of(formats=tuple("\N{PILE OF POO}" * 60 + str(n) for n in range(10)))
    assert len(reason) == MAX_REASON_CHARS
    assert over_the_wire(m.Reject(reason)).message == m.Reject(reason)
    assert make_reject("a\nb \xe4").reason == "a\nb \\xe4"
