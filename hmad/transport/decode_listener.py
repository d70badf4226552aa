"""The decode node's side of the KV plane: accept, shake hands, and carry the transfers of each session."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hmad.compute.landing import Lane
from hmad.facts.errors import ConfigError, LocalError, RemoteError, RemoteProtocolError
from hmad.facts.formats import KVGeometry
from hmad.facts.logs import get_logger
from hmad.transport.bulk_receiver import BulkReceiver
from hmad.transport.connection import FrameConnection
from hmad.transport.liveness import DEAD_AFTER_S, HANDSHAKE_S, Liveness, StallWatch
from hmad.transport.strangers import Strangers
from hmad.wire import limits as bounds
from hmad.wire.decode_transfer import DecodeTransfer
from hmad.wire.decode_transfers import DecodeTransfers, LayerPlace, Outcome, Verdict
from hmad.wire.digest_strikes import DigestStrikes
from hmad.wire.frames import DIGEST_NONE, FrameReader, Received
from hmad.wire.handshake import Agreement, DecodeHandshake, NodeIdentity, make_reject
from hmad.wire.messages import (
    Abort,
    AbortReason,
    AnyMessage,
    Bye,
    Cancel,
    Channel,
    Commit,
    DenyReason,
    Drain,
    Layer,
    Load,
    Ping,
    Pong,
    Reject,
    Reserve,
    TokenEntry,
    Tokens,
)

log = get_logger(__name__)

MAX_ENTRIES_PER_FRAME = 512
DISCARD_BYTES = 1 << 20


class DecodeHost(Protocol):
    """The decode role, seen from its sessions. All calls come on the loop's thread."""

    def load(self) -> Load: ...

    def reserve(self, session: "DecodeSession", transfer: DecodeTransfer, message: Reserve, prompt: memoryview) -> None:
        """Answer with ``session.grant`` or ``session.deny``."""

    def open_lane(self, when_free: Callable[[], object]) -> Lane:
        """Where one more bulk connection's LAYERs land. Raises LocalError when there is no memory for it."""

    def place(self, transfer: DecodeTransfer, layer: Layer, lane: Lane) -> Sequence[memoryview]:
        """Where the bytes of these blocks go."""

    def ready(self, session: "DecodeSession", transfer: DecodeTransfer, commit: Commit) -> None:
        """Everything has landed and is verified: let it decode, then ``session.committed``."""

    def cancelled(self, transfer: DecodeTransfer, choices: Sequence[int]) -> None:
        """P wants no more of these choices: finish them as ``cancelled``."""

    def release(self, transfer: DecodeTransfer) -> None:
        """The transfer is over, or its session is gone: give back what it holds as soon as nothing uses it."""

    def failed(self, cause: str) -> None:
        """Something went wrong that the peer or we have ended a transfer or a connection for: count it."""


@dataclass(frozen=True)
class ListenerSettings:
    """What all sessions of a decode node share."""

    identity: NodeIdentity
    geometry: KVGeometry
    cluster_key: bytes | None
    total_slots: int
    lease_s: float


