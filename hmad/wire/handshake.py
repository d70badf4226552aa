"""The handshake, sans-IO: HELLO, WELCOME, AUTH. Both ends agree on what they will speak and prove the cluster key.

A proof is HMAC-SHA256(key, role || P's nonce || D's nonce || SHA-256(HELLO header) || SHA-256(WELCOME header up to its
proof)). The role keeps a proof from being played back to its maker, the fresh nonces keep it from being played back
later, and the hashes cover every word both ends agreed on. WELCOME's proof is always the last 32 bytes of its header.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

import msgspec

from hmad.facts.errors import HandshakeRejected, RemoteProtocolError
from hmad.facts.formats import KVGeometry, negotiate
from hmad.wire.frames import Received, encode_header
from hmad.wire.limits import MAX_REASON_CHARS
from hmad.wire.messages import Auth, Channel, Geometry, Hello, Limits, Reject, Welcome

NONCE_BYTES = 32
PROOF_BYTES = 32
NO_PROOF = bytes(PROOF_BYTES)  # of a node without a cluster key
PREFILL = "prefill"
DECODE = "decode"


@dataclass(frozen=True)
class NodeIdentity:
    """What a node is: said in its HELLO or WELCOME, and compared with the peer's.

    ``formats`` are what a prefill node offers, best first, or what a decode node accepts; ``digests`` likewise.
    ``limits`` are the largest payloads the node is willing to receive.
    """

    node_id: str
    boot_id: bytes  # 16 bytes
    role: str
    version: str
    fingerprint: bytes  # 32 bytes
    geometry: KVGeometry
    first_head: int
    num_heads: int
    formats: tuple[str, ...]
    limits: Limits
    digests: tuple[str, ...]


@dataclass(frozen=True)
class Agreement:
    """What a finished handshake settled. ``limits`` are the peer's: the largest payloads we may send it."""

    session: bytes
    channel: Channel
    peer_node_id: str
    peer_boot_id: bytes
    peer_version: str
    format: str
    digest: str
    limits: Limits
    total_slots: int


class PrefillHandshake:
    """P's side of one connection: send ``hello``, give the answer to ``receive``, send the AUTH it returns.

    D says nothing more when it takes the AUTH, and REJECT when it does not.
    """

    def __init__(self, identity: NodeIdentity, session: bytes, channel: Channel, key: bytes | None) -> None:
        self._identity = identity
        self._key = key
        self.hello = _make_hello(identity, session, channel)
        self.agreement: Agreement | None = None

    def receive(self, received: Received) -> Auth:
        """Raises HandshakeRejected, with what D or we object to, or RemoteProtocolError."""
        if self.agreement is not None:
            raise RemoteProtocolError("the decode node answered HELLO twice")
        match received.message:
            case Welcome() as welcome:
                return self._welcomed(welcome, received.header)
            case Reject(reason=reason):
                raise HandshakeRejected(f"the decode node refuses: {reason}")
            case other:
                raise RemoteProtocolError(f"{type(other).__name__} instead of an answer to HELLO")

    def _welcomed(self, welcome: Welcome, header: bytes) -> Auth:
        if header[-PROOF_BYTES:] != welcome.proof:
            raise RemoteProtocolError("WELCOME does not end with its proof")
        fault = _node_fault(self._identity, welcome) or self._choice_fault(welcome)
        if fault:
            raise HandshakeRejected(fault)
        transcript = _transcript(encode_header(self.hello), self.hello.nonce, header, welcome.nonce)
        fault = _proof_fault(self._key, DECODE, transcript, welcome.proof)
        if fault:
            raise HandshakeRejected(fault)
        self.agreement = _agree(self.hello, welcome, peer=welcome)
        return Auth(_proof(self._key, PREFILL, transcript))

    def _choice_fault(self, welcome: Welcome) -> str | None:
        for what, chosen, offered in (
            ("KV format", welcome.format, self.hello.formats),
            ("digest", welcome.digest, self.hello.digests),
        ):
            if chosen not in offered:
                return f"the decode node chose the {what} {chosen!r}, this prefill node offered {_listed(offered)}"
        return None


class DecodeHandshake:
    """D's side of one connection: send what ``receive`` returns; after a Reject, close.

    ``agreement`` is set when P's AUTH is right.
    """

    def __init__(self, identity: NodeIdentity, total_slots: int, key: bytes | None) -> None:
        self._identity = identity
        self._total_slots = total_slots
        self._key = key
        self._hello: Hello | None = None
        self._welcome: Welcome | None = None
        self._transcript = b""
        self.agreement: Agreement | None = None

    def receive(self, received: Received) -> Welcome | Reject | None:
        """HELLO is answered by Welcome or Reject, AUTH by nothing (done) or Reject. Raises RemoteProtocolError."""
        match received.message:
            case Hello() as hello if self._hello is None:
                self._hello = hello
                return self._greeted(hello, received.header)
            case Auth(proof=proof) if self._hello and self._welcome and not self.agreement:
                return self._authenticated(self._hello, self._welcome, proof)
            case Reject(reason=reason):
                raise HandshakeRejected(f"the prefill node refuses: {reason}")
            case other:
                raise RemoteProtocolError(f"{type(other).__name__} out of order in the handshake")

    def _greeted(self, hello: Hello, header: bytes) -> Welcome | Reject:
        fault = _node_fault(self._identity, hello) or _heads_fault(self._identity, hello)
        if fault:
            return make_reject(fault)
        kv_format = negotiate(hello.formats, self._identity.formats)
        digest = negotiate(hello.digests, self._identity.digests)
        if kv_format is None:
            return make_reject(_no_common("KV format", hello.formats, self._identity.formats))
        if digest is None:
            return make_reject(_no_common("digest", hello.digests, self._identity.digests))
        return self._welcome_to(hello, header, kv_format, digest)

    def _welcome_to(self, hello: Hello, hello_header: bytes, kv_format: str, digest: str) -> Welcome:
        unproven = _make_welcome(self._identity, kv_format, digest, self._total_slots, NO_PROOF)
        self._transcript = _transcript(hello_header, hello.nonce, encode_header(unproven), unproven.nonce)
        proof = _proof(self._key, DECODE, self._transcript)
        self._welcome = msgspec.structs.replace(unproven, proof=proof)
        return self._welcome

    def _authenticated(self, hello: Hello, welcome: Welcome, proof: bytes) -> Reject | None:
        self._welcome = None  # one try per WELCOME
        fault = _proof_fault(self._key, PREFILL, self._transcript, proof)
        if fault:
            return make_reject(fault)
        self.agreement = _agree(hello, welcome, peer=hello)
        return None


