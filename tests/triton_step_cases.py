"""Decode steps that count on by themselves, beside the host's account of them, and the whole device beside the CPU's.
test_triton_kernels.py runs this file as it does the others.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from decoders import PATIENCE_S, Decoder, logits_of, poison_token, relative_error
from host_as_device import DEVICE, INTERPRETED, STREAM, model_on_device, stand_in
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode_step import SEQUENCES, Shapes, places, places_of_runs, sequences_of

from hmad.compute import cuda_decode
from hmad.compute.batch import DecodeBatch
from hmad.compute.cpu import CpuDecode
from hmad.compute.cuda_decode import PLAN_STEPS, CudaDecode
from hmad.compute.loading import load_model
from hmad.compute.sequence import DecodeSequence
from hmad.facts.errors import LocalError, NonFiniteKVError
from hmad.facts.formats import FORMATS, KVFormat
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad_kernels.triton_common import NO_ROW, format_code
from hmad_kernels.triton_plan import split_items
from hmad_kernels.triton_step import (
    MOST_STOPS,
    PLACE_DTYPES,
    RESULT_DTYPES,
    ROW_DTYPES,
    StepPlaces,
    StepResults,
    StepRows,
    begin_step,
    finish_step,
)

TURNS = 3
PADDING = 2  # rows
TAIL_TOKENS, TAIL_CODE = FORMATS["bf16"].tokens_per_block, format_code("bf16")
VOCAB = 320
CLOSE = 5e-3  # of logits: 8-bit values meet float16 queries on a GPU
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN, in the interpreter


# --- the kernels ---


def on_device(array: np.ndarray, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE, dtype)


def host_memory(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=not INTERPRETED)


class Stepped:
    """A batch and two rows of padding, whose steps draw what they are told to."""

    def __init__(self, batch: DecodeBatch) -> None:
        size = len(batch)
        padding = (0, PADDING)
        columns = {
            "sources": np.full(size, NO_ROW), "known": 50 + np.arange(size), "positions": batch.positions,
            "index": batch.tail_lens, "tail_firsts": batch.tail_firsts,
        }  # fmt: skip
        beyond = {"sources": NO_ROW, "known": 0, "positions": 0, "index": 1, "tail_firsts": NO_ROW}
        self.rows = StepRows(
            **{
                name: on_device(np.pad(column, padding, constant_values=beyond[name]), ROW_DTYPES[name])
                for name, column in columns.items()
            }
        )
        self.formats = tuple(FORMATS)
        self.plan = split_items(batch.seq_segments, batch.segments, batch.block_table, self.formats, 64, capacity=700)
        self.items = on_device(self.plan.items)
        self.last_items = on_device(np.pad(self.plan.last_items, padding))
        self.block_table = on_device(batch.block_table)

        def full(dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
            return {name: torch.full((size + PADDING,), 77, dtype=d).to(DEVICE) for name, d in dtypes.items()}

        self.places, self.results = StepPlaces(**full(PLACE_DTYPES)), StepResults(**full(RESULT_DTYPES))
        self.stops = on_device(np.full((MOST_STOPS, size + PADDING + 3), -1), torch.int64)
        self.turn = on_device(np.zeros(1))
        self.host = StepResults(
            **{name: host_memory(TURNS, size + PADDING + 1, dtype=dtype) for name, dtype in RESULT_DTYPES.items()}
        )
        self.num_special = host_memory(TURNS, dtype=torch.int32)

    def begin(self) -> None:
        drawn, bad_rows = self.results.token_ids, self.results.bad_rows
        begin_step(self.rows, drawn, self.block_table, self.places, bad_rows, TAIL_TOKENS)

    def finish(self) -> None:
        finish_step(
            self.rows, self.results, self.items[TAIL_CODE], self.last_items, self.stops, self.turn, self.host,
            self.num_special,
        )  # fmt: skip
        if not INTERPRETED:
            torch.cuda.synchronize()


@settings(deadline=None, max_examples=30)
@given(SEQUENCES, st.integers(1, PLAN_STEPS))
def test_the_device_counts_on_as_the_batch_does(shapes: Shapes, num_steps: int) -> None:
    batch = DecodeBatch(sequences_of(shapes))
    size, stepped = len(batch), Stepped(batch)
    newest = 50 + np.arange(size)
    for step in range(num_steps):
        stepped.begin()
        assert stepped.places.token_ids.tolist() == [*newest, *[0] * PADDING]
        slots, offsets = batch.tail_places
        assert stepped.places.tail_slots.tolist() == [*slots, *[NO_ROW] * PADDING]
        assert stepped.places.tail_offsets[:size].tolist() == offsets.tolist()
        assert stepped.rows.positions.tolist() == [*batch.positions, *[0] * PADDING]
        assert stepped.rows.index[:size].tolist() == batch.tail_lens.tolist()
        assert not stepped.results.bad_rows.any()
        newest = 1000 * step + np.arange(size)
        stepped.results.token_ids[:size] = on_device(newest)
        stepped.finish()
        assert stepped.host.token_ids[step % TURNS, :size].tolist() == newest.tolist()
        batch.advance()
    batch.settle()
    runs = np.empty((stepped.plan.seq_items[-1], 3), int)  # of all items, by place
    for code, items in enumerate(stepped.items.cpu().numpy()):
        for _, place, first, num_tokens, *slots in items[: stepped.plan.num_items[code]].tolist():
            runs[place] = code, first, num_tokens
            assert slots == batch.block_table[first : first + 4].tolist() + [batch.block_table[-1]] * (
                first + 4 - len(batch.block_table)
            )
    for row, sequence in enumerate(batch.sequences):
        begin, end = stepped.plan.seq_items[row : row + 2]
        assert places_of_runs(batch, runs[begin:end]) == places(sequence)


def test_tokens_come_from_other_rows_of_the_step_before() -> None:
    """Of a batch that was larger."""
    stepped = Stepped(DecodeBatch(sequences_of([([], n) for n in range(3)])))
    stepped.rows.sources[:3] = on_device(np.array([6, NO_ROW, 0]), torch.int64)
    stepped.results = StepResults(
        **(vars(stepped.results) | {"token_ids": on_device(10 + np.arange(7), torch.int64)})  # two rows more than now
    )
    stepped.begin()
    assert stepped.places.token_ids.tolist() == [16, 51, 10, 0, 0]


def test_more_rows_than_a_program_has() -> None:
    batch = DecodeBatch(sequences_of([([], n % 40) for n in range(600)]))
    stepped = Stepped(batch)
    for _ in range(2):
        stepped.begin()
        stepped.finish()
        batch.advance()
    assert stepped.rows.positions[:600].tolist() == batch.positions.tolist()
    assert stepped.rows.sources[:600].tolist() == list(range(600))
    assert stepped.host.token_ids[1, :600].tolist() == stepped.results.token_ids[:600].tolist()
    assert stepped.turn.tolist() == [2]


def test_what_the_host_has_to_look_at_is_counted() -> None:
    stepped = Stepped(DecodeBatch(sequences_of([([], n) for n in range(5)])))
    stepped.begin()
    tops = torch.tensor([1.0, float("nan"), float("inf"), float("-inf"), -2.0, float("nan"), float("inf")])
    stepped.results.tops.copy_(tops)  # the last two are padding
    stepped.results.bad_rows[4] = 1
    stepped.finish()
    assert stepped.num_special.tolist() == [4, 0, 0]
    assert stepped.host.tops[0, :5].tolist()[2:] == tops[2:5].tolist()
    assert stepped.host.bad_rows[0, :5].tolist() == [0, 0, 0, 0, 1]
    stepped.begin()
    stepped.results.tops.zero_()
    stepped.finish()
    assert stepped.num_special.tolist() == [4, 0, 0]
    stepped.begin()
    stepped.results.token_ids.copy_(torch.tensor([9, 8, 7, 6, 5, 4, 3]))
    for number, (row, token) in enumerate([(0, 9), (1, 9), (2, 7), (5, 4)]):  # the last is padding's
        stepped.stops[number, row] = token
    stepped.finish()
    assert stepped.num_special.tolist() == [4, 0, 2]


def test_steps_refuse_what_does_not_fit() -> None:
    stepped = Stepped(DecodeBatch(sequences_of([([], 1)])))
    stepped.rows = StepRows(**(vars(stepped.rows) | {"known": stepped.rows.known[:2]}))
    with pytest.raises(ValueError, match=r"known must be contiguous int64 \[3\], not int64 \[2\]"):
        stepped.begin()
    stepped = Stepped(DecodeBatch(sequences_of([([], 1)])))
    stepped.host = StepResults(**{name: tensor[:, :2].contiguous() for name, tensor in vars(stepped.host).items()})
    with pytest.raises(ValueError, match="the host has room for 2 rows, not for 3"):
        stepped.finish()
    stepped = Stepped(DecodeBatch(sequences_of([([], 1)])))
    stepped.turn = stepped.turn.long()
    with pytest.raises(ValueError, match="turn must be contiguous int32"):
        stepped.finish()


# --- the device ---


@pytest.fixture(autouse=True)
def host_as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As late as a device may be."""
    monkeypatch.setattr(STREAM, "late", True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory, num_layers=1, head_dim=64, num_heads=4, num_kv_heads=2, vocab=VOCAB)
    return directory


