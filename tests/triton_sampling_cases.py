"""The Triton sampler beside the CPU's. test_triton_kernels.py runs this file as it does the others."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmad.compute.sampler import SamplerInput, sample
from hmad.facts.errors import NonFiniteLogitsError
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad_kernels import triton_sampling
from hmad_kernels.cpu_sampling import noise_reference
from hmad_kernels.triton_sampling import DTYPES, DeviceSampling, count_tokens, reset_counts, sample_rows

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
VOCAB, LARGE_VOCAB = 1000, 5003  # one chunk, and some
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinity, in the interpreter
INFINITY = float("inf")


def row_of(
    seed: int = 1, index: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = (), **params: Any
) -> SamplerInput:
    return SamplerInput(SamplingParams(**{"max_tokens": 100, **params}), seed, index, prompt, output)


def ids(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=DEVICE)


def device_sampling(rows: Sequence[SamplerInput]) -> DeviceSampling:
    """What a device role would have on the device for these rows; those with penalties count in reverse order."""
    columns: dict[str, list[Any]] = {name: [] for name in DTYPES}
    for i, row in enumerate(rows):
        p = row.params
        forced = p.forced_token_ids[row.index] if row.index < len(p.forced_token_ids) else -1
        values = (
            p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, p.frequency_penalty, p.presence_penalty,
            int(np.uint64(row.seed).astype(np.int64)), row.index, forced, len(rows) - 1 - i if p.penalized else -1,
        )  # fmt: skip
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return DeviceSampling(**{k: torch.tensor(v, dtype=DTYPES[k], device=DEVICE) for k, v in columns.items()})


def device_tokens(logits: Tensor, rows: Sequence[SamplerInput]) -> tuple[list[int], list[float]]:
    """Tokens and largest logits that the kernels find; the counts begin as rubbish."""
    counts = torch.full((len(rows), logits.shape[1]), 0x5A5A5A5A, dtype=torch.int32, device=DEVICE)
    for i, row in enumerate(rows):
        reset_counts(counts, len(rows) - 1 - i, ids(row.prompt_token_ids), ids(row.output_token_ids))
    tokens, tops = torch.full((len(rows),), -7, device=DEVICE), torch.full((len(rows),), -7.0, device=DEVICE)
    before = logits.clone()
    sample_rows(logits.to(DEVICE), device_sampling(rows), counts, tokens, tops)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return tokens.tolist(), tops.tolist()


def host_tokens(logits: Tensor, rows: Sequence[SamplerInput]) -> list[int]:
    """Tokens of the CPU's sampler; 0 for an unsound row."""
    return [outcome.token_id if isinstance(outcome, SampledToken) else 0 for outcome in sample(logits, rows)]


def assert_same(logits: Tensor, rows: Sequence[SamplerInput]) -> None:
    tokens, tops = device_tokens(logits, rows)
    assert tokens == host_tokens(logits, rows)
    assert tops == logits.max(1).values.tolist()


def random_logits(num_rows: int, vocab: int, seed: int, scale: float = 3.0, steps: int = 0) -> Tensor:
    """Normal logits; in steps, so that many tie, where asked for."""
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    return (logits * steps).round() / steps if steps else logits


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=6)
PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 0.6, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 0, 1, 2, 20, 999, 1000, 2000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.9]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.7]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.7, -1.1]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.3, -0.2]),
        "seed": st.integers(0, 2**64 - 1),
        "index": st.integers(0, 2**32 - 1) | st.integers(0, 3),
        "prompt": TOKENS,
        "output": TOKENS.map(lambda x: x * 2),  # some more than once
    }
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(PARAMS, min_size=1, max_size=3), st.integers(0, 1000), st.sampled_from([0, 0, 2]))
def test_tokens_equal_the_cpus(parameters: list[dict[str, Any]], seed: int, steps: int) -> None:
    logits = random_logits(len(parameters), VOCAB, seed, steps=steps)
    logits[:, seed % 7 :: 7] = -INFINITY
    assert_same(logits, [row_of(**p) for p in parameters])


