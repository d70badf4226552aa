"""The sending end of a bulk connection: LAYER frames leave one after the other, straight from staging."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

from hmad.transport.rate import Pacer
from hmad.wire.frames import FrameWriter
from hmad.wire.messages import Layer


@dataclass(eq=False)
class OutgoingLayer:
    """A LAYER frame on its way. ``begin`` is asked right before the first byte and may refuse (its transfer ended);
    ``sent`` is called when the kernel has all of it: only then may the payload's memory be used again.
    """

    message: Layer
    payload: memoryview
    begin: Callable[[], bool]
    sent: Callable[[], None]


class BulkSender:
    """One bulk connection after its handshake. Owns the socket."""

    def __init__(self, sock: socket.socket, pacer: Pacer) -> None:
        self._sock = sock
        self._pacer = pacer
        self._writer = FrameWriter()
        self._queue: asyncio.Queue[OutgoingLayer] = asyncio.Queue()
        self._closed = False

    @property
    def backlog(self) -> int:
        return self._queue.qsize()

    def put(self, layer: OutgoingLayer) -> None:
        """Queue a frame; its payload is staging memory, so the queue is bounded by the staging pool."""
        if self._closed:
            layer.sent()
        else:
            self._queue.put_nowait(layer)

    async def run(self) -> None:
        """Send until cancelled or the connection breaks (OSError)."""
        try:
            while True:
                await self._send(await self._next())
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket and give back whatever is queued, now or later."""
        self._closed = True
        self._sock.close()
        while not self._queue.empty():
            self._queue.get_nowait().sent()

    async def _next(self) -> OutgoingLayer:
        was_idle = self._queue.empty()
        layer = await self._queue.get()
        if was_idle:
            self._pacer.skip_idle()
        return layer

    async def _send(self, layer: OutgoingLayer) -> None:
        try:
            if layer.begin():
                await self._send_bytes(self._writer.encode(layer.message, layer.payload), layer.payload)
        finally:
            layer.sent()

    async def _send_bytes(self, header: bytes, payload: memoryview) -> None:
        """Return when the kernel has every byte: nothing of the payload is copied by us."""
        for piece in self._pacer.slices(payload):
            await self._pacer.wait_turn(piece.nbytes)
            await self._send_together(header, piece)
            header = b""

    async def _send_together(self, *parts: bytes | memoryview) -> None:
        """A frame's header costs no call of its own as long as the kernel has room for it."""
        try:
            num_sent = self._sock.sendmsg(parts)
        except BlockingIOError:
            num_sent = 0
        for part in parts:
            if num_sent < len(part):
                await asyncio.get_running_loop().sock_sendall(self._sock, part[num_sent:])
            num_sent = max(0, num_sent - len(part))
