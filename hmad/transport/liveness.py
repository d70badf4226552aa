"""Is the peer there? Every frame of it says so; heartbeats fill the silence."""

import asyncio
import time
from collections.abc import Callable

HEARTBEAT_S = 0.3
DEAD_AFTER_S = 1.5
HANDSHAKE_S = 5.0


class Liveness:
    """Sends a heartbeat every HEARTBEAT_S and reports a peer that has been silent for DEAD_AFTER_S.

    Silence is judged only at a heartbeat that came in time: a loop that was itself held up has not listened.
    """

    def __init__(self, beat: Callable[[], None], silent: Callable[[float], None]) -> None:
        self._beat = beat
        self._silent = silent
        self._heard_s = time.monotonic()
        self._due_s = self._heard_s + HEARTBEAT_S
        self._timer = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._tick)

    def heard(self) -> None:
        self._heard_s = time.monotonic()

    def stop(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        now = time.monotonic()
        in_time = now - self._due_s < HEARTBEAT_S
        if in_time and now - self._heard_s > DEAD_AFTER_S:
            self._silent(now - self._heard_s)
            return
        self._beat()
        self._due_s = now + HEARTBEAT_S
        self._timer = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._tick)
