"""Sampling: the generator against published vectors, draws against the softmax, filters against plain code."""

import array
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hmad.compute.sampler import SamplerInput, cutoff, finish_reason, sample
from hmad.facts.errors import NonFiniteLogitsError
from hmad.facts.sampling import SampledToken, SamplingParams, TokenLogprobs
from hmad_kernels.cpu_sampling import (
    PARALLEL_LOGITS,
    gumbel,
    gumbel_argmax,
    gumbel_argmax_reference,
    noise_bound,
    philox4x32,
    philox4x32_reference,
)

VOCAB = 203  # not a multiple of four


def random_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def row_of(
    seed: int = 1, index: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = (), **params: Any
) -> SamplerInput:
    return SamplerInput(SamplingParams(**{"max_tokens": 100, **params}), seed, index, prompt, output)


def tokens_of(logits: torch.Tensor, rows: Sequence[SamplerInput]) -> list[SampledToken]:
    outcomes = sample(logits, rows)
    tokens = [o for o in outcomes if isinstance(o, SampledToken)]
    assert len(tokens) == len(outcomes)
    return tokens


def ids_of(logits: torch.Tensor, rows: Sequence[SamplerInput]) -> list[int]:
    return [token.token_id for token in tokens_of(logits, rows)]


def test_philox_gives_the_published_answers() -> None:
    known = [  # counter, key, words: kat_vectors of Random123, philox4x32 10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, words in known:
        assert list(philox4x32(*(np.uint64(x) for x in counter + key))) == words
        assert philox4x32_reference(np.array([counter], dtype=np.uint64).T, *key).T.tolist() == [words]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 2, 2**32 - 1]))
def test_noise_is_finite_and_below_its_bound(word: int) -> None:
    noise = gumbel(np.uint64(word))
    assert math.isfinite(noise)
    assert noise <= noise_bound(np.uint64(word)) < 23.0


