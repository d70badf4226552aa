"""The decode engine: continuous batching, one step after the other."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

import msgspec

from hmad.compute.batch import DecodeBatch
from hmad.compute.device import DecodeDevice, Outcomes
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
Deliver = Callable[[Iterable[StepOutput], list[DecodeSequence]], None]


class LaunchedStep(msgspec.Struct, frozen=True, eq=False):
    """A step on its way. ``outcomes`` waits for it."""

    batch: DecodeBatch
    number: int  # of the step, in its batch
    outcomes: Callable[[], Outcomes]

    @property
    def sequences(self) -> list[DecodeSequence]:
        return self.batch.sequences


class StepOutputs(msgspec.Struct, frozen=True, eq=False):
    """What a step means for its sequences, but for those that had ended when it was launched.

    An object for each is made as it is read, which whoever is told does on a thread of its own.
    """

    step: LaunchedStep
    outcomes: Outcomes
    finish_reasons: dict[int, str]  # by row
    ended: Collection[DecodeSequence]

    def __iter__(self) -> Iterator[StepOutput]:
        indices = self.step.batch.indices_of(self.step.number).tolist()
        rows = zip(self.step.sequences, indices, self.outcomes, strict=True)
        for row, (sequence, index, outcome) in enumerate(rows):
            if sequence in self.ended:
                continue
            if isinstance(outcome, HmadError):
                yield StepOutput(sequence, index, None, None, outcome)
            else:
                yield StepOutput(sequence, index, outcome, self.finish_reasons.get(row))


class DecodeEngine(Engine):
    """Sequences join and leave between steps.

    A device that runs ahead gets the next step while it computes this one, so that what the host does is hidden. Which
    token a sequence has drawn is then known one step late, and one that turns out to have ended is in one step more,
    whose outcome for it nobody reads. What a step brought is told when the next one is launched, unless its members are
    new: whoever hears it takes Python's lock, which launching needs and waiting does not.
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
        self._reports: deque[tuple[Iterable[StepOutput], list[DecodeSequence]]] = deque()  # to be told

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
        return bool(self._waiting or self._dropping or self._members or self._in_flight or self._reports)

    def _work(self) -> None:
        """Compose and launch the next step; then take what the device has done."""
        self._report(self._compose())
        launched = self._launch() if self._members else None
        if self._device.runs_ahead:
            self._tell()
            self._done, self._in_flight = self._in_flight, launched
        else:
            self._done = launched
        if self._done:
            outputs = self._collect(self._done)
            self._done = None
            self._report(outputs)
        if not self._device.runs_ahead:
            self._tell()

    def _compose(self) -> list[StepOutput]:
        """Take what joined and what is to be dropped, and let those go that have had their last step."""
        with self._wake:
            joins = self._waiting and len(self._members) < self.max_batch_size
            if not (joins or self._dropping) and self._batch.num_steps_left > 0:
                return []  # as before nearly every step
            self._batch.settle()
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
            self._tell()  # such a launch may have a graph captured, for which nobody else need wait
            self._batch.settle()
            self._batch = DecodeBatch(self._members)
        self._begin(len(self._batch))
        try:
            outcomes = self._device.launch(self._batch)
        except Exception as error:
            outcomes = self._failure(error, len(self._batch))
        launched = LaunchedStep(self._batch, self._batch.step, outcomes)
        self._batch.advance()
        return launched

    def _collect(self, step: LaunchedStep) -> StepOutputs:
        """One token each, but for those that had ended when the step was launched."""
        try:
            outcomes = step.outcomes()
        except Exception as error:
            outcomes = self._failure(error, len(step.sequences))()
        finally:
            self._progress()
        ended = frozenset(self._ended)
        reasons = step.batch.take(step.number, outcomes.token_ids, may_stop=outcomes.may_stop)
        if step.batch is not self._batch:
            step.batch.settle()  # it has been once already, when the next one followed it
        if reasons or outcomes.special:
            self._ended |= dict.fromkeys(step.sequences[row] for row in sorted({*reasons, *outcomes.failed}))
        return StepOutputs(step, outcomes, reasons, ended)

    def _failure(self, error: Exception, num_sequences: int) -> Callable[[], Outcomes]:
        local = as_local(error, "decode")
        log.error("a decode step failed", num_sequences=num_sequences, exc_info=error)
        return lambda: Outcomes.of([local] * num_sequences)

    def _report(self, outputs: Iterable[StepOutput]) -> None:
        """Have it told what became of sequences, and which of those that ended are in no step any more."""
        left = self._let_go() if self._ended else []
        if outputs or left:
            self._reports.append((outputs, left))

    def _tell(self) -> None:
        while self._reports:
            self._deliver(*self._reports.popleft())

    def _end(self) -> None:
        if self._in_flight:
            self._in_flight.outcomes()  # nobody reads them; but the device may go only when it has written them
        self._tell()

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
            self._batch.settle()
            self._members, self._waiting, self._done, self._in_flight = [], deque(), None, None
            failed = [s for s in there if s not in self._ended]
            self._ended.clear()
            reports, self._reports = self._reports, deque()  # whoever joins a dead engine comes here as well
        for report in reports:
            self._deliver(*report)
        self._deliver([StepOutput(s, len(s.output_token_ids), None, None, error) for s in failed], list(there))
