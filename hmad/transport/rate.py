"""The KV plane's speed limit: one pacer for all bulk connections of a node."""

import asyncio
import time
from collections.abc import Iterator

# Short enough that a cap of tens of MB/s looks smooth, long enough that timers (1 ms in libuv) can keep it.
SLICE_S = 0.004
MIN_SLICE_BYTES = 4096
# A busy machine wakes a timer late; so much lateness is made up for, so that the average holds. More is lost.
MAX_LATENESS_S = 0.02


class Pacer:
    """Spaces slices so that their average rate stays at ``rate`` bytes/s; None means no limit."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._next_s = 0.0

    def slices(self, view: memoryview) -> Iterator[memoryview]:
        """The view in pieces that may be sent one by one."""
        step = len(view) if self._rate is None else max(MIN_SLICE_BYTES, int(self._rate * SLICE_S))
        return (view[start : start + step] for start in range(0, len(view), max(step, 1)))

    async def wait_turn(self, num_bytes: int) -> None:
        """Return when ``num_bytes`` may be sent. Idle time is not saved up for a later burst."""
        if self._rate is None:
            return
        now = time.monotonic()
        start = max(self._next_s, now - MAX_LATENESS_S)
        self._next_s = start + num_bytes / self._rate
        if start > now:
            await asyncio.sleep(start - now)