class DecodeListener:
    """The stream port and the sessions that came through it."""

    def __init__(self, settings: ListenerSettings, host: DecodeHost) -> None:
        self.settings = settings
        self.host = host
        self.sessions: dict[bytes, DecodeSession] = {}
        self.strangers = Strangers(bounds.MAX_STRANGERS, bounds.MAX_STRANGERS_PER_ADDRESS)
        self._connections: set[AcceptedConnection] = set()
        self._server: asyncio.Server | None = None
        self._drain: Drain | None = None  # what was said when we began to drain

    async def start(self, address: str, port: int) -> None:
        """Listen. Raises ConfigError when the port cannot be had."""
        try:
            self._server = await asyncio.get_running_loop().create_server(self._accept, address, port)
        except OSError as error:
            raise ConfigError(f"cannot listen on stream port {address}:{port}: {error.strerror or error}") from error

    async def stop(self, reason: str) -> None:
        """Stop accepting, say goodbye, close."""
        if self._server is not None:
            self._server.close()
        for session in list(self.sessions.values()):
            session.end(reason)
        for connection in list(self._connections):
            connection.connection.close()
        await asyncio.gather(*(connection.ended() for connection in self._connections))
        if self._server is not None:
            await self._server.wait_closed()

    def drain(self, reason: str) -> None:
        """Tell every prefill node, and those that come later, to take its new requests elsewhere."""
        self._drain = Drain(reason=reason)
        for session in self.sessions.values():
            session.send(self._drain)

    def _accept(self) -> FrameConnection:
        accepted = AcceptedConnection(self)
        connection = FrameConnection(FrameReader(self.settings.identity.limits, accepted.place), accepted.made)
        return connection

    def add(self, connection: "AcceptedConnection") -> None:
        self._connections.add(connection)

    def discard(self, connection: "AcceptedConnection") -> None:
        self._connections.discard(connection)

    def join(self, connection: "AcceptedConnection", agreement: Agreement) -> "DecodeSession":
        """The session a freshly authenticated connection belongs to. Raises RemoteProtocolError."""
        session = self.sessions.get(agreement.session)
        if agreement.channel is Channel.BULK:
            if session is None or session.peer_boot_id != agreement.peer_boot_id:
                raise RemoteProtocolError("a bulk channel needs the control channel of its session first")
            if len(session.connections) > bounds.MAX_BULK_CHANNELS:
                raise RemoteProtocolError(f"a session may have {bounds.MAX_BULK_CHANNELS} bulk channels")
            session.connections.append(connection)
            return session
        if session is not None:
            raise RemoteProtocolError("this session has a control channel already")
        if len(self.sessions) >= bounds.MAX_SESSIONS:
            raise RemoteProtocolError(f"this decode node has {bounds.MAX_SESSIONS} sessions already")
        self.sessions[agreement.session] = session = DecodeSession(self, connection, agreement)
        if self._drain is not None:
            session.send(self._drain)
        log.info("session opened", peer=session.name, format=agreement.format)
        return session

    def open_lane(self, when_free: Callable[[], object]) -> Lane:
        """Where a bulk connection's LAYERs land. Raises RemoteProtocolError when there is no memory for one more."""
        loop = asyncio.get_running_loop()
        try:
            return self.host.open_lane(lambda: loop.call_soon_threadsafe(when_free))
        except LocalError as error:
            raise RemoteProtocolError(str(error)) from error

    def tell_load(self) -> None:
        """Slots were taken or given back: every prefill node that waits for some shall know."""
        load = self.host.load()
        for session in self.sessions.values():
            session.send_load(load)

    def forget(self, session: "DecodeSession") -> None:
        self.sessions.pop(session.agreement.session, None)


class AcceptedConnection:
    """One accepted connection: a stranger until its handshake is done, then a channel of a session.

    Belongs to the loop's thread, but for ``place``, which the thread of a bulk channel calls, too.
    """

    def __init__(self, listener: DecodeListener) -> None:
        self._listener = listener
        settings = listener.settings
        self._handshake = DecodeHandshake(settings.identity, settings.total_slots, settings.cluster_key)
        self._session: DecodeSession | None = None
        self.connection: FrameConnection
        self._bulk: BulkChannel | None = None  # has the socket once the handshake of a bulk channel is done

    def made(self, connection: FrameConnection) -> "AcceptedConnection":
        self.connection = connection
        self._listener.add(self)
        self._listener.strangers.add(self, connection.peer_host, HANDSHAKE_S)
        return self

    def place(self, layer: Layer, payload_bytes: int) -> Sequence[memoryview]:
        """Where a LAYER's payload goes; asked once its header is here."""
        if self._session is None:
            raise RemoteProtocolError("LAYER before the handshake is done")
        if self._bulk is None:
            raise RemoteProtocolError("LAYER may not come on the control channel")
        return self._bulk.receiver.place(layer, payload_bytes)

    def frame_received(self, received: Received) -> None:
        if self._session is None:
            self._greeted(received)
        else:
            self._session.frame_received(received)

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.strangers.discard(self)
        self._listener.discard(self)
        if self._session is not None:
            self._session.lost(error or RemoteError("the prefill node closed the connection"))
        elif isinstance(error, RemoteError):
            log.warning("a stranger was turned away", peer=self.connection.peer_name, error=str(error))
            self._listener.host.failed(type(error).__name__)

    @property
    def is_receiving(self) -> bool:
        """Whether a thread may still write to where LAYERs were to go."""
        return self._bulk is not None and not self._bulk.receiver.ended.done()

    @property
    def heard_s(self) -> float:
        """When the last byte came."""
        return self.connection.heard_s if self._bulk is None else self._bulk.receiver.heard_s

    def close(self, error: Exception) -> None:
        """Send what is queued, then close. On a bulk channel we send nothing."""
        if self._bulk is None:
            self.connection.close(error)
        else:
            self._bulk.receiver.stop(error)

    def abort(self, error: Exception) -> None:
        """Close at once."""
        if self._bulk is None:
            self.connection.abort(error)
        else:
            self._bulk.receiver.stop(error)

    async def ended(self) -> None:
        """Wait until no thread receives for it."""
        if self._bulk is not None:
            await asyncio.shield(self._bulk.receiver.ended)

    def show_out(self, reason: str) -> None:
        self.abort(RemoteError(reason))

    def _greeted(self, received: Received) -> None:
        answer = self._handshake.receive(received)
        if answer is not None:
            self.connection.send(answer)
        if isinstance(answer, Reject):
            self.connection.close(RemoteError(f"refused: {answer.reason}"))
        elif self._handshake.agreement is not None:
            self._authenticated(self._handshake.agreement)

    def _authenticated(self, agreement: Agreement) -> None:
        self._listener.strangers.discard(self)
        self.connection.reader.authenticated = True
        self.connection.reader.digest = agreement.digest
        try:
            self._session = self._listener.join(self, agreement)
            if agreement.channel is Channel.BULK:
                self._bulk = BulkChannel(self._listener, self._session, self)
                self._bulk.receiver.start()  # its thread asks us, who can answer now
        except RemoteProtocolError as error:
            self.connection.send(make_reject(str(error)))
            raise


