"""The engine threads: forward passes run here, one thread per device; the event loop never computes.

Engines call back on their own thread; the roles hand the results to the loop with ``call_soon_threadsafe``.
"""

import abc
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hmad.compute.batch import DecodeBatch
from hmad.compute.device import (
    DecodeDevice,
    EncodedBlocks,
    LayerClock,
    PrefillChunk,
    PrefillDevice,
    PrefillObserver,
    PrefillSequence,
)
from hmad.compute.sampler import finish_reason
from hmad.compute.sequence import DecodeSequence
from hmad.facts.errors import HmadError, LocalError
from hmad.facts.logs import get_logger
from hmad.facts.sampling import SampledToken
from hmad.roles.scheduler import plan_prefill

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

    What a device raises fails the sequences of that batch or step, and the engine goes on. Any other exception is a bug
    that has left its books in an unknown state: the thread ends, every sequence it had fails with a LocalError, and the
    node goes down with it. To go on could mean wrong tokens, or slots that never come back.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.failure: LocalError | None = None  # why the thread has died
        self.on_death: Callable[[], object] = lambda: None  # called on the engine's thread
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"{name}-engine", daemon=True)
        self._stopping = False
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

    def _progress(self) -> None:
        now_s = time.monotonic()
        self._patience.learn(now_s - self._progress_s, self._num_units)
        self._progress_s = now_s

    def _run(self) -> None:
        with suppress(PermissionError):  # a sandbox may forbid it; then refusals and first tokens are a little slower
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), ENGINE_NICE)
        try:
            while self._wait_for_work():
                self._work()
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
            self._busy = self._has_work()
            self._wake.wait_for(lambda: self._stopping or self._has_work())
            self._progress_s = time.monotonic()  # before busy: whoever looks now must not see the last one's
            self._busy = True
            return not self._stopping

    @abc.abstractmethod
    def _has_work(self) -> bool: ...

    @abc.abstractmethod
    def _work(self) -> None: ...

    @abc.abstractmethod
    def _abandon(self, error: LocalError) -> None:
        """Report every sequence that is here as failed."""


@dataclass(frozen=True)
class PrefillDone:
    """A prompt's end: its first tokens, one per choice; or none, and ``sequence.error`` or ``.cancelled`` says why."""

    sequence: PrefillSequence
    first_tokens: list[SampledToken]
    finished_s: float


@dataclass(frozen=True)
class PrefillListener:
    """Who hears of a prefill engine's work, on its thread."""

    blocks_encoded: Callable[[EncodedBlocks], None]
    layer_computed: Callable[[Sequence[PrefillChunk], LayerClock], None]
    prefill_done: Callable[[PrefillDone], None]


