"""The sending end of a bulk connection: LAYER frames leave one after the other, straight from staging.

In a thread of its own, whose socket blocks: a whole frame is one call into the kernel and one turn at Python's lock,
however often the kernel has to wait for room. The thread that launches GPU work needs that lock all the time. Payloads
are digested here, right before they leave: as many at a time as there are connections, and no first token waits for it.
"""

import asyncio
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

from msgspec.structs import replace

from hmad.facts.logs import get_logger
from hmad.transport.rate import Pacer
from hmad.wire.frames import FrameWriter, payload_digest
from hmad.wire.messages import Layer

log = get_logger(__name__)


class OutgoingLayer:
    """A LAYER frame on its way. Belongs to whoever was first to ``take`` it: the sending thread, right before its first
    byte, or the loop's thread, which so keeps it from leaving. ``begun`` and ``sent`` are called on the loop's thread
    for a frame that leaves; only after ``sent`` may the payload's memory be used again. The sending thread digests it
    before it takes, since whoever finds a frame taken reads its ``message``: so it may still read, to no effect, what
    the loop's thread has taken and others already use.
    """

    def __init__(
        self, message: Layer, payload: memoryview, begun: Callable[[], None], sent: Callable[[], None]
    ) -> None:
        self.message, self.payload = message, payload
        self.begun, self.sent = begun, sent
        self.begun_s = self.sent_s = 0.0  # set by the sending thread, ``begun_s`` before it takes
        self._owner = threading.Lock()

    def take(self) -> bool:
        """Whether the frame is the caller's: the first who asks has it for good."""
        return self._owner.acquire(blocking=False)

    @property
    def is_taken(self) -> bool:
        return self._owner.locked()


class BulkSender:
    """One bulk connection after its handshake.

    Its thread writes to the socket and numbers the frames; everything else belongs to the loop's thread, which queues
    frames for it, hears of them by reports, and closes the socket once the thread has ended.
    """

    def __init__(self, sock: socket.socket, pacer: Pacer, digest: str) -> None:
        self.backlog = 0  # frames that the kernel does not have yet
        self._digest = digest
        self._sock = sock
        self._pacer = pacer
        self._writer = FrameWriter()
        self._queue: SimpleQueue[OutgoingLayer | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._reports: deque[Callable[[], None]] = deque()
        self._report_is_due = False
        self._bug: Exception | None = None  # of a report
        self._closing = threading.Event()
        self._ended: asyncio.Future[Exception | None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, name="bulk-sender", daemon=True)

    def put(self, layer: OutgoingLayer) -> None:
        """Queue a frame; its payload is staging memory, so the queue is bounded by the staging pool."""
        self.backlog += 1
        if self._closing.is_set():
            self._give_back(layer)
        else:
            self._queue.put(layer)

    async def run(self) -> None:
        """Send until cancelled or the connection breaks (OSError). Returns when the thread has ended."""
        self._sock.setblocking(True)
        self._thread.start()
        try:
            await asyncio.wait([self._ended])
        finally:
            self.close()
            error = await asyncio.shield(self._ended)  # whoever is cancelled twice must not take the end from others
        if error is not None:
            raise error

    def close(self) -> None:
        """Send nothing more. What is queued is given back once the thread has ended, soon and whatever it waits for."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._queue.put(None)
        with suppress(OSError):  # not connected any more
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is None:
            self._end(None)

    # --- the thread ---

    def _work(self) -> None:
        error: Exception | None = None
        try:
            while True:
                was_idle = self._queue.empty()
                layer = self._queue.get()
                if layer is None:
                    break
                self._send(layer, was_idle)
        except OSError as broken:
            error = broken
        except Exception as bug:
            log.exception("sending KV failed")
            error = bug
        self._report(partial(self._end, error))

    def _send(self, layer: OutgoingLayer, was_idle: bool) -> None:
        outcome = partial(self._give_back, layer)
        try:
            if layer.is_taken:
                return
            layer.message = replace(layer.message, digest=payload_digest(self._digest, layer.payload))
            if was_idle:
                self._pacer.skip_idle()
            pieces = self._paced(layer.payload)
            layer.begun_s = time.monotonic()  # a slower link, which a rate cap stands for, would begin here
            first = next(pieces)
            if layer.take():
                outcome = partial(self._sent, layer)
                self._report(layer.begun)
                send_together(self._sock, self._writer.encode(layer.message, layer.payload), first)
                for piece in pieces:
                    send_together(self._sock, piece)
        finally:
            layer.sent_s = time.monotonic()
            self._report(outcome)

    def _paced(self, payload: memoryview) -> Iterator[memoryview]:
        """The payload in pieces, each when its turn has come."""
        for piece in self._pacer.slices(payload):
            wait_s = self._pacer.seconds_until_turn(piece.nbytes)
            if wait_s > 0 and self._closing.wait(wait_s):
                raise ConnectionAbortedError("closed while a frame waited for its turn")
            yield piece

    def _report(self, event: Callable[[], None]) -> None:
        """Have the loop call ``event``, behind all earlier ones; one wake-up for as many as there are by then."""
        self._reports.append(event)
        if not self._report_is_due:
            self._report_is_due = True
            self._loop.call_soon_threadsafe(self._take_reports)

    # --- the loop's thread hears ---

    def _take_reports(self) -> None:
        self._report_is_due = False  # first: what is appended from here on wakes the loop again
        while self._reports:
            event = self._reports.popleft()
            try:
                event()
            except Exception as bug:  # the reports behind it must be heard all the same; then the session ends
                log.exception("a report of sent KV failed")
                self._bug = self._bug or bug
                self.close()

    def _sent(self, layer: OutgoingLayer) -> None:
        """The kernel has all of it, or the connection broke."""
        self.backlog -= 1
        layer.sent()

    def _give_back(self, layer: OutgoingLayer) -> None:
        """No byte of it has left."""
        self.backlog -= 1
        if layer.take():
            layer.sent()

    def _end(self, error: Exception | None) -> None:
        """The thread is through with the socket and with all payloads."""
        self._closing.set()
        self._sock.close()
        try:
            while not self._queue.empty():
                layer = self._queue.get()
                if layer is not None:
                    self._give_back(layer)
        finally:
            self._ended.set_result(self._bug or error)


def send_together(sock: socket.socket, *parts: bytes | memoryview) -> None:
    """Send all of it over a blocking socket: in one call, unless something interrupts it."""
    views = [memoryview(part) for part in parts]
    while views:
        num_sent = sock.sendmsg(views)
        while views and num_sent >= len(views[0]):
            num_sent -= len(views.pop(0))
        if num_sent:
            views[0] = views[0][num_sent:]