@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 1), (3, 4), (5, VOCAB), (2, PARALLEL_LOGITS // 2)])
def test_kernel_equals_its_reference(num_rows: int, vocab: int) -> None:
    random = np.random.default_rng(0)
    logits = random_logits(num_rows, vocab).numpy()
    logits[:, ::7] = -np.inf
    logits[:, -1] = 1.0
    rows = random.permutation(num_rows)
    tops = logits[rows].max(1).astype(np.float64)
    args = (
        logits,
        rows,
        tops,
        np.where(random.random(num_rows) < 0.5, -np.inf, tops - 2.0),
        random.uniform(0.2, 2.0, num_rows),
        random.integers(0, 2**64, num_rows, dtype=np.uint64),
        random.integers(0, 2**32, num_rows, dtype=np.uint32),
    )
    assert gumbel_argmax(*args).tolist() == gumbel_argmax_reference(*args).tolist()


def test_kernel_refuses_what_it_was_not_compiled_for() -> None:
    one, zero = np.ones(1), np.zeros(1, np.int64)
    tail = (one, one, one, zero.astype(np.uint64), zero.astype(np.uint32))
    with pytest.raises(ValueError, match="float32"):
        gumbel_argmax(np.ones((1, 8)), zero, *tail)
    with pytest.raises(ValueError, match="contiguous"):
        gumbel_argmax(np.ones((8, 4), np.float32).T, zero, *tail)


@pytest.mark.parametrize(("seed_step", "index_step"), [(1, 0), (0, 1)])
def test_draws_follow_the_softmax(seed_step: int, index_step: int) -> None:
    """Chi-square of 20,000 draws over 40 tokens; 99.9 % of honest generators stay below the bound for 39 degrees."""
    num_draws, vocab, temperature = 20_000, 40, 0.7
    logits = random_logits(1, vocab, scale=1.0)
    rows = [row_of(i * seed_step, i * index_step, temperature=temperature) for i in range(num_draws)]
    counts = Counter(ids_of(logits.expand(num_draws, -1), rows))
    expected = torch.softmax(logits[0].double() / temperature, 0) * num_draws
    chi_square = sum((counts[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    assert chi_square < 72.06


def test_a_row_draws_the_same_alone_as_in_any_batch() -> None:
    logits = random_logits(40)
    rows = [
        row_of(
            seed=(1 << 64) - 1 - i,
            index=i * 1000,
            prompt=[1, 2, 3],
            output=[i, i + 1],
            temperature=(0.0, 0.5, 1.0, 2.0)[i % 4],
            top_k=(0, 20)[i // 2 % 2],
            top_p=(1.0, 0.9, 0.5)[i % 3],
            min_p=(0.0, 0.05)[i // 3 % 2],
            repetition_penalty=(1.0, 1.3)[i // 5 % 2],
            num_logprobs=(None, 3)[i % 2],
        )
        for i in range(len(logits))
    ]
    together = sample(logits, rows)
    assert [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)] == together
    backwards = list(reversed(range(len(rows))))
    assert sample(logits[backwards], [rows[i] for i in backwards]) == together[::-1]


def test_seed_and_index_alone_decide_the_draw() -> None:
    logits = random_logits(1, scale=0.1)
    draws = {
        (seed, index): ids_of(logits, [row_of(seed, index)])[0]
        for seed in (0, 1, 1 << 32, (1 << 64) - 1)
        for index in (0, 1, 2, 3)
    }
    assert all(ids_of(logits, [row_of(*key)]) == [token] for key, token in draws.items())
    assert len(set(draws.values())) > 10  # each half of the seed and the index all count


def test_draws_stay_what_they_are() -> None:
    """A sequence may be continued by another version of this code: these numbers must never change."""
    logits = torch.linspace(0.0, 2.0, 1000)[None]
    assert [ids_of(logits, [row_of(seed=42, index=i)])[0] for i in range(6)] == [647, 814, 762, 941, 56, 833]


def test_temperature_zero_is_argmax_with_the_lowest_id_on_ties() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [17, 90]] = 2.0
    assert ids_of(logits, [row_of(temperature=0.0)] * 2) == [17, 0]


def test_a_tiny_temperature_is_argmax_too() -> None:
    logits = random_logits(8)
    rows = [row_of(seed=i, temperature=5e-324, top_p=0.9, min_p=0.1) for i in range(8)]
    assert ids_of(logits, rows) == logits.argmax(1).tolist()


def kept_by(logits: NDArray[np.float32], params: SamplingParams) -> set[int]:
    """top_k, top_p and min_p, one after another, token by token."""
    scaled = [float(x) / params.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if params.top_k:
        order = order[: params.top_k]
    weights = [math.exp(scaled[i] - scaled[order[0]]) for i in order]
    nucleus, mass = [], 0.0
    for token_id, weight in zip(order, weights, strict=True):
        if params.top_p == 1.0 or mass / sum(weights) < params.top_p:  # a sum of floats may reach 1.0 before the last
            nucleus.append(token_id)
        mass += weight
    return {i for i in nucleus if math.exp(scaled[i] - scaled[order[0]]) >= params.min_p}


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 60),
    st.builds(
        SamplingParams,
        max_tokens=st.just(1),
        temperature=st.floats(0.1, 3.0),
        top_k=st.integers(0, 70),
        top_p=st.floats(0.01, 0.999) | st.just(1.0),
        min_p=st.floats(0.0, 1.0),
    ),
)
@example(0, 3, SamplingParams(max_tokens=1, temperature=0.25))
def test_filters_keep_what_plain_code_keeps(seed: int, vocab: int, params: SamplingParams) -> None:
    logits = random_logits(1, vocab, seed)[0].numpy()
    floor = cutoff(logits, float(logits.max()), params)
    assert set(np.flatnonzero(logits >= floor).tolist()) == kept_by(logits, params)


def test_only_kept_tokens_are_drawn_and_each_of_them_is() -> None:
    logits = random_logits(1, scale=0.5)
    params = SamplingParams(max_tokens=1, top_k=8, top_p=0.9)
    rows = [SamplerInput(params, seed, 0, (), ()) for seed in range(500)]
    drawn = set(ids_of(logits.expand(500, -1), rows))
    assert drawn == kept_by(logits[0].numpy(), params)
    assert len(drawn) > 3


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], dtype=np.float32)
    for params in (SamplingParams(1, top_k=2), SamplingParams(1, top_p=0.5)):
        assert cutoff(logits, 3.0, params) == 2.0


def penalized(logits: torch.Tensor, row: SamplerInput) -> torch.Tensor:
    """The penalties, token by token."""
    params, result = row.params, logits.double().clone()
    output = list(row.output_token_ids)
    for i in {*row.prompt_token_ids, *output}:
        result[i] *= params.repetition_penalty if result[i] <= 0 else 1 / params.repetition_penalty
    for i in set(output):
        result[i] -= params.frequency_penalty * output.count(i) + params.presence_penalty
    return result


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"presence_penalty": -2.0},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.7},
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: array.array("i", ids)])
def test_penalties_come_before_everything_else(penalties: dict[str, float], kind: Any) -> None:
    random = np.random.default_rng(5)
    logits = random_logits(16)
    changed = 0
    for temperature in (0.0, 0.8):
        for i, row_logits in enumerate(logits):
            likely = row_logits.topk(6).indices.numpy()
            prompt, output = random.choice(likely, 8).tolist(), random.choice(likely, 8).tolist()
            row = row_of(i, 3, kind(prompt), kind(output), temperature=temperature, top_k=30, **penalties)
            plain = row_of(i, 3, temperature=temperature, top_k=30)
            expected = ids_of(penalized(row_logits, row).float()[None], [plain])
            assert ids_of(row_logits[None], [row]) == expected
            changed += expected != ids_of(row_logits[None], [plain])
    assert changed


