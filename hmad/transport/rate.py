"""The KV plane's speed limit: one pacer for all bulk connections of a node."""

import threading
import time
from collections.abc import Iterator

# Short enough that a cap of tens of MB/s looks smooth, long enough that a thread's sleep (0.1 ms) can keep it.
SLICE_S = 0.004
MIN_SLICE_BYTES = 4096  # or what a slower link carries in a second: the peer takes a longer silence for a broken link
# A busy machine wakes a sleeper late; so much lateness is made up for, so that the average holds. More is lost.
MAX_LATENESS_S = 0.02


class Pacer:
    """Spaces slices so that their average rate stays at ``rate`` bytes/s; None means no limit. Any thread may ask.

    A slice leaves when its time at that rate has passed, so that the last byte comes when a link of that speed
    would have brought it.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._next_s = 0.0
        self._lock = threading.Lock()  # of _next_s

    def slices(self, view: memoryview) -> Iterator[memoryview]:
        """The view in pieces that may be sent one by one."""
        step = len(view) if self._rate is None else self._slice_bytes(self._rate)
        return (view[start : start + step] for start in range(0, len(view), max(step, 1)))

    def _slice_bytes(self, rate: float) -> int:
        return int(max(min(MIN_SLICE_BYTES, rate), rate * SLICE_S))

    def skip_idle(self) -> None:
        """Nothing was to be sent until now: that time is gone, not saved up for a burst."""
        with self._lock:
            self._next_s = max(self._next_s, time.monotonic())

    def seconds_until_turn(self, num_bytes: int) -> float:
        """Book the next turn, for ``num_bytes``, and say in how long it comes; 0 or less is now."""
        if self._rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._next_s = max(self._next_s, now - MAX_LATENESS_S) + num_bytes / self._rate
            return self._next_s - now
