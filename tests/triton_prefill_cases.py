"""The whole prefill device beside the CPU's. test_triton_kernels.py runs this file as it does the others."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from decoders import PATIENCE_S, logits_of, poison_token, relative_error
from host_as_device import DEVICE, INTERPRETED, model_on_device, side_stream_is_late, stand_in
from prefilled import Prefilled, sequence_of

from hmad.compute import cuda_buffers, cuda_prefill, cuda_shipping
from hmad.compute.codecs import decode
from hmad.compute.cpu import CpuPrefill
from hmad.compute.cuda_memory import prefill_bytes
from hmad.compute.cuda_prefill import CudaPrefill
from hmad.compute.cuda_prefill_graphs import PrefillGraphs, Shape
from hmad.compute.device import EncodedBlocks, PackedChunks, PrefillChunk, PrefillSequence
from hmad.compute.loading import load_model
from hmad.compute.model import Qwen3
from hmad.compute.staging import StagingPool
from hmad.facts.errors import LocalError, NonFiniteKVError
from hmad.facts.formats import FORMATS, KVFormat, KVGeometry
from hmad.facts.sampling import SamplingParams

GEOMETRY = KVGeometry(3, 2, 64)
PAGE_BYTES = GEOMETRY.slot_bytes  # of one block: each is a frame of its own
NUM_PAGES = 200
VOCAB = 320
CLOSE = 1e-4  # of fp32: sums have another order
# So now and then a value falls on the other side where it is rounded: few do, and by no more than a format's step.
MOST_FALL = 0.02
STEP = 0.08  # of the largest value
LENGTHS = {"fp32": 9, "bf16": 3, "int8": 33, "fp8_e4m3": 5, "mxfp8": 2, "bfp8": 3}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN, in the interpreter


@pytest.fixture(autouse=True)
def host_as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory, num_layers=GEOMETRY.num_layers, head_dim=64, num_heads=4, num_kv_heads=2, vocab=VOCAB)
    return directory


def on_cpu(checkpoint: Path) -> Prefilled:
    staging = StagingPool(NUM_PAGES * PAGE_BYTES, PAGE_BYTES)
    return Prefilled(CpuPrefill(load_model(checkpoint, "fp32"), GEOMETRY, staging), staging)


def on_device(checkpoint: Path, max_batch_tokens: int = 256, blocks_per_page: int = 1) -> Prefilled:
    return prefilled_by(model_on_device(checkpoint), NUM_PAGES, blocks_per_page, max_batch_tokens)


def shipping(
    checkpoint: Path, num_pages: int = NUM_PAGES, blocks_per_page: int = 1, layers_at_once: int = 1
) -> Prefilled:
    """A device whose shipping is looked at. Where there is no GPU, the CPU's row kernels take the place of those in
    Triton's interpreter, which is much slower; what packs is Triton's.
    """
    model = load_model(checkpoint, "fp32") if INTERPRETED else model_on_device(checkpoint, "bf16")
    prefilled = prefilled_by(model, num_pages, blocks_per_page)
    prefilled.device._graphs.MOST_LAYERS = layers_at_once  # type: ignore[attr-defined]
    return prefilled


def exact(checkpoint: Path) -> Prefilled:
    """The same in float32 on a GPU, too."""
    return shipping(checkpoint) if INTERPRETED else on_device(checkpoint)


def prefilled_by(model: Qwen3, num_pages: int, blocks_per_page: int, max_batch_tokens: int = 256) -> Prefilled:
    page_bytes = blocks_per_page * PAGE_BYTES
    staging = StagingPool(num_pages * page_bytes, page_bytes, pinned=not INTERPRETED)
    return Prefilled(CudaPrefill(model, GEOMETRY, staging, max_batch_tokens), staging)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(6, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def values_of(prefilled: Prefilled, lengths: list[tuple[KVFormat | None, int]]) -> list[torch.Tensor]:
    """K and V of every layer and prompt, and each prompt's logits, out of one batch."""
    sequences = [sequence_of(prompt_of(length, length), fmt) for fmt, length in lengths]
    prefilled.clocks.clear()
    tokens = prefilled.run(*(PrefillChunk(sequence, sequence.num_remaining) for sequence in sequences))
    values = [logits_of(tokens[sequence][0]) for sequence in sequences]
    for sequence in sequences:
        if sequence.format is None:
            continue
        for layer_id in range(GEOMETRY.num_layers):
            raw = torch.from_numpy(prefilled.raw(sequence, layer_id))
            values += decode(sequence.format, raw, len(sequence.prompt_token_ids), 2, 64)
    assert [layer_id for clock in prefilled.clocks for layer_id in clock.layers] == list(range(GEOMETRY.num_layers))
    assert all(clock.started_s <= clock.kv_ready_s for clock in prefilled.clocks)
    assert prefilled.staging.free_pages == prefilled.staging.num_pages
    assert len(prefilled.blocks) == GEOMETRY.num_layers * sum(fmt.num_blocks(n) for fmt, n in lengths if fmt)
    prefilled.blocks.clear()
    return values


