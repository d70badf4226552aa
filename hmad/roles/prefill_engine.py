"""The prefill engine: prompts through the device in order of arrival, packed and in chunks."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hmad.compute.device import (
    EncodedBlocks,
    LayerClock,
    PrefillChunk,
    PrefillDevice,
    PrefillObserver,
    PrefillSequence,
)
from hmad.facts.errors import LocalError
from hmad.facts.logs import get_logger
from hmad.facts.sampling import SampledToken
from hmad.roles.engine import LONGEST_PATIENCE_S, Engine, as_local
from hmad.roles.scheduler import plan_prefill

log = get_logger(__name__)


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
    layers_computed: Callable[[Sequence[PrefillChunk], LayerClock], None]
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
        last_s = time.monotonic()

        def layers_computed(clock: LayerClock) -> None:
            nonlocal last_s
            self._progress(max(0.0, clock.kv_ready_s - last_s))  # a device may tell of several layers at once
            last_s = clock.kv_ready_s
            self._listener.layers_computed(chunks, clock)

        self._begin(sum(chunk.num_tokens for chunk in chunks))
        try:
            return self._device.prefill(
                chunks, PrefillObserver(self._listener.blocks_encoded, layers_computed)
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
