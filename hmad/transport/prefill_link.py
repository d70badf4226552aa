"""The prefill node's side of a peer: dial, shake hands, keep alive, carry transfers, and dial again when lost."""

import asyncio
import random
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from hmad.facts.errors import HandshakeRejected, HmadError, RemoteError, RemoteProtocolError
from hmad.facts.logs import get_logger
from hmad.facts.timeline import Timeline
from hmad.transport.bulk import BulkSender, OutgoingLayer
from hmad.transport.clock import ClockOffset
from hmad.transport.connection import FrameConnection, tune
from hmad.transport.lease import Denied, Lease
from hmad.transport.liveness import DIAL_S, Liveness
from hmad.transport.rate import Pacer
from hmad.wire.frames import FrameReader, Received, encode_frame
from hmad.wire.handshake import Agreement, NodeIdentity, PrefillHandshake, make_reject
from hmad.wire.limits import PROMPT_TOKEN_BYTES
from hmad.wire.messages import (
    Abort,
    AnyMessage,
    Bye,
    Channel,
    Committed,
    Deny,
    DenyReason,
    Drain,
    Grant,
    Landed,
    Load,
    Ping,
    Pong,
    Reject,
    Reserve,
    Tokens,
    Welcome,
)
from hmad.wire.prefill_transfers import PrefillTransfers

log = get_logger(__name__)

BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 1.0  # a node that comes back is used again before waiting requests give up


@dataclass(frozen=True)
class LinkSettings:
    """What all links of a prefill node share."""

    identity: NodeIdentity
    cluster_key: bytes | None
    num_bulk_connections: int
    pacer: Pacer
    frame_bytes: int  # the most that a LAYER holds
    failed: Callable[[Exception], None]  # a session could not be had, or was lost: count it