# Launched one by one, and captured; a page has room for one block, or for all layers of the shorter prompts.
@pytest.mark.parametrize(("max_batch_tokens", "blocks_per_page"), [(16, 1), (256, 5)])
def test_a_packed_batch_says_what_the_cpu_says(checkpoint: Path, max_batch_tokens: int, blocks_per_page: int) -> None:
    lengths = [*((FORMATS[name], length) for name, length in LENGTHS.items()), (None, 2), (FORMATS["int8"], 1)]
    expected = values_of(on_cpu(checkpoint), lengths)
    device = on_device(checkpoint, max_batch_tokens=max_batch_tokens, blocks_per_page=blocks_per_page)
    ours = values_of(device, lengths)
    names = ["fp32"] * len(lengths) + [fmt.name for fmt, _ in lengths if fmt for _ in range(2 * GEOMETRY.num_layers)]
    for name, a, b in zip(names, ours, expected, strict=True):
        if name == "fp32":
            assert relative_error(a, b) < CLOSE
        else:
            off = (a - b).abs() / b.abs().max()
            assert (off > CLOSE).sum() <= 2 + MOST_FALL * off.numel(), name
            assert off.max() < STEP, name


def test_chunks_of_a_cut_prompt_equal_one_pass(checkpoint: Path) -> None:
    """Between whole prompts, as the scheduler packs them."""
    prompt, fmt = prompt_of(29), FORMATS["fp32"]
    whole, cut = on_cpu(checkpoint), exact(checkpoint)
    alone = sequence_of(prompt, fmt)
    [expected] = whole.run(PrefillChunk(alone, 29))[alone]
    sequence, others = sequence_of(prompt, fmt), [sequence_of(prompt_of(3, seed), None) for seed in range(2)]
    sequence.history = cut.device.new_history(29)
    cut.run(PrefillChunk(others[0], 3), PrefillChunk(sequence, 16))
    cut.run(PrefillChunk(sequence, 8))
    tokens = cut.run(PrefillChunk(sequence, 5), PrefillChunk(others[1], 3))
    assert relative_error(logits_of(tokens[sequence][0]), logits_of(expected)) < CLOSE
    for layer_id in range(GEOMETRY.num_layers):
        raw = [torch.from_numpy(p.raw(s, layer_id)) for p, s in ((cut, sequence), (whole, alone))]
        for ours, theirs in zip(*(decode(fmt, blocks, 29, 2, 64) for blocks in raw), strict=True):
            assert relative_error(ours, theirs) < CLOSE


def test_first_tokens_of_several_choices_are_the_cpus(checkpoint: Path) -> None:
    drawn = []
    for prefilled in (on_cpu(checkpoint), exact(checkpoint)):
        choices = [
            (SamplingParams(max_tokens=8, temperature=1.0, top_k=50), (1, 2, 3)),
            (SamplingParams(max_tokens=8, temperature=0.9, repetition_penalty=1.5, presence_penalty=0.3), (4, 2**63)),
            (SamplingParams(max_tokens=8, forced_token_ids=(17,)), (6,)),
        ]
        sequences = [PrefillSequence(prompt_of(5 + row), *each, None) for row, each in enumerate(choices)]
        tokens = prefilled.run(*(PrefillChunk(sequence, sequence.num_remaining) for sequence in sequences))
        drawn.append([[token.token_id for token in tokens[sequence]] for sequence in sequences])
    assert drawn[0] == drawn[1]
    assert [len(each) for each in drawn[0]] == [3, 2, 1]
    assert drawn[0][2] == [17]


