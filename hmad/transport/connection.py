"""One TCP connection that speaks frames: bytes from the socket go straight where FrameReader wants them."""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Protocol

from hmad.facts.errors import RemoteError, RemoteProtocolError
from hmad.transport.liveness import DEAD_AFTER_S
from hmad.wire.frames import FrameReader, FrameWriter, Payload, Received
from hmad.wire.handshake import make_reject
from hmad.wire.messages import AnyMessage

# A peer that does not read its control channel is cut off before its backlog eats our memory.
MAX_UNSENT_BYTES = 64 << 20


class FrameHandler(Protocol):
    """Who owns the connection."""

    def frame_received(self, received: Received) -> None:
        """One whole frame. Raising RemoteProtocolError ends the connection with that sentence."""

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone; called once."""


class FrameConnection(asyncio.BufferedProtocol):
    """Adapts FrameReader to asyncio. ``get_buffer`` has no side effects: uvloop calls it more often than needed."""

    def __init__(self, reader: FrameReader, make_handler: "Callable[[FrameConnection], FrameHandler]") -> None:
        self.reader = reader
        self._writer = FrameWriter()
        self._make_handler = make_handler
        self._handler: FrameHandler | None = None
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None
        self.peer_name = self.peer_host = "?"
        self.heard_s = 0.0  # when the last byte came

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        tune(transport.get_extra_info("socket"))
        address = transport.get_extra_info("peername")
        self.peer_name = format_address(address)
        self.peer_host = host_of(address)
        self._handler = self._make_handler(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self.heard_s = time.monotonic()
        if self._transport is None or self._transport.is_closing() or self._handler is None:
            return
        try:
            received = self.reader.advance(nbytes)
            if received is not None:
                self._handler.frame_received(received)
        except RemoteError as error:
            if isinstance(error, RemoteProtocolError) and not self.reader.authenticated:
                self.send(make_reject(str(error)))  # who is new here may be of another release: say what is wrong
            self.close(error)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        handler, self._handler, self._transport = self._handler, None, None
        if handler is not None:
            handler.connection_lost(self._error or exc)

    @property
    def in_frame(self) -> bool:
        """Whether the peer has begun a frame and owes the rest of it."""
        return self.reader.in_frame

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: AnyMessage, payload: Payload | None = None) -> None:
        """Queue one frame. The payload must not change afterwards (control payloads are small and owned by us)."""
        if self._transport is None or self._transport.is_closing():
            return  # its handler is about to learn, or has learnt, that the connection is lost
        self._transport.write(self._writer.encode(message, payload or b""))
        if payload:
            self._transport.write(payload)
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.close(RemoteProtocolError(f"{self.peer_name} does not read: {MAX_UNSENT_BYTES} bytes wait for it"))

    def detach(self) -> socket.socket:
        """The socket, for whoever goes on with it. This object is done: it neither reads nor hears of the end."""
        if self._transport is None:
            raise RemoteError("the connection is lost")
        file_number = os.dup(self._transport.get_extra_info("socket").fileno())
        self._handler = None
        self._transport.abort()
        return socket.socket(fileno=file_number)

    def close(self, error: Exception | None = None) -> None:
        """Send what is queued, then close; the handler learns ``error`` as the reason."""
        self._error = self._error or error
        if self._transport is not None:
            self._transport.close()

    def abort(self, error: Exception | None = None) -> None:
        """Close at once and drop what is queued: for a peer that is silent."""
        self._error = self._error or error
        if self._transport is not None:
            self._transport.abort()


def tune(sock: socket.socket | None) -> None:
    """Frames are whole messages: never let the kernel wait for more. And bytes that nobody acknowledges mean that the
    peer or the way to it is gone: the kernel shall say so as early as our heartbeats would."""
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * DEAD_AFTER_S))


def host_of(address: tuple[object, ...] | str | None) -> str:
    """Who an address is, without the port."""
    return str(address[0]) if isinstance(address, tuple) else "?"


def format_address(address: tuple[object, ...] | str | None) -> str:
    """HOST:PORT for messages."""
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address or "?")