def make_reject(reason: str) -> Reject:
    """A REJECT whose reason is plain ASCII, so that its length in characters bounds its bytes."""
    return Reject(reason.encode("ascii", "backslashreplace").decode("ascii")[:MAX_REASON_CHARS])


def _make_hello(identity: NodeIdentity, session: bytes, channel: Channel) -> Hello:
    return Hello(
        version=identity.version,
        node_id=identity.node_id,
        boot_id=identity.boot_id,
        role=identity.role,
        session=session,
        channel=channel,
        fingerprint=identity.fingerprint,
        geometry=_wire_geometry(identity),
        first_head=identity.first_head,
        num_heads=identity.num_heads,
        formats=identity.formats,
        limits=identity.limits,
        digests=identity.digests,
        nonce=secrets.token_bytes(NONCE_BYTES),
    )


def _make_welcome(identity: NodeIdentity, kv_format: str, digest: str, total_slots: int, proof: bytes) -> Welcome:
    return Welcome(
        version=identity.version,
        node_id=identity.node_id,
        boot_id=identity.boot_id,
        role=identity.role,
        fingerprint=identity.fingerprint,
        geometry=_wire_geometry(identity),
        format=kv_format,
        limits=identity.limits,
        digest=digest,
        nonce=secrets.token_bytes(NONCE_BYTES),
        total_slots=total_slots,
        proof=proof,
    )


def _wire_geometry(identity: NodeIdentity) -> Geometry:
    geometry = identity.geometry
    return Geometry(geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)


def _agree(hello: Hello, welcome: Welcome, peer: Hello | Welcome) -> Agreement:
    return Agreement(
        session=hello.session,
        channel=hello.channel,
        peer_node_id=peer.node_id,
        peer_boot_id=peer.boot_id,
        peer_version=peer.version,
        format=welcome.format,
        digest=welcome.digest,
        limits=peer.limits,
        total_slots=welcome.total_slots,
    )


def _node_fault(ours: NodeIdentity, theirs: Hello | Welcome) -> str | None:
    """The first thing both nodes must share and do not, said so that a person can mend it."""
    wanted_role = DECODE if ours.role == PREFILL else PREFILL
    if theirs.role != wanted_role:
        return f"this {ours.role} node talks to a {wanted_role} node, the peer is a {theirs.role!r} node"
    if _release(theirs.version) != _release(ours.version):
        return (
            f"this {ours.role} node runs hmad {ours.version}, the {theirs.role} node {theirs.version!r}: "
            "run the same release on both"
        )
    if theirs.fingerprint != ours.fingerprint:
        return (
            f"the models differ: this {ours.role} node has fingerprint {ours.fingerprint.hex()}, the {theirs.role} "
            f"node {theirs.fingerprint.hex()}: give both the same model directory"
        )
    if theirs.geometry != _wire_geometry(ours):
        return f"the KV geometries differ: {_wire_geometry(ours)} here, {theirs.geometry} on the {theirs.role} node"
    return None


def _release(version: str) -> list[str]:
    """Major and minor version: what must be equal for two nodes to talk."""
    return version.split(".")[:2]


def _heads_fault(ours: NodeIdentity, hello: Hello) -> str | None:
    if (hello.first_head, hello.num_heads) == (ours.first_head, ours.num_heads):
        return None
    return (
        f"the head ranges differ: the prefill node sends {hello.num_heads} KV heads from head {hello.first_head}, "
        f"this decode node holds {ours.num_heads} from head {ours.first_head}"
    )


def _no_common(what: str, offered: tuple[str, ...], accepted: tuple[str, ...]) -> str:
    return f"no common {what}: the prefill node offers {_listed(offered)}, this decode node accepts {_listed(accepted)}"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))


def _transcript(hello_header: bytes, hello_nonce: bytes, welcome_header: bytes, welcome_nonce: bytes) -> bytes:
    welcome_unproven = welcome_header[:-PROOF_BYTES]
    hashes = hashlib.sha256(hello_header).digest() + hashlib.sha256(welcome_unproven).digest()
    return hello_nonce + welcome_nonce + hashes


def _proof(key: bytes | None, role: str, transcript: bytes) -> bytes:
    return NO_PROOF if key is None else hmac.digest(key, role.encode() + transcript, "sha256")


def _proof_fault(key: bytes | None, prover: str, transcript: bytes, proof: bytes) -> str | None:
    if hmac.compare_digest(_proof(key, prover, transcript), proof):
        return None
    verifier = PREFILL if prover == DECODE else DECODE
    if key is None:
        return f"the {prover} node has a cluster key, this {verifier} node has none: give both the same key file"
    if proof == NO_PROOF:
        return f"this {verifier} node has a cluster key, the {prover} node has none: give both the same key file"
    return f"the {prover} node's proof is wrong: its cluster key differs from this {verifier} node's"