@pytest.mark.parametrize("layers_at_once", [1, 3])
def test_full_staging_holds_prefill_up_until_pages_come_back(checkpoint: Path, layers_at_once: int) -> None:
    fmt, prompt = FORMATS["fp32"], prompt_of(17)
    whole, held = shipping(checkpoint), shipping(checkpoint, num_pages=2, layers_at_once=layers_at_once)
    sequences = [sequence_of(prompt, fmt) for _ in range(2)]
    whole.run(PrefillChunk(sequences[0], 17))
    waiting: Queue[EncodedBlocks] = Queue()
    keep, held.keep = held.keep, waiting.put  # type: ignore[method-assign]
    thread = threading.Thread(target=held.run, args=[PrefillChunk(sequences[1], 17)], daemon=True)
    thread.start()
    num_frames = GEOMETRY.num_layers * fmt.num_blocks(17)
    for number in range(num_frames):
        if number < num_frames - 2:
            wait_until(lambda: held.staging.is_waited_for and waiting.qsize() == 2)
        keep(waiting.get(timeout=PATIENCE_S))
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert held.staging.free_pages == 2
    for layer_id in range(GEOMETRY.num_layers):
        assert (held.raw(sequences[1], layer_id) == whole.raw(sequences[0], layer_id)).all()


