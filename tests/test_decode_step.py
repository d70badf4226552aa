"""What the host makes of a decode step for the kernels, and of their results: arrays, no object for each sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmad.compute.batch import MOST_UNSETTLED, DecodeBatch
from hmad.compute.cuda_decode import FORMAT_NAMES
from hmad.compute.cuda_sampler import outcomes_of, settings_of
from hmad.compute.device import Outcomes
from hmad.compute.sampler import finish_reason
from hmad.compute.sequence import DecodeSequence, Segment
from hmad.facts.errors import NonFiniteLogitsError
from hmad.facts.formats import FORMATS
from hmad.facts.sampling import SampledToken, SamplingParams

SEGMENTS = st.lists(st.tuples(st.sampled_from(sorted(FORMATS)), st.integers(1, 300)), max_size=3)
SEQUENCES = st.lists(st.tuples(SEGMENTS, st.integers(0, 70)), min_size=1, max_size=5)  # prefix, tokens in the tail
MAX_TOKENS = 200


Shapes = list[tuple[list[tuple[str, int]], int]]


def sequences_of(shapes: Shapes) -> list[DecodeSequence]:
    """Every block in a slot of its own."""
    slots = iter(np.random.default_rng(0).permutation(10_000).astype(np.int32))

    def taken(number: int) -> np.ndarray:
        return np.array([next(slots) for _ in range(number)], np.int32)

    tail = FORMATS["bf16"]
    sequences = []
    for segments, num_tail_tokens in shapes:
        prefix = tuple(Segment(FORMATS[name], n, taken(FORMATS[name].num_blocks(n))) for name, n in segments)
        params = SamplingParams(MAX_TOKENS)
        sequence = DecodeSequence(np.zeros(1), params, 0, prefix, tail, taken(tail.num_blocks(MAX_TOKENS)), [7])
        sequence.num_tail_tokens = num_tail_tokens
        sequences.append(sequence)
    return sequences


def places(sequence: DecodeSequence) -> list[tuple[str, int, int]]:
    """(format, slot, offset) of every token, the newest included."""
    tail = Segment(sequence.tail_format, sequence.num_tail_tokens + 1, sequence.tail_slots)
    return [
        (segment.format.name, int(segment.slots[i // size]), i % size)
        for segment in (*sequence.prefix, tail)
        for size in [segment.format.tokens_per_block]
        for i in range(segment.num_tokens)
    ]


def places_of_runs(batch: DecodeBatch, runs: np.ndarray) -> list[tuple[str, int, int]]:
    """The same, of rows (format code, first index into the block table, number of tokens)."""
    return [
        (name, int(batch.block_table[first + i // size]), i % size)
        for code, first, num_tokens in runs.tolist()
        for name in [FORMAT_NAMES[code]]
        for size in [FORMATS[name].tokens_per_block]
        for i in range(num_tokens)
    ]


@given(SEQUENCES, st.integers(0, 40))
def test_a_batch_says_where_every_token_is_and_goes_on_counting(shapes: Shapes, num_steps: int) -> None:
    batch = DecodeBatch(sequences_of(shapes))
    for _ in range(num_steps):
        batch.advance()
    batch.settle()
    tail_slots, tail_offsets = batch.tail_places
    for row, sequence in enumerate(batch.sequences):
        expected = places(sequence)
        segments = batch.segments[batch.seq_segments[row] : batch.seq_segments[row + 1]]
        assert places_of_runs(batch, segments[:, [0, 2, 1]]) == expected
        assert expected[-1] == ("bf16", tail_slots[row], tail_offsets[row])
        assert batch.positions[row] == len(expected) - 1
        assert batch.tail_lens[row] == sequence.num_tail_tokens + 1 == shapes[row][1] + num_steps + 1
    assert batch.num_steps_left == MAX_TOKENS - 1 - num_steps - max(tokens for _, tokens in shapes)


def test_an_empty_batch_has_nothing() -> None:
    batch = DecodeBatch([])
    assert (len(batch), batch.num_steps_left, batch.segments.shape, len(batch.positions)) == (0, 0, (0, 3), 0)


def test_settings_are_those_of_the_parameters() -> None:
    plain = SamplingParams(8, temperature=0.0)
    special = SamplingParams(
        8, 0.6, top_p=0.9, top_k=20, min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.5,
        num_logprobs=0, forced_token_ids=(3,),
    )  # fmt: skip
    settings = settings_of([(plain, 5), (special, (1 << 64) - 2)])
    assert settings.tolist() == [
        (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 5, -1, False, False, False),
        (0.6, 20, 0.9, 0.1, 1.5, -0.5, 0.5, -2, -1, True, True, True),
    ]
    assert settings_of([]).shape == (0,)


def test_what_was_drawn_is_described_where_it_is_sound() -> None:
    """A row of logits that are not finite has no log-probabilities to tell."""
    asks, plain = SamplingParams(8, num_logprobs=1, want_logits=True), SamplingParams(8)
    sequences = sequences_of([([], 0)] * 4)
    for sequence, params in zip(sequences, (plain, asks, asks, plain), strict=True):
        sequence.params = params
    raw = {row: np.array([0.0, 1.0, top], np.float32) for row, top in ((1, 2.0), (2, np.inf))}
    tops = np.array([1.0, 2.0, np.inf, np.nan], np.float32)
    first, second, third, fourth = outcomes_of(sequences, np.arange(4), np.array([5, 2, 0, 0]), tops, raw)
    assert first == SampledToken(5)
    assert isinstance(second, SampledToken)
    assert second.logprobs is not None
    assert (second.token_id, second.logits, second.logprobs.top[0][0]) == (2, raw[1].tobytes(), 2)
    assert isinstance(third, NonFiniteLogitsError)
    assert "output token 2 is inf" in str(third)
    assert "output token 3 is nan" in str(fourth)


ENDINGS = st.tuples(st.integers(3, 6), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 3), st.integers(0, 1))


@given(st.lists(ENDINGS, min_size=1, max_size=5))
def test_a_batch_ends_choices_as_each_of_them_would(rows: list[tuple[int, list[int], int, int]]) -> None:
    """By stop tokens, of which rows have different numbers, and by length: in every step up to the first's last."""
    sequences = sequences_of([([], num_tail_tokens) for *_, num_tail_tokens in rows])
    for sequence, (max_tokens, stops, _, _) in zip(sequences, rows, strict=True):
        sequence.params = SamplingParams(max_tokens, stop_token_ids=tuple(stops))
    token_ids = np.array([token_id for _, _, token_id, _ in rows])
    batch = DecodeBatch(sequences)
    while batch.num_steps_left:
        step, indices = batch.step, batch.tail_lens.tolist()
        batch.advance()
        reasons = batch.take(step, token_ids)
        for row, sequence in enumerate(sequences):
            assert reasons.get(row) == finish_reason(token_ids[row], indices[row], sequence.params)
    batch.settle()
    assert [s.output_token_ids for s in sequences] == [[7, *[token_id] * batch.step] for token_id in token_ids]
    assert any(s.num_tail_tokens == s.params.max_tokens - 1 for s in sequences)


def test_outcomes_are_read_row_by_row() -> None:
    error, told = NonFiniteLogitsError("NaN"), SampledToken(2, logits=b"")
    outcomes = Outcomes(np.array([1, 2, 3]), {1: told, 2: error})
    assert list(outcomes) == [SampledToken(1), told, error]
    assert outcomes.failed == [2]
    assert list(Outcomes.of([told, error])) == [told, error]


@pytest.mark.parametrize("num_steps", [1, MOST_UNSETTLED, MOST_UNSETTLED + 1])
def test_sequences_are_told_of_every_step_once(num_steps: int) -> None:
    sequences = sequences_of([([], 0), ([], 3)])
    batch = DecodeBatch(sequences)
    for step in range(num_steps):
        batch.advance()
        batch.take(step, np.array([step, 1000 + step]))
    for _ in range(2):
        batch.settle()
        assert [s.output_token_ids for s in sequences] == [[7, *range(n, n + num_steps)] for n in (0, 1000)]
        assert [s.num_tail_tokens for s in sequences] == [num_steps, 3 + num_steps]
