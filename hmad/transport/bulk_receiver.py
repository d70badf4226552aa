"""The receiving end of a bulk connection: LAYERs come straight into the memory that their transfers hold.

In a thread of its own, whose socket blocks: what a receive call brings is digested while it is in the cache, and the
lock of Python is given back for both.
"""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from hmad.facts.errors import RemoteError, RemoteProtocolError
from hmad.facts.logs import get_logger
from hmad.wire.frames import FrameReader
from hmad.wire.messages import Layer

log = get_logger(__name__)

# A receive call waits for all it is asked for, but no longer than this: whoever watches for a stall shall hear of bytes
# that trickle in.
RECEIVE_S = 0.25
TIMEVAL = struct.Struct("ll")  # seconds, microseconds


class LayerHandler(Protocol):
    """Who knows where LAYERs go. All calls come on the loop's thread."""

    @property
    def has_room(self) -> bool:
        """Whether the next LAYER may begin. If not, ``BulkReceiver.room_changed`` is called once it may."""

    def layer_begins(self, layer: Layer, payload_bytes: int) -> Sequence[memoryview]:
        """Where its bytes go. Raising RemoteError ends the connection."""

    def layer_landed(self, digest: bytes | None, landed_s: float) -> None:
        """All bytes of the LAYER that began last are there. Raising RemoteError ends the connection."""

    def receiver_ended(self, error: Exception) -> None:
        """The connection is gone, and nothing writes where its LAYERs went any more; called once."""


class BulkReceiver:
    """One bulk connection of a decode node after its handshake.

    Its thread reads the socket and owns the FrameReader; everything else belongs to the loop's thread, which answers
    where each LAYER goes, hears of those that have landed and at last of the end, in this order, and then closes the
    socket. While the thread waits for an answer it writes nowhere.
    """

    def __init__(self, sock: socket.socket, reader: FrameReader, handler: LayerHandler) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEVAL.pack(0, round(1e6 * RECEIVE_S)))
        self._sock = sock
        self._reader = reader
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._answers: SimpleQueue[Sequence[memoryview] | Exception] = SimpleQueue()
        self._question: tuple[Layer, int] | None = None  # that waits for room
        self._waits_for_answer = False
        self._error: Exception | None = None  # why it was stopped
        self._heard_s = time.monotonic()  # when the last bytes came, or were let in
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, name="bulk-receiver", daemon=True)

    def start(self) -> None:
        """Begin to receive. If the system has no thread left, ``receiver_ended`` says so."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._loop.call_soon(self._end, error)

    # --- the loop's thread ---

    @property
    def in_frame(self) -> bool:
        """Whether the peer has begun a frame and owes the rest of it."""
        return self._reader.in_frame and not self._waits_for_answer

    @property
    def heard_s(self) -> float:
        """When the last bytes came; while they wait for us, now."""
        return time.monotonic() if self._waits_for_answer else self._heard_s

    def room_changed(self) -> None:
        """Let the LAYER that waits begin, if it may now."""
        if self._question is not None and self._error is None and self._handler.has_room:
            question, self._question = self._question, None
            try:
                self._answers.put(self._handler.layer_begins(*question))
            except Exception as error:
                self._answers.put(error)

    def stop(self, error: Exception) -> None:
        """End soon, whatever the thread waits for."""
        if self._error is None:
            self._error = error
            self._answers.put(error)
            with suppress(OSError):  # not connected any more
                self._sock.shutdown(socket.SHUT_RDWR)

    def _asked(self, layer: Layer, payload_bytes: int) -> None:
        self._question = (layer, payload_bytes)
        self.room_changed()

    def _landed(self, digest: bytes | None, landed_s: float) -> None:
        if self._error is None:
            try:
                self._handler.layer_landed(digest, landed_s)
            except Exception as error:
                self.stop(error)
                if not isinstance(error, RemoteError):
                    raise

    def _end(self, error: Exception | None) -> None:
        self._error = self._error or error or RemoteError("stopped")
        self._sock.close()
        self.ended.set_result(None)
        self._handler.receiver_ended(self._error)

    # --- the thread ---

    def place(self, layer: Layer, payload_bytes: int) -> Sequence[memoryview]:
        """The reader asks where a LAYER goes."""
        self._waits_for_answer = True
        self._tell(partial(self._asked, layer, payload_bytes))
        answer = self._answers.get()
        self._heard_s = time.monotonic()
        self._waits_for_answer = False
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _work(self) -> None:
        ended: Exception | None = None
        try:
            while self._error is None:
                self._receive()
        except (RemoteError, OSError) as error:
            ended = error
        except Exception as bug:
            log.exception("receiving KV failed")
            ended = bug
        self._tell(partial(self._end, ended))

    def _receive(self) -> None:
        try:
            num_bytes = self._sock.recv_into(self._reader.get_buffer(), 0, socket.MSG_WAITALL)
        except BlockingIOError:  # nothing came within RECEIVE_S
            return
        if num_bytes == 0:
            raise RemoteError("the prefill node closed the connection")
        self._advance(num_bytes)

    def _advance(self, num_bytes: int) -> None:
        """So many bytes were received where the reader wanted them."""
        self._heard_s = time.monotonic()
        received = self._reader.advance(num_bytes)
        if received is None:
            return
        if not isinstance(received.message, Layer):
            raise RemoteProtocolError(f"{type(received.message).__name__} may not come on a bulk channel")
        self._tell(partial(self._landed, received.digest, self._heard_s))

    def _tell(self, event: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(event)