class BulkChannel:
    """A bulk channel of a session: its lane, and the thread that receives into it. Belongs to the loop's thread."""

    def __init__(self, listener: DecodeListener, session: "DecodeSession", accepted: AcceptedConnection) -> None:
        self._session = session
        self._accepted = accepted
        self._place: LayerPlace | None = None
        self._lane = listener.open_lane(self._lane_changed)
        try:
            sock = accepted.connection.detach()
        except OSError as error:
            self._lane.close()
            raise RemoteProtocolError(f"this decode node has no room for one more bulk channel: {error}") from error
        self.receiver = BulkReceiver(sock, accepted.connection.reader, self)
        self._watch = StallWatch(self.receiver, accepted.show_out)

    def _lane_changed(self) -> None:
        self.receiver.room_changed()

    # --- LayerHandler ---

    @property
    def has_room(self) -> bool:
        return self._lane.is_free

    def layer_begins(self, layer: Layer, payload_bytes: int) -> Sequence[memoryview]:
        self._place, views = self._session.layer_begins(layer, payload_bytes, self._lane)
        return views

    def layer_landed(self, digest: bytes | None, landed_s: float) -> None:
        if self._place is not None:
            self._session.layer_landed(self._place, digest, self._lane, landed_s)

    def receiver_ended(self, error: Exception) -> None:
        self._watch.stop()
        self._lane.close()
        self._accepted.connection_lost(error)


