"""The decode engine: continuous batching, one step after the other."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from hmad.compute.batch import DecodeBatch
from hmad.compute.device import DecodeDevice, Outcome
from hmad.compute.sampler import finish_reason
from hmad.compute.sequence import DecodeSequence
from hmad.facts.errors import HmadError, LocalError
from hmad.facts.logs import get_logger
from hmad.facts.sampling import SampledToken
from hmad.roles.engine import Engine, as_local

log = get_logger(__name__)


class StepOutput(msgspec.Struct, frozen=True, eq=False):
    """What a step, or a drop, means for one sequence: a new token, its end, or both."""

    sequence: DecodeSequence
    index: int  # of the token in its choice; of the one that will not come, where there is none
    token: SampledToken | None
    finish_reason: str | None
    error: HmadError | None = None

    @property
    def ends(self) -> bool:
        return self.finish_reason is not None or self.error is not None


# What became of sequences, and which of those that ended no step touches any more: their slots may go.
Deliver = Callable[[list[StepOutput], list[DecodeSequence]], None]


@dataclass(frozen=True)
class LaunchedStep:
    """A step on its way. ``outcomes`` waits for it."""

    sequences: Sequence[DecodeSequence]
    outcomes: Callable[[], Sequence[Outcome]]


class DecodeEngine(Engine):
    """Sequences join and leave between steps.

    A device that runs ahead gets the next step while it computes this one, so that what the host does is hidden. Which
    token a sequence has drawn is then known one step late, and one that turns out to have ended is in one step more,
    whose outcome for it nobody reads.
    """

    def __init__(self, device: DecodeDevice, max_batch_size: int, deliver: Deliver) -> None:
        super().__init__("decode")
        self._device = device
        self.max_batch_size = max_batch_size
        self._deliver = deliver
        self._waiting: deque[DecodeSequence] = deque()
        self._dropping: set[DecodeSequence] = set()
        self._members: list[DecodeSequence] = []  # of the next step
        self._batch = DecodeBatch([])  # of the last one that was launched
        self._in_flight: LaunchedStep | None = None
        self._done: LaunchedStep | None = None  # to be collected
        self._ended: dict[DecodeSequence, None] = {}  # in the step in flight all the same; in order

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
        return len(self._members)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _has_work(self) -> bool:
        return bool(self._waiting or self._dropping or self._members or self._in_flight)

    def _work(self) -> None:
        """Compose and launch the next step; then take what the device has done."""
        self._report(self._compose())
        launched = self._launch() if self._members else None
        if self._device.runs_ahead:
            self._done, self._in_flight = self._in_flight, launched
        else:
            self._done = launched
        if self._done:
            outputs = self._collect(self._done)
            self._done = None
            self._report(outputs)

    def _compose(self) -> list[StepOutput]:
        """Take what joined and what is to be dropped, and let those go that have had their last step."""
        with self._wake:
            joins = self._waiting and len(self._members) < self.max_batch_size
            if not (joins or self._dropping) and self._batch.num_steps_left > 0:
                return []  # as before nearly every step
            dropping, self._dropping = self._dropping, set()
            dropped = [s for s in (*self._members, *self._waiting) if s in dropping]
            self._waiting = deque(s for s in self._waiting if s not in dropping)
            self._members = [s for s in self._members if s not in dropping and s.num_tail_tokens < s.num_steps]
            while self._waiting and len(self._members) < self.max_batch_size:
                self._members.append(self._waiting.popleft())
        self._ended |= dict.fromkeys(dropped)
        return [StepOutput(s, len(s.output_token_ids), None, "cancelled") for s in dropped]

    def _launch(self) -> LaunchedStep:
        if self._members != self._batch.sequences:
            self._batch = DecodeBatch(self._members)
        self._begin(len(self._batch))
        try:
            outcomes = self._device.launch(self._batch)
        except Exception as error:
            outcomes = self._failure(error, len(self._batch))
        launched = LaunchedStep(self._batch.sequences, outcomes)
        self._batch.advance()
        return launched

    def _collect(self, step: LaunchedStep) -> list[StepOutput]:
        """One token each, but for those that had ended when the step was launched."""
        try:
            outcomes = step.outcomes()
        except Exception as error:
            outcomes = self._failure(error, len(step.sequences))()
        finally:
            self._progress()
        return [self._output(s, o) for s, o in zip(step.sequences, outcomes, strict=True) if s not in self._ended]

    def _failure(self, error: Exception, num_sequences: int) -> Callable[[], Sequence[Outcome]]:
        local = as_local(error, "decode")
        log.error("a decode step failed", num_sequences=num_sequences, exc_info=error)
        return lambda: [local] * num_sequences

    def _output(self, sequence: DecodeSequence, outcome: Outcome) -> StepOutput:
        index = len(sequence.output_token_ids)
        if isinstance(outcome, HmadError):
            self._ended[sequence] = None
            return StepOutput(sequence, index, None, None, outcome)
        sequence.output_token_ids.append(outcome.token_id)
        reason = finish_reason(outcome.token_id, index, sequence.params)
        if reason is not None:
            self._ended[sequence] = None
        return StepOutput(sequence, index, outcome, reason)

    def _report(self, outputs: list[StepOutput]) -> None:
        """Tell what became of sequences, and which of those that ended are in no step any more."""
        left = self._let_go() if self._ended else []
        if outputs or left:
            self._deliver(outputs, left)

    def _let_go(self) -> list[DecodeSequence]:
        """What has ended is in no further step; and no longer ours, once it is in none."""
        in_flight = set(self._in_flight.sequences) if self._in_flight else set()
        self._members = [sequence for sequence in self._members if sequence not in self._ended]
        left = [sequence for sequence in self._ended if sequence not in in_flight]
        for sequence in left:
            del self._ended[sequence]
        return left

    def _abandon(self, error: LocalError) -> None:
        with self._wake:
            launched = [s for step in (self._done, self._in_flight) if step for s in step.sequences]
            there = dict.fromkeys([*launched, *self._members, *self._waiting, *self._ended])
            self._members, self._waiting, self._done, self._in_flight = [], deque(), None, None
            failed = [s for s in there if s not in self._ended]
            self._ended.clear()
        self._deliver([StepOutput(s, len(s.output_token_ids), None, None, error) for s in failed], list(there))