class PeerLink:
    """One decode node, as the prefill node knows it over all its sessions."""

    def __init__(self, host: str, port: int, settings: LinkSettings, changed: Callable[[], None]) -> None:
        self.host, self.port = host, port
        self.name = f"{host}:{port}"
        self._settings = settings
        self._changed = changed
        self._session: PrefillSession | None = None
        self.trouble: str | None = "not connected yet"

    async def run(self) -> None:
        """Keep a session with the peer until cancelled; back off, with jitter, while there is none."""
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                self._session = await PrefillSession.open(self, self._settings)
                backoff_s = BACKOFF_FIRST_S
                self._set_trouble(None)
                await self._session.run()
            except (OSError, HmadError, TimeoutError) as error:
                self._failed(error)
            except Exception as error:  # a bug must not cost us the peer for good
                log.exception("the session failed", peer=self.name)
                self._failed(error)
            finally:
                self._forget_session()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, BACKOFF_LAST_S)

    def _failed(self, error: Exception) -> None:
        self._settings.failed(error)
        self._set_trouble(describe(error, self.name))

    def _forget_session(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
            self._changed()

    def _set_trouble(self, trouble: str | None) -> None:
        if trouble and trouble != self.trouble:
            log.warning("peer is not usable", peer=self.name, trouble=trouble)
        elif trouble is None:
            log.info("peer is ready", peer=self.name)
        self.trouble = trouble
        self._changed()

    def load_changed(self) -> None:
        self._changed()

    def drain(self, reason: str) -> None:
        """Tell the decode node that nothing new will come."""
        if self._session is not None:
            self._session.send(Drain(reason=reason))

    @property
    def session(self) -> "PrefillSession":
        if self._session is None:
            raise RemoteError(f"decode node {self.name}: {self.trouble}")
        return self._session

    @property
    def usable(self) -> bool:
        """Connected, and willing to take new work."""
        return self._session is not None and not self._session.draining

    @property
    def free_slots(self) -> int:
        return self._session.load.free_slots if self._session else 0

    def describe(self) -> dict[str, object]:
        """For /status."""
        session = self._session
        return {
            "address": self.name,
            "usable": self.usable,
            "trouble": self.trouble,
            "format": session.agreement.format if session else None,
            "free_slots": self.free_slots,
            "total_slots": session.agreement.total_slots if session else None,
            "clock_offset_s": session.clock.offset_s if session and session.clock.known else None,
        }


class PrefillSession:
    """One session: a control connection, bulk connections, and the transfers on them."""

    def __init__(self, link: PeerLink, settings: LinkSettings) -> None:
        self.link = link
        self.peer_name = link.name
        self.num_kv_heads = settings.identity.num_heads
        self._settings = settings
        self._id = secrets.token_bytes(16)
        self._handshake = PrefillHandshake(settings.identity, self._id, Channel.CONTROL, settings.cluster_key)
        self._loop = asyncio.get_running_loop()
        self._control = FrameConnection(FrameReader(settings.identity.limits, _no_layers), lambda _: self)
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._liveness: Liveness | None = None
        self._bulks: list[BulkSender] = []
        self._leases: dict[bytes, Lease] = {}
        self.transfers = PrefillTransfers()
        self.clock = ClockOffset()
        self.load = Load(free_slots=0, total_slots=0, running=0, waiting=0)
        self.draining = False

    # --- life ---

    @classmethod
    async def open(cls, link: PeerLink, settings: LinkSettings) -> "PrefillSession":
        """Dial and shake hands on every channel. Raises OSError, TimeoutError or RemoteError."""
        session = cls(link, settings)
        try:
            async with asyncio.timeout(DIAL_S):
                await session._open_control()
                for _ in range(settings.num_bulk_connections):
                    session._bulks.append(await session._open_bulk())
        except BaseException:
            session.close()
            raise
        return session

    async def _open_control(self) -> None:
        await self._loop.create_connection(lambda: self._control, self.link.host, self.link.port)
        self._control.send(self._handshake.hello)
        await self._ready

    async def _open_bulk(self) -> BulkSender:
        sock = await connect_socket(self.link.host, self.link.port)
        try:
            handshake = PrefillHandshake(self._settings.identity, self._id, Channel.BULK, self._settings.cluster_key)
            await self._loop.sock_sendall(sock, encode_frame(handshake.hello))
            auth = handshake.receive(await receive_frame(sock, FrameReader(self._settings.identity.limits, _no_layers)))
            await self._loop.sock_sendall(sock, encode_frame(auth))
        except BaseException:
            sock.close()
            raise
        return BulkSender(sock, self._settings.pacer, self.agreement.digest)

    async def run(self) -> None:
        """Carry transfers until the session is lost; raises why."""
        senders = [asyncio.create_task(self._send_bulk(bulk)) for bulk in self._bulks]
        try:
            await self._lost
        finally:
            for sender in senders:
                sender.cancel()
            await asyncio.gather(*senders, return_exceptions=True)  # their threads have ended then

    async def _send_bulk(self, bulk: BulkSender) -> None:
        try:
            await bulk.run()
        except Exception as error:  # if it is a bug, the thread has said so
            self._control.abort(RemoteError(f"the bulk connection broke: {error}"))

    def close(self) -> None:
        """Drop everything; leases that still run learn that the peer is gone."""
        if self._liveness:
            self._liveness.stop()
        self._control.abort()
        for bulk in self._bulks:
            bulk.close()
        self.transfers.close()
        message = f"decode node {self.peer_name} is gone: {self.link.trouble or 'session closed'}"
        for lease in list(self._leases.values()):
            lease.session_lost(RemoteError(message))  # one each: whoever raises it adds to its traceback
        for future in (self._ready, self._lost):
            future.cancel()

    @property
    def agreement(self) -> Agreement:
        if self._handshake.agreement is None:
            raise RemoteError(f"decode node {self.link.name}: the handshake is not done")
        return self._handshake.agreement

    # --- frames out ---

    def reserve(self, message: Reserve, prompt: bytes, timeline: Timeline) -> Lease:
        """Ask for slots; the lease tells the answer. Raises Denied for a prompt beyond what the peer takes."""
        most = self.agreement.limits.reserve_bytes
        if len(prompt) > most:  # sent all the same, it would cost us the session
            num_tokens, most_tokens = len(prompt) // PROMPT_TOKEN_BYTES, most // PROMPT_TOKEN_BYTES
            why = f"the prompt has {num_tokens} tokens, decode node {self.peer_name} takes at most {most_tokens}"
            raise Denied(
                Deny(message.transfer_id, message.epoch, DenyReason.NEVER_FITS, why, 0.0), self.load.free_slots
            )
        lease = Lease(self, message, prompt, timeline)
        self._leases[message.transfer_id] = lease
        return lease

    def send(self, message: AnyMessage, payload: bytes | None = None) -> None:
        self._control.send(message, payload)

    def send_layer(self, layer: OutgoingLayer) -> None:
        """On the bulk connection with the least to do; no order is assumed across them."""
        min(self._bulks, key=lambda bulk: bulk.backlog).put(layer)

    def forget(self, lease: Lease) -> None:
        """The transfer has ended on both sides."""
        self._leases.pop(lease.transfer_id, None)

    # --- frames in (FrameHandler) ---

    def frame_received(self, received: Received) -> None:
        if self._liveness:
            self._liveness.heard()
        if self._handshake.agreement is None:
            self._greeted(received)
            return
        match received.message:
            case Load() as load:
                self._load_received(load)
            case Landed() as landed:
                self._lease_of(landed.transfer_id).landed(landed)
            case Grant() as grant:
                self._lease_of(grant.transfer_id).granted_by_peer(grant)
            case Deny() as deny:
                self._lease_of(deny.transfer_id).denied_by_peer(deny)
            case Committed() as committed:
                self._lease_of(committed.transfer_id).committed_by_peer(committed)
            case Abort() as abort:
                self._lease_of(abort.transfer_id).aborted_by_peer(abort)
            case Tokens() as tokens:
                self._tokens_received(tokens, received.payload)
            case Ping(sent_s=sent_s):
                now = time.monotonic()
                self.send(Pong(ping_sent_s=sent_s, received_s=now, sent_s=time.monotonic()))
            case Pong() as pong:
                self.clock.add(pong, time.monotonic())
            case Drain():
                self.draining = True
                self.link.load_changed()
            case Reject(reason=reason):
                raise HandshakeRejected(f"the decode node refuses: {reason}")
            case Bye(reason=reason):
                raise RemoteError(f"the decode node said goodbye: {reason}")
            case other:
                raise RemoteProtocolError(f"{type(other).__name__} may not come from a decode node")

    def connection_lost(self, error: Exception | None) -> None:
        reason = error or RemoteError("the decode node closed the connection")
        for future in (self._ready, self._lost):
            if not future.done():
                future.set_exception(reason)

    def _greeted(self, received: Received) -> None:
        try:
            auth = self._handshake.receive(received)
        except HandshakeRejected as rejected:
            if isinstance(received.message, Welcome):  # it is we who refuse: the decode node's log shall say so, too
                self.send(make_reject(str(rejected)))
            raise
        self._check_frames()
        self._control.reader.authenticated = True
        self.send(auth)
        self._liveness = Liveness(self._beat, self._silent)
        self._beat()

    def _check_frames(self) -> None:
        ours, theirs = self._settings.frame_bytes, self.agreement.limits.layer_bytes
        if ours > theirs:
            raise HandshakeRejected(
                f"--frame-bytes {ours} is more than the {theirs} that the decode node takes: lower it"
            )

    def _beat(self) -> None:
        self.send(Ping(sent_s=time.monotonic()))

    def _silent(self, silence_s: float) -> None:
        self._control.abort(RemoteError(f"no sign of life for {silence_s:.1f} s"))

    def _load_received(self, load: Load) -> None:
        self.load = load
        if not self._ready.done():
            self._ready.set_result(None)  # the first LOAD tells that AUTH was accepted
        self.link.load_changed()

    def _tokens_received(self, tokens: Tokens, payload: memoryview | None) -> None:
        leases = [self._lease_of(entry.transfer_id) for entry in tokens.entries]
        self.transfers.tokens(tokens)  # may end a transfer whose other choices are still to be told
        start = 0
        for lease, entry in zip(leases, tokens.entries, strict=True):
            extras = bytes(payload[start : start + entry.payload_bytes]) if payload else b""
            start += entry.payload_bytes
            lease.token_received(entry, extras)

    def _lease_of(self, transfer_id: bytes) -> Lease:
        lease = self._leases.get(transfer_id)
        if lease is None:
            raise RemoteProtocolError(f"transfer {transfer_id.hex()} is not one of this session")
        return lease


def _no_layers(message: AnyMessage, payload_bytes: int) -> list[memoryview]:
    raise RemoteProtocolError("LAYER may not come from a decode node")


async def connect_socket(host: str, port: int) -> socket.socket:
    """A non-blocking TCP socket, connected. Raises OSError."""
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        tune(sock)
        await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


async def receive_frame(sock: socket.socket, reader: FrameReader) -> Received:
    """The next frame of a raw socket. Raises RemoteError when the peer closes."""
    loop = asyncio.get_running_loop()
    while True:
        num_bytes = await loop.sock_recv_into(sock, reader.get_buffer())
        if num_bytes == 0:
            raise RemoteError("the decode node closed the connection during the handshake")
        received = reader.advance(num_bytes)
        if received is not None:
            return received


def describe(error: BaseException, name: str) -> str:
    """Why there is no session, in words."""
    if isinstance(error, TimeoutError):
        return f"no answer to the handshake within {DIAL_S:g} s: is {name} the stream port of a decode node?"
    if isinstance(error, ConnectionRefusedError):
        return f"nobody listens on {name}: is the decode node up?"
    return str(error) or type(error).__name__