def test_penalties_leave_the_callers_logits_alone_and_need_no_output() -> None:
    logits = random_logits(2)
    before = logits.clone()
    rows = [row_of(prompt=[3, 3, 4], repetition_penalty=2.0, frequency_penalty=1.0) for _ in range(2)]
    tokens = tokens_of(logits, rows)
    assert torch.equal(logits, before)
    assert len(tokens) == 2


def test_an_absurd_penalty_still_yields_a_token() -> None:
    row = row_of(prompt=range(VOCAB), repetition_penalty=1e-320, temperature=1.0)
    assert 0 <= ids_of(random_logits(1), [row])[0] < VOCAB


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(6)
    expected = torch.log_softmax(logits.double(), 1)
    settings_of_rows: list[dict[str, Any]] = [
        {"num_logprobs": 0},
        {"num_logprobs": 5, "temperature": 0.3, "top_k": 2},
        {"num_logprobs": 20, "repetition_penalty": 1.5, "prompt": range(VOCAB)},
        {"num_logprobs": 3, "forced_token_ids": (11,)},
        {"num_logprobs": VOCAB, "temperature": 0.0},
        {},
    ]
    tokens = tokens_of(logits, [row_of(**kwargs) for kwargs in settings_of_rows])
    assert tokens[5].logprobs is None
    for token, row, kwargs in zip(tokens[:5], expected[:5], settings_of_rows[:5], strict=True):
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(float(row[token.token_id]), abs=1e-9)
        values, ids = row.topk(kwargs["num_logprobs"])
        assert [i for i, _ in token.logprobs.top] == ids.tolist()
        assert [p for _, p in token.logprobs.top] == pytest.approx(values.tolist(), abs=1e-9)


def test_top_logprobs_that_tie_come_lowest_id_first() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0]])
    (token,) = tokens_of(logits, [row_of(num_logprobs=3)])
    assert isinstance(token.logprobs, TokenLogprobs)
    assert [i for i, _ in token.logprobs.top] == [1, 0, 2]


def test_forced_tokens_replace_the_draw_until_they_run_out() -> None:
    logits = random_logits(1)
    rows = [row_of(index=i, forced_token_ids=(7, 8), temperature=0.0) for i in range(3)]
    drawn = [ids_of(logits, [row])[0] for row in rows]
    assert drawn == [7, 8, int(logits.argmax())]


def test_wanted_logits_are_the_raw_float32_row() -> None:
    logits = random_logits(2)
    wanted, plain = tokens_of(logits, [row_of(want_logits=True, prompt=[1], repetition_penalty=3.0), row_of()])
    assert plain.logits is None
    assert wanted.logits == logits[0].numpy().astype("<f4").tobytes()


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"repetition_penalty": 1.5}, {"forced_token_ids": (1,)}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(params: dict[str, Any], bad: float) -> None:
    logits = random_logits(3)
    rows = [row_of(seed=i, prompt=[2], num_logprobs=2, **params) for i in range(3)]
    expected = sample(logits, rows)
    logits[1, 150] = bad
    outcomes = sample(logits, rows)
    assert isinstance(outcomes[1], NonFiniteLogitsError)
    assert outcomes[::2] == expected[::2]


def test_masked_logits_are_never_drawn() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    assert isinstance(sample(logits, [row_of()])[0], NonFiniteLogitsError)
    logits[0, 99] = -5.0
    for row in (row_of(), row_of(temperature=0.0), row_of(top_p=0.5, top_k=3, min_p=0.1)):
        assert ids_of(logits, [row]) == [99]


def test_finish_reason() -> None:
    params = SamplingParams(max_tokens=3, stop_token_ids=(5, 6))
    assert finish_reason(4, 1, params) is None
    assert finish_reason(4, 2, params) == "length"
    assert finish_reason(6, 0, params) == "stop"
    assert finish_reason(5, 2, params) == "stop"
