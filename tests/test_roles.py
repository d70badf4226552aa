"""The decisions of the scheduler, and the two engines with devices that only keep books."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import Queue

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmad.compute.batch import DecodeBatch
from hmad.compute.device import KVHistory, Outcomes, PrefillChunk, PrefillObserver, PrefillResult, PrefillSequence
from hmad.compute.sequence import DecodeSequence
from hmad.facts.errors import DeviceFault, LocalError
from hmad.facts.formats import FORMATS, KVGeometry, negotiate, preferred_formats
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad.roles.decode_engine import DecodeEngine, StepOutput
from hmad.roles.prefill_engine import PrefillDone, PrefillEngine, PrefillListener
from hmad.roles.scheduler import CHUNK_ALIGN_TOKENS, plan_prefill, rank_peers, slots_needed

PATIENCE_S = 10
GEOMETRY = KVGeometry(1, 1, 64)


def prompt(num_tokens: int, num_computed: int = 0) -> PrefillSequence:
    return PrefillSequence(range(num_tokens), SamplingParams(max_tokens=4), (0,), FORMATS["int8"], num_computed)


# --- decisions ---


@given(st.lists(st.integers(1, 300), max_size=8), st.integers(1, 8).map(lambda n: n * CHUNK_ALIGN_TOKENS))
def test_batches_are_full_in_order_and_cut_at_block_boundaries(lengths: list[int], budget: int) -> None:
    waiting = [prompt(length) for length in lengths]
    chunks = plan_prefill(waiting, budget)
    assert [chunk.sequence for chunk in chunks] == waiting[: len(chunks)]
    assert sum(chunk.num_tokens for chunk in chunks) <= budget
    assert all(chunk.num_tokens == len(chunk.sequence.prompt_token_ids) for chunk in chunks[:-1])
    if chunks and not chunks[-1].is_last:
        assert chunks[-1].num_tokens % CHUNK_ALIGN_TOKENS == 0
    left = budget - sum(chunk.num_tokens for chunk in chunks)
    assert len(chunks) == len(waiting) or left < CHUNK_ALIGN_TOKENS or not chunks[-1].is_last
    assert bool(chunks) == bool(waiting)


def test_a_later_chunk_goes_on_where_the_earlier_ended() -> None:
    (chunk,) = plan_prefill([prompt(100, num_computed=64)], 64)
    assert (chunk.start, chunk.end, chunk.is_last) == (64, 100, True)


@dataclass(frozen=True)
class Peer:
    free_slots: int
    usable: bool = True


def test_the_emptiest_usable_peer_comes_first() -> None:
    full, half, gone = Peer(1), Peer(5), Peer(9, usable=False)
    assert rank_peers([full, gone, half]) == [half, full]


def test_slots_are_the_prefix_once_and_a_tail_for_each_choice() -> None:
    params = SamplingParams(max_tokens=18)  # 17 tokens of KV: two blocks of bf16
    assert slots_needed(FORMATS["int8"], FORMATS["bf16"], 33, params, num_choices=3) == 2 + 3 * 2


@pytest.mark.parametrize(("accepted", "chosen"), [(("bf16", "bfp8"), "bfp8"), (("bf16",), "bf16"), ((), None)])
def test_the_first_common_format_is_taken(accepted: tuple[str, ...], chosen: str | None) -> None:
    offered = tuple(fmt.name for fmt in preferred_formats("auto", "bfp8"))
    assert negotiate(offered, accepted) == chosen
    assert [fmt.name for fmt in preferred_formats("mxfp8", "bfp8")] == ["mxfp8"]


# --- the prefill engine ---


class CountingPrefill:
    """Computes nothing; ``chunks`` are what it was given, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def new_history(self, num_tokens: int) -> KVHistory:
        return KVHistory(GEOMETRY, num_tokens, torch.float32)

    def prefill(self, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> PrefillResult:
        self.batches.append([(len(chunk.sequence.prompt_token_ids), chunk.num_tokens) for chunk in chunks])
        assert all(c.sequence.history is not None or (c.start == 0 and c.is_last) for c in chunks)
        if any(len(chunk.sequence.prompt_token_ids) == 13 for chunk in chunks):
            raise RuntimeError("unlucky")
        result = PrefillResult({c.sequence: [SampledToken(7)] for c in chunks if c.is_last})
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
        return result


def prefill_all(
    device: CountingPrefill, *sequences: PrefillSequence, history_bytes: int = 1 << 30
) -> list[PrefillDone]:
    """Submit all at once, wait for the end of each."""
    done: Queue[PrefillDone] = Queue()
    listener = PrefillListener(lambda blocks: None, lambda chunks, clock: None, done.put)
    engine = PrefillEngine(device, max_batch_tokens=64, history_bytes=history_bytes, listener=listener)
    for sequence in sequences:
        engine.submit(sequence)
    engine.start()
    results = [done.get(timeout=PATIENCE_S) for _ in sequences]
    engine.stop()
    assert engine.join(PATIENCE_S)
    assert engine.backlog_tokens == 0
    return results


def test_prompts_are_packed_and_cut() -> None:
    device = CountingPrefill()
    done = prefill_all(device, prompt(20), prompt(100), prompt(10))
    assert device.batches == [[(20, 20), (100, 32)], [(100, 64)], [(100, 4), (10, 10)]]
    assert [len(d.sequence.prompt_token_ids) for d in done] == [20, 100, 10]
    assert all(d.first_tokens == [SampledToken(7)] for d in done)
    assert all(d.sequence.history is None for d in done)


def test_a_cut_prompt_waits_for_the_history_of_another() -> None:
    """Room for one history: the second long prompt is not begun in the batch that ends the first."""
    device = CountingPrefill()
    one_history = 100 * KVHistory.bytes_per_token(GEOMETRY, torch.float32)
    prefill_all(device, prompt(100), prompt(100), history_bytes=one_history)
    assert device.batches == [[(100, 64)], [(100, 36)], [(100, 64)], [(100, 36)]]


def test_a_batch_that_fails_fails_its_prompts_and_no_other() -> None:
    device = CountingPrefill()
    unlucky, other = prefill_all(device, prompt(13), prompt(64))
    assert isinstance(unlucky.sequence.error, LocalError)
    assert "RuntimeError: unlucky" in str(unlucky.sequence.error)
    assert other.sequence.error is None or isinstance(other.sequence.error, LocalError)
    (later,) = prefill_all(CountingPrefill(), prompt(64))
    assert later.sequence.error is None


def test_a_cancelled_prompt_is_not_computed() -> None:
    device, cancelled = CountingPrefill(), prompt(20)
    cancelled.cancelled = True
    first, second = prefill_all(device, cancelled, prompt(10))
    assert device.batches == [[(10, 10)]]
    assert {len(d.first_tokens) for d in (first, second)} == {0, 1}


# --- the decode engine ---


class CountingDecode:
    """Each sequence's tokens count up; ``gate`` lets one step through at a time."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.batches: list[list[int]] = []

    runs_ahead = False

    def launch(self, batch: DecodeBatch) -> Callable[[], Outcomes]:
        assert self.gate.acquire(timeout=PATIENCE_S)
        self.batches.append([sequence.seed for sequence in batch.sequences])
        batch.settle()
        tokens = Outcomes(batch.newest_tokens + 1, {})
        return lambda: tokens


def choice(seed: int, max_tokens: int) -> DecodeSequence:
    empty = np.zeros(64, np.int32)
    params = SamplingParams(max_tokens=max_tokens)
    return DecodeSequence(empty, params, seed, (), FORMATS["bf16"], empty, [0])


def test_sequences_join_and_leave_between_steps() -> None:
    device, outputs = CountingDecode(), Queue[Iterable[StepOutput]]()
    engine = DecodeEngine(device, max_batch_size=2, deliver=lambda step, left: outputs.put(step))
    first, second, third = choice(1, 3), choice(2, 100), choice(3, 100)
    engine.join_batch([first, second, third])
    engine.start()
    device.gate.release()
    device.gate.release()
    steps = [outputs.get(timeout=PATIENCE_S) for _ in range(2)]
    assert [(o.sequence.seed, o.index, o.finish_reason) for step in steps for o in step] == [
        (1, 1, None),
        (2, 1, None),
        (1, 2, "length"),
        (2, 2, None),
    ]
    engine.drop([second])
    device.gate.release()  # the step that is under way still has the dropped one in it
    device.gate.release()
    seen = [output for _ in range(3) for output in outputs.get(timeout=PATIENCE_S)]
    assert [(o.sequence.seed, o.finish_reason) for o in seen if o.token is None] == [(2, "cancelled")]
    assert device.batches[:2] == [[1, 2], [1, 2]]
    assert device.batches[-1] == [3]
    engine.drop([third])
    device.gate.release()
    engine.stop()
    assert engine.join(PATIENCE_S)


class AheadDecode:
    """A device that runs ahead: token n of a sequence is n. Notes who was in each step and what was known by then."""

    runs_ahead = True

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, int, int]]] = []  # seed, tokens in the tail, tokens known
        self.num_awaited = 0

    def launch(self, batch: DecodeBatch) -> Callable[[], Outcomes]:
        batch.settle()
        known = [(s.seed, s.num_tail_tokens, len(s.output_token_ids)) for s in batch.sequences]
        self.steps.append(known)
        tokens = Outcomes(batch.tail_lens.astype(np.int64), {})

        def outcomes() -> Outcomes:
            self.num_awaited += 1
            return tokens

        return outcomes


def test_a_step_is_launched_before_the_last_one_s_tokens_are_known() -> None:
    device = AheadDecode()
    reports: Queue[tuple[Iterable[StepOutput], list[DecodeSequence]]] = Queue()
    engine = DecodeEngine(device, max_batch_size=4, deliver=lambda outputs, left: reports.put((outputs, left)))
    empty = np.zeros(64, np.int32)
    stops = DecodeSequence(empty, SamplingParams(9, stop_token_ids=(2,)), 1, (), FORMATS["bf16"], empty, [0])
    engine.join_batch([stops, choice(2, 4)])
    engine.start()
    told: list[str] = []
    while sum(entry.startswith("left") for entry in told) < 2:
        outputs, left = reports.get(timeout=PATIENCE_S)
        told += [f"{o.sequence.seed}: {o.token and o.token.token_id} {o.finish_reason}" for o in outputs]
        told += [f"left {sequence.seed}" for sequence in left]
    engine.stop()
    assert engine.join(PATIENCE_S)
    # Steps 1 and 2 know but the first token. Step 3 is launched before the stop token of step 2 is known; sequence 1 is
    # in it, and leaves only when it is done. Sequence 2 ends by its length, which is known ahead: there is no step 4.
    assert device.steps == [[(1, 0, 1), (2, 0, 1)], [(1, 1, 1), (2, 1, 1)], [(1, 2, 2), (2, 2, 2)]]
    assert told == ["1: 1 None", "2: 1 None", "1: 2 stop", "2: 2 None", "2: 3 length", "left 1", "left 2"]


def test_what_is_dropped_leaves_when_the_step_in_flight_is_done() -> None:
    device = AheadDecode()
    reports: Queue[tuple[Iterable[StepOutput], list[DecodeSequence]]] = Queue()
    engine = DecodeEngine(device, max_batch_size=4, deliver=lambda outputs, left: reports.put((outputs, left)))
    dropped, goes_on = choice(1, 1 << 20), choice(2, 1 << 20)
    engine.join_batch([dropped, goes_on])
    engine.start()
    reports.get(timeout=PATIENCE_S)
    engine.drop([dropped])
    cancelled_at = left_at = None
    for number in range(1 << 20):
        outputs, left = reports.get(timeout=PATIENCE_S)
        if cancelled_at is not None and not left:
            assert dropped not in [output.sequence for output in outputs]
        if any(output.finish_reason == "cancelled" for output in outputs):
            cancelled_at = number
        if left:
            assert left == [dropped]
            left_at = number
            break
    assert cancelled_at is not None
    assert left_at is not None
    assert cancelled_at < left_at  # the step in flight still had it
    engine.stop()
    assert engine.join(PATIENCE_S)
    assert device.num_awaited == len(device.steps)  # nobody may take from the device what a step still writes to


class SteppedEngine:
    """An engine without its thread, which takes note of what its device and its role see."""

    def __init__(self, runs_ahead: bool) -> None:
        self.device = AheadDecode()
        self.device.runs_ahead = runs_ahead
        self.engine = DecodeEngine(self.device, max_batch_size=3, deliver=self._deliver)
        self.told: dict[DecodeSequence, list[StepOutput]] = {}
        self.left: list[DecodeSequence] = []
        self._launched: list[DecodeSequence] = []
        launch = self.device.launch

        def noted(batch: DecodeBatch) -> Callable[[], Outcomes]:
            assert len(batch) <= 3
            assert not set(batch.sequences) & set(self.left)
            batch.settle()
            assert all(s.num_tail_tokens + 1 < s.params.max_tokens for s in batch.sequences)
            self._launched = batch.sequences
            return launch(batch)

        self.device.launch = noted  # type: ignore[method-assign]

    def _deliver(self, outputs: Iterable[StepOutput], left: list[DecodeSequence]) -> None:
        for output in outputs:
            self.told.setdefault(output.sequence, []).append(output)
        in_flight = self._launched if self.engine._in_flight else []
        assert not set(left) & set(in_flight)
        self.left += left

    def work(self) -> None:
        if self.engine._has_work():
            self.engine._work()


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_what_a_step_brought_may_be_read_when_the_engine_has_gone_on(runs_ahead: bool) -> None:
    stepped, reports = SteppedEngine(runs_ahead), list[Iterable[StepOutput]]()
    stepped.engine._deliver = lambda outputs, left: reports.append(outputs)
    stepped.engine.join_batch([choice(1, 3), choice(2, 5)])
    while stepped.engine._has_work():
        stepped.work()
    told = [[(o.sequence.seed, o.index, o.token, o.finish_reason) for o in outputs] for outputs in reports]
    assert told == [
        [(1, 1, SampledToken(1), None), (2, 1, SampledToken(1), None)],
        [(1, 2, SampledToken(2), "length"), (2, 2, SampledToken(2), None)],
        [(2, 3, SampledToken(3), None)],
        [(2, 4, SampledToken(4), "length")],
    ]


@pytest.mark.parametrize(
    ("runs_ahead", "expected"), [(True, "launch launch launch 1 2 3"), (False, "launch 1 launch 2 launch 3")]
)
def test_a_step_is_told_before_the_next_is_waited_for_but_not_before_it_is_launched(
    runs_ahead: bool, expected: str
) -> None:
    stepped, events = SteppedEngine(runs_ahead), list[str]()
    launch = stepped.device.launch

    def noted(batch: DecodeBatch) -> Callable[[], Outcomes]:
        events.append("launch")
        return launch(batch)

    stepped.device.launch = noted  # type: ignore[method-assign]
    stepped.engine._deliver = lambda outputs, left: events.extend(str(output.index) for output in outputs)
    stepped.engine.join_batch([choice(1, 4)])
    while stepped.engine._has_work():
        stepped.work()
    assert " ".join(events) == expected


def test_what_is_known_does_not_wait_for_a_launch_with_new_members() -> None:
    """It may have a graph captured, which takes long."""
    stepped, events = SteppedEngine(True), list[str]()
    launch = stepped.device.launch

    def noted(batch: DecodeBatch) -> Callable[[], Outcomes]:
        events.append(f"launch of {len(batch)}")
        return launch(batch)

    stepped.device.launch = noted  # type: ignore[method-assign]
    stepped.engine._deliver = lambda outputs, left: events.extend(str(output.index) for output in outputs)
    stepped.engine.join_batch([choice(1, 6)])
    stepped.work()
    stepped.work()
    stepped.engine.join_batch([choice(2, 6)])
    stepped.work()
    assert events == ["launch of 1", "launch of 1", "1", "launch of 2"]


def test_what_was_not_told_yet_is_told_when_the_engine_stops_or_dies() -> None:
    for end in (lambda engine: engine._end(), lambda engine: engine._abandon(LocalError("dead"))):
        stepped, told = SteppedEngine(True), list[StepOutput]()
        stepped.engine._deliver = lambda outputs, left, told=told: told.extend(outputs)  # type: ignore[misc]
        stepped.engine.join_batch([choice(1, 6)])
        stepped.work()
        stepped.work()
        assert not told
        end(stepped.engine)
        assert [output.token for output in told[:1]] == [SampledToken(1)]
        end(stepped.engine)
        assert sum(output.token is not None for output in told) == 1


LIVES = st.tuples(st.integers(2, 8), st.integers(1, 9), st.integers(0, 9), st.integers(0, 20))


@given(st.lists(LIVES, max_size=8), st.booleans())
def test_whatever_joins_stops_or_is_dropped_ends_once_and_then_leaves(
    lives: list[tuple[int, int, int, int]], runs_ahead: bool
) -> None:
    stepped, empty = SteppedEngine(runs_ahead), np.zeros(64, np.int32)
    sequences = [
        DecodeSequence(empty, SamplingParams(most, stop_token_ids=(stop,)), i, (), FORMATS["bf16"], empty, [0])
        for i, (most, stop, _, _) in enumerate(lives)
    ]
    for step in range(30):
        stepped.engine.join_batch(s for s, life in zip(sequences, lives, strict=True) if life[2] == step)
        stepped.engine.drop(s for s, life in zip(sequences, lives, strict=True) if life[2] + life[3] == step)
        stepped.work()
    while stepped.engine._has_work():
        stepped.work()
    assert sorted(s.seed for s in stepped.left) == list(range(len(lives)))
    assert stepped.engine.num_running == stepped.engine.num_waiting == 0
    for sequence, (most, stop, _, _) in zip(sequences, lives, strict=True):
        *before, last = stepped.told[sequence]
        assert all(output.token == SampledToken(output.index) and not output.ends for output in before)
        assert [output.index for output in (*before, last)] == list(range(1, len(before) + 2))
        if last.finish_reason == "cancelled":
            assert last.token is None
        else:
            assert (last.index, last.finish_reason) == (stop, "stop") if stop < most else (most - 1, "length")


def test_a_lost_device_ends_the_engine_even_without_work() -> None:
    died = Queue[bool]()
    engine = DecodeEngine(AheadDecode(), max_batch_size=4, deliver=lambda outputs, left: None)
    engine.on_death = lambda: died.put(True)
    engine.start()
    engine.fail(DeviceFault("an illegal access"))
    assert died.get(timeout=PATIENCE_S)
    assert "an illegal access" in str(engine.failure)


def test_a_step_that_fails_fails_its_sequences() -> None:
    class Broken:
        runs_ahead = False

        def launch(self, batch: DecodeBatch) -> Callable[[], Outcomes]:
            raise RuntimeError("out of luck")

    outputs = Queue[Iterable[StepOutput]]()
    engine = DecodeEngine(Broken(), max_batch_size=2, deliver=lambda step, left: outputs.put(step))
    engine.join_batch([choice(1, 3)])
    engine.start()
    (output,) = outputs.get(timeout=PATIENCE_S)
    assert isinstance(output.error, LocalError)
    assert "out of luck" in str(output.error)
    engine.stop()
    assert engine.join(PATIENCE_S)
    assert engine.num_running == 0
