"""What both engine threads are: forward passes run there, one thread per node; the event loop never computes.

Engines call back on threads of their own; the roles hand the results to the loop with ``call_soon_threadsafe``.
"""

import abc
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from hmad.facts.errors import DeviceFault, HmadError, LocalError
from hmad.facts.logs import get_logger

log = get_logger(__name__)

ENGINE_NICE = 5  # computing yields to the event loop, which has little to do and is waited for by every client
SHORTEST_PATIENCE_S = 1.5  # so that /health turns within 2 s
LONGEST_PATIENCE_S = 30.0  # also of an engine that has nothing to compare with yet
SLACK = 4.0  # times the slowest that was seen lately
FADING = 0.99  # what was seen counts a hundredth less with every sign of progress since


class Patience:
    """How long a busy engine may show no progress before it counts as stalled.

    A small model's layer takes a millisecond, a large one's on a slow CPU ten seconds, and both grow with the batch. So
    the measure is the engine's own recent past: the slowest progress lately, per token (prefill) or sequence (decode).
    """

    def __init__(self) -> None:
        self._slowest_s: float | None = None  # per unit of work

    def learn(self, taken_s: float, num_units: int) -> None:
        """Another sign of progress came after so long."""
        self._slowest_s = max(taken_s / num_units, FADING * (self._slowest_s or 0.0))

    def limit_s(self, num_units: int) -> float:
        if self._slowest_s is None:
            return LONGEST_PATIENCE_S
        return min(LONGEST_PATIENCE_S, max(SHORTEST_PATIENCE_S, SLACK * self._slowest_s * num_units))


class Engine(abc.ABC):
    """A thread that works while there is work, and tells what is wrong when it does not get on.

    What a device raises fails the sequences of that batch or step, and the engine goes on. A DeviceFault says that the
    device is lost, and any other exception is a bug that has left the books in an unknown state: the thread ends, every
    sequence it had fails with a LocalError, and the node goes down with it. To go on could mean wrong tokens, or slots
    that never come back.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.failure: LocalError | None = None  # why the thread has died
        self.on_death: Callable[[], object] = lambda: None  # called on the engine's thread
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"{name}-engine", daemon=True)
        self._stopping = False
        self._fault: Exception | None = None
        self._busy = False
        self._progress_s = time.monotonic()
        self._num_units = 1  # of work in the batch or step under way
        self._patience = Patience()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end after the batch or step that it is in."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def fail(self, error: Exception) -> None:
        """The device is lost, as another of its threads has found out: die of it, also without work."""
        with self._wake:
            self._fault = error
            self._wake.notify()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread ended within the time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def trouble(self) -> str | None:
        """Why the engine does not get on with its work, in words; None while it does, or has none."""
        if self.failure is not None:
            return str(self.failure)
        stalled_s = time.monotonic() - self._progress_s if self._busy else 0.0
        patience_s = self._patience_s()
        if stalled_s <= patience_s:
            return None
        return (
            f"the {self.name} engine has made no progress for {stalled_s:.1f} s, "
            f"longer than the {patience_s:.1f} s that its work may take"
        )

    def _patience_s(self) -> float:
        return self._patience.limit_s(self._num_units)

    def _begin(self, num_units: int) -> None:
        """A batch or step of so many tokens or sequences begins."""
        self._num_units = num_units
        self._progress_s = time.monotonic()

    def _progress(self, taken_s: float | None = None) -> None:
        """A sign of progress. ``taken_s`` is what the work took, where signs come in bursts; else the time since the
        one before."""
        now_s = time.monotonic()
        self._patience.learn(now_s - self._progress_s if taken_s is None else taken_s, self._num_units)
        self._progress_s = now_s

    def _run(self) -> None:
        with suppress(PermissionError):  # a sandbox may forbid it; then refusals and first tokens are a little slower
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), ENGINE_NICE)
        try:
            while self._wait_for_work():
                self._work()
            self._end()
        except Exception as error:
            log.exception("the engine died", engine=self.name)
            self._die(error)

    def _die(self, error: Exception) -> None:
        self.failure = LocalError(f"the {self.name} engine died: {type(error).__name__}: {error}")
        self.failure.__cause__ = error
        self._abandon(self.failure)
        self.on_death()

    def _wait_for_work(self) -> bool:
        """Sleep until there is work; False when stopping."""
        with self._wake:
            if not self._has_work():
                self._busy = False
                self._wake.wait_for(lambda: self._stopping or self._fault or self._has_work())
            if self._fault is not None:
                raise self._fault
            self._progress_s = time.monotonic()  # before busy: whoever looks now must not see the last one's
            self._busy = True
            return not self._stopping

    @abc.abstractmethod
    def _has_work(self) -> bool: ...

    @abc.abstractmethod
    def _work(self) -> None: ...

    def _end(self) -> None:  # noqa: B027 (most have nothing to do)
        """Stopping, after the last piece of work."""

    @abc.abstractmethod
    def _abandon(self, error: LocalError) -> None:
        """Report every sequence that is here as failed."""


def as_local(error: Exception, phase: str) -> HmadError:
    """What a device raised, as an error of ours for the sequences of that batch or step. Raises a DeviceFault on."""
    if isinstance(error, DeviceFault):
        raise error
    if isinstance(error, HmadError):
        return error
    local = LocalError(f"{phase} failed on this node: {type(error).__name__}: {error}")
    local.__cause__ = error
    return local
