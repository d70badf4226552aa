"""The sending end of a bulk connection: LAYER frames leave one after the other, straight from staging."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

from hmad.transport.rate import Pacer
from hmad.wire.frames import encode_frame
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
                await self._send(await self._queue.get())
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket and give back whatever is queued, now or later."""
        self._closed = True
        self._sock.close()
        while not self._queue.empty():
            self._queue.get_nowait().sent()

    async def _send(self, layer: OutgoingLayer) -> None:
        try:
            if layer.begin():
                await self._send_bytes(encode_frame(layer.message, layer.payload.nbytes), layer.payload)
        finally:
            layer.sent()

    async def _send_bytes(self, header: bytes, payload: memoryview) -> None:
        """``sock_sendall`` returns when the kernel has every byte: nothing of the payload is copied by us."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._sock, header)
        for piece in self._pacer.slices(payload):
            await self._pacer.wait_turn(piece.nbytes)
            await loop.sock_sendall(self._sock, piece)