class PrefillEngine(Engine):
    """Runs prompts through the device in order of arrival, packed and in chunks."""

    def __init__(
        self,
        device: PrefillDevice,
        max_batch_tokens: int,
        history_bytes: int,
        listener: PrefillListener,
        waits_for_wire: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__("prefill")
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._history_bytes = history_bytes
        self._listener = listener
        self._waits_for_wire = waits_for_wire
        self._waiting: deque[PrefillSequence] = deque()

    def submit(self, sequence: PrefillSequence) -> None:
        with self._wake:
            self._waiting.append(sequence)
            self._wake.notify()
        if self.failure is not None:
            self._abandon(self.failure)

    @property
    def backlog_tokens(self) -> int:
        """Prompt tokens that are submitted and not yet computed."""
        with self._wake:
            return sum(sequence.num_remaining for sequence in self._waiting)

    def _has_work(self) -> bool:
        return bool(self._waiting)

    def _work(self) -> None:
        with self._wake:
            waiting = list(self._waiting)
        chunks = self._affordable(plan_prefill([s for s in waiting if not s.cancelled], self._max_batch_tokens))
        first_tokens = self._prefill(chunks) if chunks else {}
        for sequence in waiting:
            if sequence.cancelled or sequence.error or sequence.num_remaining == 0:
                self._retire(sequence, first_tokens.get(sequence, []))

    def _patience_s(self) -> float:
        """A slow link may hold the engine up for long; a dead peer is found by its silence, not here."""
        return LONGEST_PATIENCE_S if self._waits_for_wire() else super()._patience_s()

    def _abandon(self, error: LocalError) -> None:
        with self._wake:
            abandoned, self._waiting = self._waiting, deque()
        for sequence in abandoned:
            sequence.error = sequence.error or error
            self._listener.prefill_done(PrefillDone(sequence, [], time.monotonic()))

    def _affordable(self, chunks: list[PrefillChunk]) -> list[PrefillChunk]:
        """Give a prompt that is cut its history; leave it for a later batch while others hold the room for one.

        Only the last chunk of a plan can be a cut prompt's first, and the oldest prompt always finds room: the
        configuration checks that the longest one fits.
        """
        last = chunks[-1] if chunks else None
        if last and last.num_tokens < last.sequence.num_remaining and last.sequence.history is None:
            try:
                history = self._device.new_history(len(last.sequence.prompt_token_ids))
            except Exception as error:  # the machine has less memory than the configuration promised
                log.exception("no memory for a prompt's history", num_tokens=len(last.sequence.prompt_token_ids))
                last.sequence.error = as_local(error, "prefill")
                return chunks[:-1]
            if history.num_bytes + self._history_in_use() > self._history_bytes and len(chunks) > 1:
                return chunks[:-1]
            last.sequence.history = history
        return chunks

    def _history_in_use(self) -> int:
        with self._wake:
            return sum(s.history.num_bytes for s in self._waiting if s.history)

    def _prefill(self, chunks: list[PrefillChunk]) -> dict[PrefillSequence, list[SampledToken]]:
        def layer_computed(clock: LayerClock) -> None:
            self._progress()
            self._listener.layer_computed(chunks, clock)

        self._begin(sum(chunk.num_tokens for chunk in chunks))
        try:
            return self._device.prefill(
                chunks, PrefillObserver(self._listener.blocks_encoded, layer_computed)
            ).first_tokens
        except Exception as error:
            log.exception("a prefill batch failed")
            for chunk in chunks:
                chunk.sequence.error = chunk.sequence.error or as_local(error, "prefill")
            return {}
        finally:
            self._progress()

    def _retire(self, sequence: PrefillSequence, first_tokens: list[SampledToken]) -> None:
        with self._wake:
            self._waiting.remove(sequence)
        sequence.history = None
        self._listener.prefill_done(PrefillDone(sequence, first_tokens, time.monotonic()))


@dataclass(frozen=True)
class StepOutput:
    """What a step, or a drop, means for one sequence: a new token, its end, or both."""

    sequence: DecodeSequence
    index: int  # of the token in its choice; of the one that will not come, where there is none
    token: SampledToken | None
    finish_reason: str | None
    error: HmadError | None = None


class DecodeEngine(Engine):
    """Continuous batching: sequences join and leave between steps."""

    def __init__(self, device: DecodeDevice, max_batch_size: int, deliver: Callable[[list[StepOutput]], None]) -> None:
        super().__init__("decode")
        self._device = device
        self.max_batch_size = max_batch_size
        self._deliver = deliver
        self._waiting: deque[DecodeSequence] = deque()
        self._dropping: set[DecodeSequence] = set()
        self._batch = DecodeBatch([])

    def join_batch(self, sequences: Iterable[DecodeSequence]) -> None:
        """Let the sequences decode from the next step on, or as soon as the batch has room."""
        with self._wake:
            self._waiting.extend(sequences)
            self._wake.notify()
        if self.failure is not None:
            self._abandon(self.failure)

    def drop(self, sequences: Iterable[DecodeSequence]) -> None:
        """End sequences early; each is reported as ``cancelled`` unless it has ended by itself."""
        with self._wake:
            self._dropping.update(sequences)
            self._wake.notify()

    @property
    def num_running(self) -> int:
        return len(self._batch)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _has_work(self) -> bool:
        return bool(self._waiting or self._dropping or self._batch.sequences)

    def _work(self) -> None:
        """One step: joins and leaves, one forward pass, one token each."""
        self._compose()
        if not self._batch.sequences:
            return
        outputs = [self._output(s, o) for s, o in zip(self._batch.sequences, self._step(), strict=True)]
        self._batch.advance()
        ended = {output.sequence for output in outputs if output.finish_reason or output.error}
        if ended:
            self._batch = DecodeBatch([s for s in self._batch.sequences if s not in ended])
        self._deliver(outputs)

    def _compose(self) -> None:
        """Take what joined and what is to be dropped; rebuild the batch only when its members change."""
        with self._wake:
            dropping, self._dropping = self._dropping, set()
            present = [*self._batch.sequences, *self._waiting]
            self._waiting = deque(s for s in self._waiting if s not in dropping)
            members = [s for s in self._batch.sequences if s not in dropping]
            while self._waiting and len(members) < self.max_batch_size:
                members.append(self._waiting.popleft())
        if members != self._batch.sequences:
            self._batch = DecodeBatch(members)
        dropped = [StepOutput(s, len(s.output_token_ids), None, "cancelled") for s in present if s in dropping]
        if dropped:
            self._deliver(dropped)

    def _abandon(self, error: LocalError) -> None:
        with self._wake:
            abandoned = [*self._batch.sequences, *self._waiting]
            self._batch, self._waiting = DecodeBatch([]), deque()
        self._deliver([StepOutput(s, len(s.output_token_ids), None, None, error) for s in abandoned])

    def _step(self) -> Sequence[SampledToken | HmadError]:
        self._begin(len(self._batch))
        try:
            return self._device.decode_step(self._batch)
        except Exception as error:
            log.exception("a decode step failed", num_sequences=len(self._batch))
            return [as_local(error, "decode")] * len(self._batch)
        finally:
            self._progress()

    def _output(self, sequence: DecodeSequence, outcome: SampledToken | HmadError) -> StepOutput:
        index = len(sequence.output_token_ids)
        if isinstance(outcome, HmadError):
            return StepOutput(sequence, index, None, None, outcome)
        sequence.output_token_ids.append(outcome.token_id)
        return StepOutput(sequence, index, outcome, finish_reason(outcome.token_id, index, sequence.params))


def as_local(error: Exception, phase: str) -> HmadError:
    """An unforeseen exception of a device, as an error of ours."""
    if isinstance(error, HmadError):
        return error
    local = LocalError(f"{phase} failed on this node: {type(error).__name__}: {error}")
    local.__cause__ = error
    return local
