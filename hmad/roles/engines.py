"""The engine threads: forward passes run here, one thread per device; the event loop never computes.

Engines call back on their own thread; the roles hand the results to the loop with ``call_soon_threadsafe``.
"""

import abc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
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
from hmad.facts.sampling import SampledToken
from hmad.roles.scheduler import plan_prefill

log = logging.getLogger(__name__)

STALLED_AFTER_S = 10.0  # a busy engine without progress for so long is not healthy


class Engine(abc.ABC):
    """A thread that works while there is work, and tells since when it has made no progress."""

    def __init__(self, name: str) -> None:
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._stopping = False
        self._busy = False
        self._progress_s = time.monotonic()

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
    def stalled_s(self) -> float:
        """Seconds without progress while there is work."""
        return time.monotonic() - self._progress_s if self._busy else 0.0

    def _progress(self) -> None:
        self._progress_s = time.monotonic()

    def _run(self) -> None:
        while self._wait_for_work():
            self._work()

    def _wait_for_work(self) -> bool:
        """Sleep until there is work; False when stopping."""
        with self._wake:
            self._busy = self._has_work()
            self._wake.wait_for(lambda: self._stopping or self._has_work())
            self._busy = True
            self._progress()
            return not self._stopping

    @abc.abstractmethod
    def _has_work(self) -> bool: ...

    @abc.abstractmethod
    def _work(self) -> None: ...


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
        self, device: PrefillDevice, max_batch_tokens: int, history_bytes: int, listener: PrefillListener
    ) -> None:
        super().__init__("prefill-engine")
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._history_bytes = history_bytes
        self._listener = listener
        self._waiting: deque[PrefillSequence] = deque()

    def submit(self, sequence: PrefillSequence) -> None:
        with self._wake:
            self._waiting.append(sequence)
            self._wake.notify()

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
                log.exception("no memory for the history of a prompt of %d tokens", len(last.sequence.prompt_token_ids))
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

        try:
            return self._device.prefill(
                chunks, PrefillObserver(self._listener.blocks_encoded, layer_computed)
            ).first_tokens
        except Exception as error:
            log.exception("a prefill batch failed")
            for chunk in chunks:
                chunk.sequence.error = chunk.sequence.error or as_local(error, "prefill")
            return {}

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
        super().__init__("decode-engine")
        self._device = device
        self._max_batch_size = max_batch_size
        self._deliver = deliver
        self._waiting: deque[DecodeSequence] = deque()
        self._dropping: set[DecodeSequence] = set()
        self._batch = DecodeBatch([])

    def join_batch(self, sequences: Iterable[DecodeSequence]) -> None:
        """Let the sequences decode from the next step on, or as soon as the batch has room."""
        with self._wake:
            self._waiting.extend(sequences)
            self._wake.notify()

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
            while self._waiting and len(members) < self._max_batch_size:
                members.append(self._waiting.popleft())
        if members != self._batch.sequences:
            self._batch = DecodeBatch(members)
        dropped = [StepOutput(s, len(s.output_token_ids), None, "cancelled") for s in present if s in dropping]
        if dropped:
            self._deliver(dropped)

    def _step(self) -> Sequence[SampledToken | HmadError]:
        try:
            return self._device.decode_step(self._batch)
        except Exception as error:
            log.exception("a decode step failed")
            return [as_local(error, "decode")] * len(self._batch)

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