FILTERS = [
    {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
    {"top_k": 3},  # fewer than chunks, so the bound of their maxima holds
    {"top_k": 5},
    {"top_k": 6},  # more than chunks
    {"top_p": 0.9},
    {"top_p": 0.99999, "temperature": 3.0},  # gathers most of the row
    {"top_p": 0.0},
    {"top_k": 4, "top_p": 0.3, "min_p": 0.2},
    {"min_p": 0.1},
    {},
    {"temperature": 0.0},
    {"temperature": 0.01},
    {"temperature": 1e-300},  # one divided by it is beyond float32
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_over_several_chunks(filters: dict[str, Any]) -> None:
    """A row where many logits tie, and a row under penalties."""
    tied, other = (random_logits(1, LARGE_VOCAB, seed=len(str(filters)), steps=steps) for steps in (1, 0))
    best = other[0].argsort(descending=True)[:40].tolist()
    penalties = {"repetition_penalty": 1.2, "presence_penalty": -0.3, "frequency_penalty": 0.4}
    output = best[::3] + best[:9] * 2  # the likeliest three times
    rows = [row_of(index=3, **filters), row_of(index=4, prompt=best, output=output, **penalties, **filters)]
    assert_same(torch.cat([tied, other]), rows)


def test_the_whole_cutoff_is_kept_and_no_more() -> None:
    """Temperatures so high that noise alone decides: the token is the luckiest of those that survive."""
    logits = random_logits(1, LARGE_VOCAB, seed=5, steps=1)[0]
    order = logits.argsort(descending=True, stable=True)
    noise = torch.from_numpy(noise_reference(LARGE_VOCAB, np.uint64(9), np.uint32(2)))
    for k in (2, 700, 4000):
        survivors = (logits >= logits[order[k - 1]]).nonzero().flatten()
        luckiest = int(survivors[noise[survivors].argmax()])
        assert device_tokens(logits[None], [row_of(9, 2, temperature=1e9, top_k=k)])[0] == [luckiest]


@pytest.mark.parametrize("filters", [{"min_p": 0.3}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.7}], ids=str)
def test_many_draws_of_one_row(filters: dict[str, Any]) -> None:
    """So hot that a cutoff which is a little off lets tokens through, or keeps them out, in one draw or another."""
    logits = random_logits(1, 1100, seed=6).expand(8, -1).contiguous()
    assert_same(logits, [row_of(index=i, temperature=2.5, **filters) for i in range(8)])


def test_many_unlikely_tokens_beat_a_likely_one() -> None:
    logits = torch.full((6, 2100), -5.0)
    logits[:, :1024] = -INFINITY  # so they are in other chunks
    logits[:, 0] = 0.0
    assert_same(logits, [row_of(index=i) for i in range(6)])


def test_equal_logits() -> None:
    logits = torch.full((4, LARGE_VOCAB), 2.5)
    filters = [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 1.0}]
    assert_same(logits, [row_of(**f) for f in filters])


def test_a_greedy_row_takes_the_lowest_of_the_best() -> None:
    logits = torch.zeros(2, LARGE_VOCAB)
    logits[0, [4000, 2000, 3000]] = 7.0
    logits[1, :2000] = -0.0  # equals 0
    assert device_tokens(logits, [row_of(temperature=0.0)] * 2)[0] == [2000, 0]


def test_forced_tokens_override_until_they_end() -> None:
    logits = random_logits(3, VOCAB, seed=1)
    rows = [row_of(index=i, forced_token_ids=(999, 0), temperature=float(i)) for i in range(3)]
    assert_same(logits, rows)
    assert device_tokens(logits, rows)[0][:2] == [999, 0]


@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
def test_an_unsound_row_is_token_0_and_stays_alone(bad: float) -> None:
    logits = random_logits(5, LARGE_VOCAB, seed=2)
    logits[[0, 2, 4], 3001] = bad
    filters = {"top_k": 5, "top_p": 0.9}
    rows = [row_of(**filters), row_of(**filters), row_of(temperature=0.0), row_of(), row_of(forced_token_ids=(3,))]
    tokens, tops = device_tokens(logits, rows)
    assert tokens == host_tokens(logits, rows)
    assert [tokens[i] for i in (0, 2, 4)] == [0, 0, 0]
    np.testing.assert_array_equal(tops, logits.max(1).values.numpy())
    assert isinstance(sample(logits, rows)[0], NonFiniteLogitsError)


