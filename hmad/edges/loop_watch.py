"""How long the event loop is held: every stream waits for whoever holds it."""

import asyncio
import time
from collections.abc import Callable

TICK_S = 0.025


class LoopWatch:
    """Reports, at every tick, the CPU time that the loop's thread took since the last one.

    No callback in between took more than that. CPU time, since a machine with other things to do is no fault of ours.
    """

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._cpu_s = time.thread_time()
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def stop(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        cpu_s = time.thread_time()
        self._observe(cpu_s - self._cpu_s)
        self._cpu_s = cpu_s
        self._timer = self._loop.call_later(TICK_S, self._tick)