def test_layers_leave_when_they_fill_a_page(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page has room for two of the three layers: the first waits for the second, and both are gone before the third
    begins. What a longer prompt beside it fills a page with, it need not wait for."""
    prefilled = shipping(checkpoint, blocks_per_page=2)
    short, long = (sequence_of(prompt_of(length), FORMATS["int8"]) for length in (9, 33))  # one block, and two
    begins, num_shipped = cuda_shipping.Shipping.layers_begin, []

    def shipped() -> tuple[int, int]:
        owners = [sequence for sequence, _, _ in prefilled.blocks]
        return owners.count(short), owners.count(long)

    def watched(batch: cuda_shipping.Shipping) -> None:
        layer_id = len(num_shipped)
        wait_until(lambda: shipped() == (layer_id // 2 * 2, 2 * layer_id))
        num_shipped.append(shipped())
        begins(batch)

    monkeypatch.setattr(cuda_shipping.Shipping, "layers_begin", watched)
    prefilled.run(PrefillChunk(short, 9), PrefillChunk(long, 33))
    assert num_shipped == [(0, 0), (0, 2), (2, 4)]
    assert shipped() == (3, 6)
    assert prefilled.staging.free_pages == NUM_PAGES


def test_a_page_takes_so_many_layers_and_no_more(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled, frames = shipping(checkpoint, blocks_per_page=9), []
    keep = prefilled.keep

    def told(blocks: EncodedBlocks) -> None:
        frames.append((blocks.first_layer, blocks.num_layers))
        keep(blocks)

    monkeypatch.setattr(prefilled, "keep", told)
    for most, expected in ((cuda_shipping.MOST_LAYERS, [(0, 3)]), (2, [(0, 2), (2, 1)])):
        monkeypatch.setattr(cuda_shipping, "MOST_LAYERS", most)
        prefilled.run(PrefillChunk(sequence_of(prompt_of(9), FORMATS["int8"]), 9))
        assert frames == expected
        frames.clear()


@pytest.mark.parametrize("max_batch_tokens", [16, 256], ids=["launched", "captured"])
def test_however_late_it_is_packed_it_is_what_was_computed(
    checkpoint: Path, max_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The K and V of a layer stay until they are packed, whatever the compute stream goes on to."""
    model = load_model(checkpoint, "fp32") if INTERPRETED else model_on_device(checkpoint, "bf16")
    lengths: list[tuple[KVFormat | None, int]] = [(FORMATS["bf16"], 9), (FORMATS["int8"], 20)]
    expected = values_of(prefilled_by(model, NUM_PAGES, 1, max_batch_tokens), lengths)
    if INTERPRETED:
        side_stream_is_late(monkeypatch)
    else:
        pack = cuda_shipping.pack_blocks

        def pack_late(*arguments: Any) -> None:
            torch.cuda._sleep(10**7)  # cycles: milliseconds
            pack(*arguments)

        monkeypatch.setattr(cuda_shipping, "pack_blocks", pack_late)
    prefilled = prefilled_by(model, NUM_PAGES, 1, max_batch_tokens)
    prefilled.device._graphs.MOST_LAYERS = 1  # type: ignore[attr-defined]
    assert all(relative_error(a, b) < CLOSE for a, b in zip(values_of(prefilled, lengths), expected, strict=True))


@pytest.mark.parametrize("layers_at_once", [1, 3])
def test_pages_that_are_not_full_leave_when_there_are_no_more(checkpoint: Path, layers_at_once: int) -> None:
    """Three prompts whose three layers would fit into a page each, and two pages."""
    prefilled = shipping(checkpoint, num_pages=2, blocks_per_page=8, layers_at_once=layers_at_once)
    values_of(prefilled, [(FORMATS["int8"], length) for length in (3, 9, 5)])


@pytest.mark.parametrize("layers_at_once", [1, 3])
def test_layers_that_come_together_go_into_as_many_pages_as_they_need(
    checkpoint: Path, layers_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts of one block a page takes two of three layers, of longer ones one; and what is in them is the same."""
    lengths: list[tuple[KVFormat | None, int]] = [(FORMATS["int8"], 9), (FORMATS["bf16"], 30), (FORMATS["int8"], 64)]
    expected = values_of(shipping(checkpoint, blocks_per_page=64), lengths)
    prefilled, frames = shipping(checkpoint, blocks_per_page=2, layers_at_once=layers_at_once), []
    keep = prefilled.keep

    def told(blocks: EncodedBlocks) -> None:
        frames.append((len(blocks.sequence.prompt_token_ids), blocks.first_layer, blocks.num_layers))
        keep(blocks)

    monkeypatch.setattr(prefilled, "keep", told)
    assert all((a == b).all() for a, b in zip(values_of(prefilled, lengths), expected, strict=True))
    by_length = {length: [frame[1:] for frame in frames if frame[0] == length] for _, length in lengths}
    alone = [(0, 1), (1, 1), (2, 1)]
    assert by_length == {9: [(0, 2), (2, 1)], 30: alone, 64: alone}


def test_rows_beyond_the_batch_are_nobodys(checkpoint: Path) -> None:
    """Whatever the batch before has left there."""
    prefilled, lengths = shipping(checkpoint, layers_at_once=3), [(FORMATS["int8"], 3), (None, 9)]
    expected = values_of(prefilled, lengths)
    poison_token(prefilled.device.model, 5)  # type: ignore[attr-defined]
    bad = sequence_of([5] * 16, FORMATS["int8"])
    assert not prefilled.run(PrefillChunk(bad, 16))
    assert all((a == b).all() for a, b in zip(values_of(prefilled, lengths), expected, strict=True))


def test_attention_is_captured_for_whole_prompts_and_not_too_many(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is launched between pieces, or kernel by kernel, says the same."""
    prefilled, shapes = shipping(checkpoint, layers_at_once=3), []
    monkeypatch.setattr(PrefillGraphs, "MOST_PROMPTS", 3)
    shape_of = PrefillGraphs.shape_of

    def watched(graphs: PrefillGraphs, packed: PackedChunks) -> Shape | None:
        shapes.append(shape_of(graphs, packed))
        return shapes[-1]

    monkeypatch.setattr(PrefillGraphs, "shape_of", watched)
    lengths: list[tuple[KVFormat | None, int]] = [(FORMATS["int8"], length) for length in (3, 9, 5)]
    captured = values_of(prefilled, lengths)
    outside = values_of(prefilled, [*lengths, (None, 2)])
    prefilled.device._graphs.max_rows = 16  # type: ignore[attr-defined]
    launched = values_of(prefilled, lengths)
    assert shapes == [Shape(32, 3, True), Shape(32, 1, False), None]
    del outside[len(lengths)]  # the last one's logits
    close = CLOSE if INTERPRETED else 0.05  # a GPU computes in bf16 there, and other numbers of rows in another order
    for others in (outside, launched):
        assert all(relative_error(a, b) < close for a, b in zip(captured, others, strict=True))


@pytest.mark.parametrize("num_rows", [16, 17, 32])
def test_a_batch_as_large_as_may_be_is_captured(checkpoint: Path, num_rows: int) -> None:
    model = load_model(checkpoint, "fp32") if INTERPRETED else model_on_device(checkpoint, "bf16")
    graphs = prefilled_by(model, 1, 1, max_batch_tokens=num_rows).device._graphs  # type: ignore[attr-defined]
    sequences = [sequence_of(prompt_of(length), None) for length in (num_rows, graphs.max_rows + 1)]
    fits, exceeds = (graphs.shape_of(PackedChunks([PrefillChunk(s, s.num_remaining)])) for s in sequences)
    assert fits == Shape(graphs.max_rows, 3, True)
    assert exceeds is None
    assert graphs.max_rows == -(-num_rows // 16) * 16


@pytest.mark.parametrize("max_batch_tokens", [16, 100, 4096])
def test_room_that_graphs_take_is_reckoned_with(checkpoint: Path, max_batch_tokens: int) -> None:
    model = load_model(checkpoint, "fp32") if INTERPRETED else model_on_device(checkpoint, "bf16")
    graphs = PrefillGraphs(model, max_batch_tokens)
    rooms = (graphs._residual, graphs._hidden, graphs._attended, *graphs._products)
    assert 0 < sum(room.nbytes for room in rooms) <= prefill_bytes(model.config, max_batch_tokens, 0)["graphs"]


@pytest.mark.parametrize("max_batch_tokens", [16, 256], ids=["launched", "captured"])
def test_a_cut_prompt_without_a_history_is_refused(checkpoint: Path, max_batch_tokens: int) -> None:
    model = load_model(checkpoint, "fp32") if INTERPRETED else model_on_device(checkpoint, "bf16")
    prefilled = prefilled_by(model, NUM_PAGES, 1, max_batch_tokens)
    with pytest.raises(LocalError, match="without a history"):
        prefilled.run(PrefillChunk(sequence_of(prompt_of(40), FORMATS["int8"]), 32))
    assert prefilled.staging.free_pages == NUM_PAGES


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (28, {16: 7, 256: 7, 512: 4, 640: 2, 1024: 2, 1280: 1, 2048: 1}),
        (36, {16: 12, 192: 9, 256: 6, 512: 4, 640: 3, 1024: 2, 1280: 1, 2048: 1}),
        (40, {16: 10, 192: 10, 256: 8, 512: 4, 640: 2, 1024: 2, 1280: 1, 2048: 1}),
        (64, {16: 8, 256: 8, 512: 4, 640: 2, 1024: 2, 1280: 1, 2048: 1}),
        (67, {16: 1, 2048: 1}),
    ],
)
def test_pieces_have_as_many_layers_each_and_not_too_much_work(num_layers: int, expected: dict[int, int]) -> None:
    graphs = PrefillGraphs.__new__(PrefillGraphs)
    graphs._model = SimpleNamespace(config=SimpleNamespace(num_layers=num_layers))  # type: ignore[assignment]
    assert {rows: graphs._shape(rows, attends=True).layers_of_a_piece for rows in expected} == expected
    assert {graphs._shape(rows, attends=False).layers_of_a_piece for rows in expected} == {1}


def test_layers_are_told_of_though_no_page_is_full(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watches over progress hears of two layers before the third begins."""
    prefilled, num_told = shipping(checkpoint, blocks_per_page=8), []
    begins = cuda_shipping.Shipping.layers_begin
    monkeypatch.setattr(cuda_shipping, "LAYER_ROWS_TOLD", 2 * 9)

    def watched(batch: cuda_shipping.Shipping) -> None:
        wait_until(lambda: len(prefilled.clocks) == len(num_told) // 2 * 2)
        num_told.append(len(prefilled.clocks))
        begins(batch)

    monkeypatch.setattr(cuda_shipping.Shipping, "layers_begin", watched)
    prefilled.run(PrefillChunk(sequence_of(prompt_of(9), FORMATS["int8"]), 9))
    assert num_told == [0, 0, 2]
    assert [clock.layers for clock in prefilled.clocks] == [range(n, n + 1) for n in range(3)]


def test_what_is_fetched_comes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    page_of, pages = cuda_buffers.pinned_page, []

    def watched(num_bytes: int) -> torch.Tensor:
        pages.append(page_of(num_bytes))
        return pages[-1]

    monkeypatch.setattr(cuda_buffers, "pinned_page", watched)
    tensors = [torch.arange(3, device=DEVICE), torch.full((2, 2), 0.5, device=DEVICE)]
    fetched = cuda_buffers.fetched(*tensors)
    assert [values.tolist() for values in fetched] == [[0, 1, 2], [[0.5, 0.5], [0.5, 0.5]]]
    assert all(np.shares_memory(values, page.numpy()) for values, page in zip(fetched, pages, strict=True))


def test_what_the_device_cannot_do_fails_the_batch_and_keeps_no_page(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled = shipping(checkpoint)

    wait = torch.cuda.Event.synchronize

    def broken(event: torch.cuda.Event) -> None:
        if threading.current_thread().name == "shipper":
            raise RuntimeError("the device broke")
        wait(event)

    monkeypatch.setattr(torch.cuda.Event, "synchronize", broken)
    with pytest.raises(RuntimeError, match="the device broke"):
        prefilled.run(PrefillChunk(sequence_of(prompt_of(9), FORMATS["int8"]), 9))
    assert prefilled.staging.free_pages == NUM_PAGES
    assert not prefilled.blocks


# The first copy brings the batch to the device.
@pytest.mark.parametrize(
    ("launch", "number"), [("pack_blocks", 4), ("copy_", 1), ("copy_", 2), ("copy_", 3), ("copy_", 4)]
)
def test_what_cannot_be_launched_fails_the_batch_and_keeps_no_page(
    checkpoint: Path, launch: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled, num_launched = shipping(checkpoint, blocks_per_page=8), 0
    owner = cuda_shipping if launch == "pack_blocks" else torch.Tensor
    does: Callable[..., object] = getattr(owner, launch)

    def launched(*arguments: Any, **options: Any) -> object:
        nonlocal num_launched
        num_launched += launch == "pack_blocks" or options.get("non_blocking", False)
        if num_launched == number:
            raise RuntimeError("no launch")
        return does(*arguments, **options)

    monkeypatch.setattr(owner, launch, launched)
    sequences = [sequence_of(prompt_of(9), FORMATS[name]) for name in ("int8", "bf16")]
    with pytest.raises(RuntimeError, match="no launch"):
        prefilled.run(*(PrefillChunk(sequence, 9) for sequence in sequences))
    assert len(prefilled.blocks) < number
    assert prefilled.staging.free_pages == NUM_PAGES
    assert all(thread.name != "shipper" for thread in threading.enumerate())


def test_the_last_page_leaves_before_the_first_token_is_drawn(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled, sample, num_shipped = shipping(checkpoint, blocks_per_page=8), cuda_prefill.sample_once, []

    def watched(*arguments: Any) -> Any:
        wait_until(lambda: len(prefilled.blocks) == GEOMETRY.num_layers)
        num_shipped.append(len(prefilled.blocks))
        return sample(*arguments)

    monkeypatch.setattr(cuda_prefill, "sample_once", watched)
    prefilled.run(PrefillChunk(sequence_of(prompt_of(9), FORMATS["int8"]), 9))
    assert num_shipped == [GEOMETRY.num_layers]


@pytest.mark.parametrize("max_batch_tokens", [16, 256], ids=["launched", "captured"])
def test_a_batch_waits_for_the_device_by_events_alone(
    checkpoint: Path, max_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy to the host that waits inside the driver holds up all other threads, shipping among them."""
    model = load_model(checkpoint, "fp32") if INTERPRETED else model_on_device(checkpoint, "bf16")
    prefilled, begun = prefilled_by(model, NUM_PAGES, 1, max_batch_tokens), []
    begins = cuda_shipping.Shipping.layers_begin
    waits: dict[str, Callable[..., object]] = {name: getattr(torch.Tensor, name) for name in ("cpu", "item", "to")}

    def watched(shipping: cuda_shipping.Shipping) -> None:
        begun.append(True)  # before, there is nothing to wait for
        begins(shipping)

    def waiting(name: str) -> Callable[..., object]:
        def wait(tensor: torch.Tensor, *arguments: Any, **options: Any) -> object:
            assert not begun or options.get("non_blocking"), name
            return waits[name](tensor, *arguments, **options)

        return wait

    monkeypatch.setattr(cuda_shipping.Shipping, "layers_begin", watched)
    for name in waits:
        monkeypatch.setattr(torch.Tensor, name, waiting(name))
    sequence = sequence_of(prompt_of(20), FORMATS["int8"])
    assert prefilled.run(PrefillChunk(sequence, 20))[sequence]


def test_a_cancelled_prompt_ships_no_more_and_keeps_no_page(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled, acquired = shipping(checkpoint, blocks_per_page=2), []
    acquire = prefilled.staging.acquire
    monkeypatch.setattr(prefilled.staging, "acquire", lambda: acquired.append(True) or acquire())
    gone, good = (sequence_of(prompt_of(length), FORMATS["int8"]) for length in (9, 12))
    begins, num_begun = cuda_shipping.Shipping.layers_begin, iter(range(3))

    def watched(batch: cuda_shipping.Shipping) -> None:
        gone.cancelled = next(num_begun) > 0  # its page has room for another layer
        begins(batch)

    monkeypatch.setattr(cuda_shipping.Shipping, "layers_begin", watched)
    tokens = prefilled.run(PrefillChunk(gone, 9), PrefillChunk(good, 12))
    assert {sequence for sequence, _, _ in prefilled.blocks} == {good}
    assert len(prefilled.blocks) == GEOMETRY.num_layers
    assert good in tokens
    assert len(acquired) == 1 + 2  # two layers a page
    assert prefilled.staging.free_pages == NUM_PAGES


def test_a_row_that_cannot_be_stored_is_named_among_layers_that_come_together(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled, pack = shipping(checkpoint, blocks_per_page=9, layers_at_once=3), cuda_shipping.pack_blocks
    good, bad = sequence_of(prompt_of(3), FORMATS["fp32"]), sequence_of(prompt_of(24), FORMATS["fp32"])

    def marking(*arguments: Any) -> None:
        pack(*arguments)
        arguments[-1][32 + 3 + 19] = 1  # of layer 1, of 32 rows each

    monkeypatch.setattr(cuda_shipping, "pack_blocks", marking)
    assert list(prefilled.run(PrefillChunk(good, 3), PrefillChunk(bad, 24))) == [good]
    assert isinstance(bad.error, NonFiniteKVError)
    assert "of layer 1 at position 19" in str(bad.error)
    assert {sequence for sequence, _, _ in prefilled.blocks} == {good}
    assert prefilled.staging.free_pages == NUM_PAGES


@pytest.mark.parametrize(("num_pages", "blocks_per_page"), [(NUM_PAGES, 9), (2, 9), (2, 1)])
def test_a_row_that_cannot_be_stored_is_named(
    checkpoint: Path, num_pages: int, blocks_per_page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 19 of the second chunk, in the second layer, in a page by itself and among others."""
    prefilled = shipping(checkpoint, num_pages=num_pages, blocks_per_page=blocks_per_page)
    good, bad = sequence_of(prompt_of(3), FORMATS["fp32"]), sequence_of(prompt_of(56), FORMATS["fp32"])
    bad.history = prefilled.device.new_history(56)
    prefilled.run(PrefillChunk(bad, 32))
    pack, layers = cuda_shipping.pack_blocks, []

    def marking(*arguments: Any) -> None:
        pack(*arguments)
        layers.append(len(layers))
        if layers[-1] == 1:
            arguments[-1][3 + 19] = 1

    monkeypatch.setattr(cuda_shipping, "pack_blocks", marking)
    tokens = prefilled.run(PrefillChunk(good, 3), PrefillChunk(bad, 24))
    assert isinstance(bad.error, NonFiniteKVError)
    assert "of layer 1 at position 51" in str(bad.error)
    assert (bad, 1, 6) not in prefilled.blocks
    assert list(tokens) == [good]
    assert {layer_id for sequence, layer_id, _ in prefilled.blocks if sequence is good} == {0, 1, 2}
    assert prefilled.staging.free_pages == num_pages


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_nan_fails_its_own_sequence_alone(checkpoint: Path) -> None:
    prefilled = exact(checkpoint)
    poison_token(prefilled.device.model, 5)  # type: ignore[attr-defined]
    bad, good = sequence_of([9, 5, 9], FORMATS["int8"]), sequence_of([9, 8, 9], FORMATS["int8"])
    tokens = prefilled.run(PrefillChunk(bad, 3), PrefillChunk(good, 3))
    assert isinstance(bad.error, NonFiniteKVError)
    assert "of layer 0 at position 1" in str(bad.error)
    assert good.error is None
    assert set(tokens) == {good}
    assert prefilled.staging.free_pages == NUM_PAGES
    assert {sequence for sequence, _, _ in prefilled.blocks} == {good}