def test_a_row_of_minus_infinity_is_unsound() -> None:
    logits = torch.full((1, VOCAB), -INFINITY)
    assert device_tokens(logits, [row_of(top_p=0.5)]) == ([0], [-INFINITY])


def test_a_forbidden_token_that_was_seen_is_the_smallest_number() -> None:
    """As on the CPU, whose penalties clip infinity."""
    logits = torch.full((1, VOCAB), -INFINITY)
    logits[0, 500] = -3.0e38
    assert_same(logits, [row_of(prompt=[5, 500], repetition_penalty=1.5, temperature=0.0)])


def test_counted_tokens_are_as_if_reset_with_them() -> None:
    counts, expected = torch.full((2, 3, VOCAB), 0x5A5A5A5A, dtype=torch.int32, device=DEVICE)
    prompts, outputs, new = [[5, 5, 6], [], [999]], [[6], [1, 2, 1], []], [[6], [1], []]
    for row in range(3):
        reset_counts(counts, row, ids(prompts[row]), ids(outputs[row]))
        reset_counts(expected, row, ids(prompts[row]), ids(outputs[row] + new[row]))
    rows = torch.tensor([1, -1, 0, -1], dtype=torch.int32, device=DEVICE)
    count_tokens(counts, rows, ids([1, 2**40, 6, -1]))
    assert torch.equal(counts, expected)
    assert int(counts[0, 6]) == triton_sampling.SEEN.value + 2


def test_neutral_rows_are_greedy() -> None:
    logits = random_logits(2, VOCAB, seed=3)
    tokens, tops = torch.empty(2, dtype=torch.int64, device=DEVICE), torch.empty(2, device=DEVICE)
    counts = torch.empty(0, VOCAB, dtype=torch.int32, device=DEVICE)
    sample_rows(logits.to(DEVICE), DeviceSampling.neutral(2, DEVICE), counts, tokens, tops)
    assert tokens.tolist() == logits.argmax(1).tolist()


def test_sampling_refuses_what_does_not_fit() -> None:
    logits, neutral = torch.zeros(2, VOCAB, device=DEVICE), DeviceSampling.neutral(2, DEVICE)
    counts = torch.zeros(1, VOCAB, dtype=torch.int32, device=DEVICE)
    tokens, tops = ids([0, 0]), torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"logits must be contiguous float32 \[-1, -1\], not bfloat16"):
        sample_rows(logits.bfloat16(), neutral, counts, tokens, tops)
    with pytest.raises(ValueError, match=r"temperature must be contiguous float64 \[2\], not float64 \[3\]"):
        sample_rows(logits, DeviceSampling.neutral(3, DEVICE), counts, tokens, tops)
    with pytest.raises(ValueError, match=r"counts must be contiguous int32 \[-1, 1000\]"):
        sample_rows(logits, neutral, counts[:, :-1], tokens, tops)
    with pytest.raises(ValueError, match=r"tokens_out must be contiguous int64 \[2\]"):
        sample_rows(logits, neutral, counts, tokens.int(), tops)
    with pytest.raises(ValueError, match=r"tops_out must be contiguous float32 \[2\]"):
        sample_rows(logits, neutral, counts, tokens, tops[:1])
    with pytest.raises(ValueError, match=r"1 to 1048576 columns, not float32 \[2, 0\]"):
        sample_rows(logits[:, :0].contiguous(), neutral, counts, tokens, tops)
    with pytest.raises(ValueError, match=r"tokens must be contiguous int64 \[2\]"):
        count_tokens(counts, neutral.counts_row, tokens[:1])
    with pytest.raises(ValueError, match=r"there is no row 1 in counts, int32 \[1, 1000\], strides"):
        reset_counts(counts, 1, tokens, tokens)
    with pytest.raises(ValueError, match=r"output_ids must be contiguous int64 \[-1\], not int32 \[2\]"):
        reset_counts(counts, 0, tokens, tokens.int())