def decoder_on_cpu(checkpoint: Path, max_batch_size: int) -> Decoder:
    model = load_model(checkpoint, "fp32")
    return Decoder(model, lambda arena, tail: CpuDecode(model, arena, tail, 1), max_batch_size)


def decoder_on_device(checkpoint: Path, max_batch_size: int) -> Decoder:
    model = model_on_device(checkpoint)
    return Decoder(model, lambda arena, tail: CudaDecode(model, arena, tail, max_batch_size), max_batch_size)


@pytest.fixture
def decoders(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[list[Decoder]]:
    """The CPU's and the device's, of batches so small that their members change all the time."""
    both = [make(checkpoint, request.param) for make in (decoder_on_cpu, decoder_on_device)]
    yield both
    for decoder in both:
        decoder.close()


Request = tuple[KVFormat, int, SamplingParams]


def answers(decoder: Decoder, requests: Sequence[Request]) -> list[list[SampledToken]]:
    """All at once: more than decode together."""
    sequences = [decoder.sequence(*request, seed=number) for number, request in enumerate(requests)]
    tokens = decoder.decode(*sequences)
    return [tokens[sequence] for sequence in sequences]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("decoders", [1, 3], indirect=True)
def test_changing_batches_draw_what_the_cpu_draws(decoders: list[Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, by chance, under penalties and forced; tails of several blocks of 8 tokens."""
    monkeypatch.setattr(cuda_decode, "PLAN_STEPS", 4)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"temperature": 0.8, "forced_token_ids": tuple(range(12))},
        {"temperature": 0.0, "stop_token_ids": tuple(range(0, VOCAB, 4))},
    ]
    requests = [
        (FORMATS["fp32"], 5 + 9 * number, SamplingParams(max_tokens=(4, 18, 12)[number % 3], **kind))
        for number, kind in enumerate(kinds)
    ]
    [free] = answers(decoders[0], [(FORMATS["fp32"], 50, SamplingParams(max_tokens=8, temperature=0.0))])
    stops = VOCAB - 1, free[5].token_id  # so few that the device watches for them
    requests.append((FORMATS["fp32"], 50, SamplingParams(max_tokens=30, temperature=0.0, stop_token_ids=stops)))
    expected, ours = (answers(decoder, requests) for decoder in decoders)
    assert ours == expected
    assert expected[-2][-1].token_id % 4 == 0
    assert expected[-1][-1].token_id in stops
    assert max(len(expected[-2]), len(expected[-1])) < 10  # they have stopped


@pytest.mark.parametrize("decoders", [3], indirect=True)
def test_changing_batches_of_every_format_say_what_the_cpu_says(
    decoders: list[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under teacher forcing, some for longer than a plan serves, and some beyond the tokens that are forced."""
    monkeypatch.setattr(cuda_decode, "PLAN_STEPS", 4)
    forced = tuple(np.random.default_rng(5).integers(0, VOCAB, 7).tolist())
    requests = [
        (fmt, 1 + 23 * number, SamplingParams(max_tokens=tokens, forced_token_ids=forced[:tokens], want_logits=True))
        for number, (fmt, tokens) in enumerate(zip(FORMATS.values(), (4, 9, 3, 6, 5, 2), strict=True))
    ]
    last = (FORMATS["int8"], 40, SamplingParams(max_tokens=12, temperature=0.0, want_logits=True))
    expected, ours = (answers(decoder, [*requests, last]) for decoder in decoders)
    for theirs, tokens in zip(expected, ours, strict=True):
        assert [token.token_id for token in tokens] == [token.token_id for token in theirs]
        errors = [relative_error(logits_of(a), logits_of(b)) for a, b in zip(tokens, theirs, strict=True)]
        assert max(errors) < CLOSE


def test_nan_in_a_step_fails_its_sequence_alone(checkpoint: Path) -> None:
    decoder = decoder_on_device(checkpoint, 3)
    poison_token(decoder.model, 5)
    params = [
        SamplingParams(max_tokens=6, temperature=0.0, stop_token_ids=(5,)),
        SamplingParams(max_tokens=6, forced_token_ids=(0, 1, 5, 5, 5, 5)),
    ]
    alone = decoder_on_cpu(checkpoint, 3)
    [expected] = answers(alone, [(FORMATS["bf16"], 20, params[0])])
    alone.close()
    good, bad = (decoder.sequence(FORMATS["bf16"], 20, each) for each in params)
    errors, told = run_to_the_end(decoder, [good, bad])
    assert set(errors) == {bad}
    assert isinstance(errors[bad], NonFiniteKVError)
    assert "at position 22 is NaN" in str(errors[bad])  # a prompt of 20, and two tokens before it
    assert told[bad] == [1, 5]
    assert told[good] == [token.token_id for token in expected]
    decoder.close()


def test_a_step_that_cannot_be_launched_is_all_that_fails(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device knew of the batch does not count any more: it has made a step that the host knows nothing of."""
    requests = [(FORMATS["fp32"], 30, SamplingParams(max_tokens=12, temperature=0.0))] * 2
    decoder = decoder_on_cpu(checkpoint, 3)
    expected = answers(decoder, requests)
    decoder.close()
    decoder = decoder_on_device(checkpoint, 3)
    calls: list[str] = []

    def replay(*arguments: object) -> Any:
        calls.append("replay")
        launched = whole(*arguments)
        if calls.count("replay") == 5:
            raise torch.OutOfMemoryError("no memory for it")
        return launched

    def noted(*arguments: Any) -> Any:
        calls.append("adopt")
        return adopt(*arguments)

    device: Any = decoder.device
    whole, adopt = device._replay, device._adopt
    monkeypatch.setattr(device, "_replay", replay)
    monkeypatch.setattr(device, "_adopt", noted)
    errors, told = run_to_the_end(decoder, [decoder.sequence(*request) for request in requests])
    assert [type(error) for error in errors.values()] == [LocalError] * 2
    assert [len(tokens) for tokens in told.values()] == [4, 4]
    assert calls == ["adopt", *["replay"] * 5, "adopt", "replay"]
    assert answers(decoder, requests) == expected
    decoder.close()


def run_to_the_end(
    decoder: Decoder, sequences: list[DecodeSequence]
) -> tuple[dict[DecodeSequence, Exception], dict[DecodeSequence, list[int]]]:
    """Errors, and token ids of all."""
    errors: dict[DecodeSequence, Exception] = {}
    told: dict[DecodeSequence, list[int]] = {sequence: [] for sequence in sequences}
    decoder.join(*sequences)
    for _ in sequences:
        sequence = decoder.left.get(timeout=PATIENCE_S)
        decoder.arena.release(sequence.prefix[0].slots)
        decoder.arena.release(sequence.tail_slots)
    while not decoder.outputs.empty():
        output = decoder.outputs.get()
        if output.error:
            errors[output.sequence] = output.error
        elif output.token:
            told[output.sequence].append(output.token.token_id)
    return errors, told
