"""Is the peer there? Every frame of it says so; heartbeats fill the silence."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

HEARTBEAT_S = 0.3
DEAD_AFTER_S = 1.5
HANDSHAKE_S = 5.0  # for a stranger at our door
DIAL_S = 2.0  # for a node that we dial: a lost handshake must not cost the requests that wait
STALL_S = 0.9  # looked at so often: a frame that has stopped is found after once to twice this time


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


class Flow(Protocol):
    """What a StallWatch sees of a connection."""

    @property
    def heard_s(self) -> float:
        """When the last byte came."""

    @property
    def in_frame(self) -> bool: ...


class StallWatch:
    """Reports a channel without heartbeats on which a frame has stopped half-way: only there is it sure that more
    must come. Judged, as silence is, only by a loop that was itself on time.
    """

    def __init__(self, flow: Flow, stalled: Callable[[str], None]) -> None:
        self._flow = flow
        self._stalled = stalled
        self._look_later()

    def stop(self) -> None:
        self._timer.cancel()

    def _look_later(self) -> None:
        self._due_s = time.monotonic() + STALL_S
        self._timer = asyncio.get_running_loop().call_later(STALL_S, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        in_time = now - self._due_s < HEARTBEAT_S
        if in_time and self._flow.in_frame and now - self._flow.heard_s > STALL_S:
            self._stalled(f"a frame stopped half-way for {now - self._flow.heard_s:.1f} s")
        else:
            self._look_later()