class DecodeSession:
    """One prefill node's session: its channels and its transfers."""

    def __init__(self, listener: DecodeListener, control: AcceptedConnection, agreement: Agreement) -> None:
        settings = listener.settings
        identity = settings.identity
        self._listener = listener
        self._host = listener.host
        self._lease_s = settings.lease_s
        self._control = control.connection
        self.connections = [control]
        self.agreement = agreement
        self.name = f"{agreement.peer_node_id} ({control.connection.peer_name})"
        self.peer_boot_id = agreement.peer_boot_id
        self.transfers = DecodeTransfers(
            settings.geometry,
            identity.first_head,
            identity.num_heads,
            agreement.format,
            agreement.digest != DIGEST_NONE,
        )
        self._strikes = DigestStrikes()
        self._commits: dict[DecodeTransfer, tuple[Commit, float]] = {}  # whose LAYERs are not all here, and since when
        self._discard = memoryview(bytearray(DISCARD_BYTES))  # threads write to it as they like: nobody reads it
        self._filling: list[DecodeTransfer] = []  # of a closed session, whose slots threads may still write to
        self._liveness = Liveness(self._beat, self._silent)
        self._load_sent: Load | None = None
        self.is_open = True
        self.send_load(self._host.load())

    # --- what the role says ---

    def send(self, message: AnyMessage) -> None:
        self._control.send(message)

    def tell_load(self) -> None:
        """Tell every prefill node."""
        self._listener.tell_load()

    def send_load(self, load: Load) -> None:
        """Tell the prefill node our load, if it has changed."""
        if load != self._load_sent:
            self._load_sent = load
            self.send(load)

    def grant(self, transfer: DecodeTransfer) -> None:
        self.send(self.transfers.grant(transfer.transfer_id, self._lease_s, time.monotonic()))

    def deny(self, transfer: DecodeTransfer, reason: DenyReason, message: str, retry_after_s: float) -> None:
        self.send(self.transfers.deny(transfer.transfer_id, reason, message, retry_after_s))

    def committed(self, transfer: DecodeTransfer) -> None:
        self.send(self.transfers.committed(transfer.transfer_id, time.monotonic()))
        if transfer.cancelled_choices:
            self._host.cancelled(transfer, sorted(transfer.cancelled_choices))

    def abort(self, transfer: DecodeTransfer, reason: AbortReason, message: str) -> None:
        if self.is_open and not transfer.over:
            self._host.failed(reason)
            self.send(self.transfers.abort(transfer.transfer_id, reason, message))
            self._settle()

    def send_tokens(self, entries: Sequence[tuple[TokenEntry, bytes]]) -> None:
        """The new tokens of one step, in as many frames as it takes."""
        if not self.is_open:
            return
        for entry, _ in entries:
            self.transfers.token(entry)
        for batch in split_entries(entries, self.agreement.limits.tokens_bytes):
            self._control.send(Tokens(tuple(entry for entry, _ in batch)), b"".join(extras for _, extras in batch))
        self._settle()

    def describe(self) -> dict[str, object]:
        """For /status."""
        return {
            "node_id": self.agreement.peer_node_id,
            "address": self._control.peer_name,
            "format": self.agreement.format,
            "transfers": len(self.transfers.live()),
            "discarded_frames": self.transfers.num_discarded,
        }

    def end(self, reason: str) -> None:
        """Say goodbye and close every channel."""
        self.send(Bye(reason=reason))
        self._close(RemoteError(f"this node ends the session: {reason}"))

    # --- the bulk channel ---

    def layer_begins(self, layer: Layer, payload_bytes: int, lane: Lane) -> tuple[LayerPlace, Sequence[memoryview]]:
        place = self.transfers.layer_destination(layer, payload_bytes, time.monotonic())
        if place.discard or place.transfer is None:
            return place, repeat_view(self._discard, payload_bytes)
        return place, self._host.place(place.transfer, layer, lane)

    def layer_landed(self, place: LayerPlace, digest: bytes | None, lane: Lane, landed_s: float) -> None:
        if not self.is_open:
            return
        self._liveness.heard()
        # The digest was computed while the bytes came in: what is left after the last byte is one comparison.
        outcome = self.transfers.layer_landed(place, digest, landed_s, time.monotonic())
        if outcome.verdict in (Verdict.WAITING, Verdict.READY):
            lane.store()
        self._take(outcome)

    # --- the control channel ---

    def frame_received(self, received: Received) -> None:
        self._liveness.heard()
        match received.message:
            case Reserve() as message:
                self._host.reserve(self, self.transfers.reserve(message), message, received.payload or memoryview(b""))
                self._settle()
            case Commit() as message:
                outcome = self.transfers.commit(message)
                if outcome.verdict is not Verdict.DISCARDED and outcome.transfer is not None:
                    self._commits[outcome.transfer] = (message, time.monotonic())
                self._take(outcome)
            case Cancel() as message:
                self._cancel(message)
            case Abort() as message:
                self._aborted(message)
            case Ping(sent_s=sent_s):
                self.send(Pong(ping_sent_s=sent_s, received_s=time.monotonic(), sent_s=time.monotonic()))
            case Pong():
                pass
            case Drain(reason=reason):
                log.info("peer drains", peer=self.name, reason=reason)
            case Bye(reason=reason):
                raise RemoteError(f"the prefill node said goodbye: {reason}")
            case other:
                raise RemoteProtocolError(f"{type(other).__name__} may not come from a prefill node")

    def lost(self, error: Exception) -> None:
        """A channel is gone, and with it the session."""
        self._close(error)
        if not any(channel.is_receiving for channel in self.connections):
            filling, self._filling = self._filling, []
            for transfer in filling:
                self._host.release(transfer)

    def _take(self, outcome: Outcome) -> None:
        for reply in outcome.replies:
            self.send(reply)
        if outcome.verdict is Verdict.READY and outcome.transfer is not None:
            commit, _ = self._commits.pop(outcome.transfer)
            self._host.ready(self, outcome.transfer, commit)
        elif outcome.verdict is Verdict.DIGEST_MISMATCH:
            log.warning(
                "a digest is wrong", peer=self.name, transfer_id=outcome.transfer and outcome.transfer.transfer_id
            )
            self._host.failed(AbortReason.DIGEST_MISMATCH)
            if self._strikes.add(time.monotonic()):
                raise RemoteProtocolError("three wrong digests within a minute: the link damages bytes")
        if outcome.verdict is not Verdict.WAITING:  # most LAYERs: nothing is given back, the load is the same
            self._settle()

    def _cancel(self, message: Cancel) -> None:
        transfer = next((t for t in self.transfers.live() if t.transfer_id == message.transfer_id), None)
        cancellation = self.transfers.cancel(message)
        if cancellation.abort is not None:
            self.send(cancellation.abort)
        elif cancellation.choices and transfer is not None:
            self._host.cancelled(transfer, cancellation.choices)
        self._settle()

    def _aborted(self, message: Abort) -> None:
        answer = self.transfers.aborted(message)
        if answer is not None:
            self.send(answer)
        self._settle()

    def _settle(self) -> None:
        """Give back what transfers that are over held, and tell the new load."""
        for transfer in self.transfers.take_released():
            self._commits.pop(transfer, None)
            self._host.release(transfer)
        self.tell_load()

    # --- life ---

    def _beat(self) -> None:
        now_s = time.monotonic()
        for transfer in self.transfers.expired(now_s):
            self.abort(transfer, AbortReason.LEASE_EXPIRED, f"no KV came for {self._lease_s:g} s")
        for transfer in self._stuck(now_s):
            self.abort(transfer, AbortReason.LEASE_EXPIRED, "KV that was said to be on its way never came")
        self._load_sent = None  # the heartbeat tells the load whether it changed or not
        self.send_load(self._host.load())
        self.send(Ping(sent_s=time.monotonic()))

    def _stuck(self, now_s: float) -> list[DecodeTransfer]:
        """Transfers whose LAYERs had all begun to leave, yet no byte comes any more: a bulk channel is broken."""
        heard_s = max((channel.heard_s for channel in self.connections[1:]), default=0.0)
        return [t for t, (_, since_s) in self._commits.items() if now_s - max(since_s, heard_s) > DEAD_AFTER_S]

    def _silent(self, silence_s: float) -> None:
        self._close(RemoteError(f"no sign of life for {silence_s:.1f} s"), at_once=True)

    def _close(self, error: Exception, at_once: bool = False) -> None:
        if not self.is_open:
            return
        self.is_open = False
        log.info("session closed", peer=self.name, reason=str(error))
        self._liveness.stop()
        self._listener.forget(self)
        held = self.transfers.close()
        if held or isinstance(error, RemoteProtocolError):  # else a prefill node that had nothing here has left
            self._host.failed(type(error).__name__)
        self._filling = [transfer for transfer in held if transfer.num_filling]
        for transfer in held:
            if not transfer.num_filling:
                self._host.release(transfer)
        for channel in self.connections:
            if at_once:
                channel.abort(error)
            else:
                channel.close(error)


def repeat_view(scratch: memoryview, num_bytes: int) -> list[memoryview]:
    """``num_bytes`` of destinations for bytes that nobody wants, all over the same scratch."""
    whole, rest = divmod(num_bytes, len(scratch))
    return [scratch] * whole + ([scratch[:rest]] if rest else [])


def split_entries(
    entries: Sequence[tuple[TokenEntry, bytes]], max_payload_bytes: int
) -> list[list[tuple[TokenEntry, bytes]]]:
    """Batches that respect both bounds of a TOKENS frame: its entries and its payload."""
    batches: list[list[tuple[TokenEntry, bytes]]] = []
    size = 0
    for entry, extras in entries:
        full = not batches or len(batches[-1]) == MAX_ENTRIES_PER_FRAME or size + len(extras) > max_payload_bytes
        if full:
            batches.append([])
            size = 0
        batches[-1].append((entry, extras))
        size += len(extras)
    return batches
