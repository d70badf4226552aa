"""The arena, and the promise that nothing but raw bytes is ever kept in it or beside it."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hmad.compute.arena import Arena, ArenaFull, free_runs
from hmad.compute.batch import DecodeBatch
from hmad.compute.cpu import CpuDecode, CpuPrefill
from hmad.compute.device import EncodedBlocks, PrefillChunk, PrefillObserver, PrefillSequence
from hmad.compute.landing import HostLane
from hmad.compute.loading import load_model
from hmad.compute.model import Qwen3
from hmad.compute.sequence import DecodeSequence, Segment
from hmad.compute.staging import StagingPool
from hmad.facts.errors import ConfigError, LocalError
from hmad.facts.formats import FORMATS, KVFormat, KVGeometry
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad.roles.scheduler import slots_needed

GEOMETRY = KVGeometry(num_layers=2, num_kv_heads=2, head_dim=64)
PROMPT = tuple(range(70))  # whole blocks and a partial one in every format
FORCED = tuple(range(200, 208))
TAIL = FORMATS["fp32"]
TOKENS_PER_BLOCK = {"fp32": 8, "bf16": 16, "int8": 32, "fp8_e4m3": 32, "mxfp8": 32, "bfp8": 32}


def arena_of(num_slots: int) -> Arena:
    return Arena(GEOMETRY, num_slots * GEOMETRY.num_layers * GEOMETRY.slot_bytes)


# --- deferred dequantization ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen3:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, num_layers=GEOMETRY.num_layers, num_kv_heads=2, head_dim=GEOMETRY.head_dim)
    return load_model(Path(directory), "fp32")


class Decoding:
    """One sequence over an arena that its prompt's raw blocks have landed in, as the wire would bring them."""

    def __init__(self, model: Qwen3, fmt: KVFormat, params: SamplingParams) -> None:
        self.arena = arena_of(64)
        self.arena.bytes.random_(256)  # whatever was here before must not matter
        self.slots = self.arena.reserve(fmt.num_blocks(len(PROMPT)))
        self.device = CpuDecode(model, self.arena, TAIL, num_threads=2)
        first_token = self._prefill(model, fmt, params)
        tail = self.arena.reserve(TAIL.num_blocks(params.max_tokens - 1))
        prefix = (Segment(fmt, len(PROMPT), self.slots),)
        prompt = np.array(PROMPT, np.uint32)
        self.batch = DecodeBatch([DecodeSequence(prompt, params, 1, prefix, TAIL, tail, [first_token])])

    def _prefill(self, model: Qwen3, fmt: KVFormat, params: SamplingParams) -> int:
        staging = StagingPool(1 << 20, GEOMETRY.block_bytes(fmt))

        def land(blocks: EncodedBlocks) -> None:
            slots = self.slots[blocks.first_block : blocks.first_block + blocks.num_blocks]
            views = HostLane(self.arena).place(
                range(blocks.first_layer, blocks.first_layer + blocks.num_layers), slots, fmt, 0, GEOMETRY.num_kv_heads
            )
            copy_into(views, blocks.payload)
            staging.release(blocks.page)

        sequence = PrefillSequence(PROMPT, params, (1,), fmt)
        observer = PrefillObserver(land, lambda clock: None)
        result = CpuPrefill(model, GEOMETRY, staging).prefill([PrefillChunk(sequence, len(PROMPT))], observer)
        [first] = result.first_tokens[sequence]
        return first.token_id

    def step(self) -> SampledToken:
        [token] = self.device.launch(self.batch)()
        assert isinstance(token, SampledToken)
        self.batch.sequences[0].output_token_ids.append(token.token_id)
        self.batch.advance()
        return token


def copy_into(views: Sequence[memoryview], payload: np.ndarray) -> None:
    start = 0
    for view in views:
        view[:] = payload[start : start + len(view)].data
        start += len(view)
    assert start == len(payload)


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_decoded_survives_a_step(model: Qwen3, name: str) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, want_logits=True)
    undisturbed = Decoding(model, FORMATS[name], params)
    expected = [undisturbed.step() for _ in range(5)]
    poisoned = Decoding(model, FORMATS[name], params)
    for token in expected:
        poisoned.device.scratch.fill_(float("nan"))
        assert poisoned.step() == token


@pytest.mark.parametrize("layer_id", range(GEOMETRY.num_layers))
@pytest.mark.parametrize("name", FORMATS)
def test_every_step_reads_the_raw_bytes(model: Qwen3, name: str, layer_id: int) -> None:
    """One flipped byte of the landed KV, after some steps have read it, changes what the next step says."""
    params = SamplingParams(max_tokens=6, forced_token_ids=FORCED, want_logits=True)
    sound, damaged = (Decoding(model, FORMATS[name], params) for _ in range(2))
    assert [sound.step() for _ in range(2)] == [damaged.step() for _ in range(2)]
    value = FORMATS[name].panel_bytes(GEOMETRY.head_dim) + {"bfp8": 64}.get(name, 0) + 3  # V of head 0, past exponents
    damaged.arena.layer(layer_id)[int(damaged.slots[1]), value] ^= 0x80  # the sign, in every format
    assert sound.step().logits != damaged.step().logits


# --- the memory promise ---


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 32, 33, 600])
def test_cached_tokens_cost_their_blocks_rounded_up(name: str, num_tokens: int) -> None:
    fmt, params = FORMATS[name], SamplingParams(max_tokens=18)
    blocks = -(-num_tokens // TOKENS_PER_BLOCK[name])
    assert slots_needed(fmt, FORMATS["bf16"], num_tokens, params, num_choices=3) == blocks + 3 * 2
    assert slots_needed(fmt, FORMATS["fp32"], num_tokens, params, num_choices=1) == blocks + 3


@pytest.mark.parametrize("name", FORMATS)
@given(num_kv_heads=st.integers(1, 16), head_dim=st.sampled_from([64, 96, 128, 256]))
def test_a_slot_holds_a_block_of_any_format(name: str, num_kv_heads: int, head_dim: int) -> None:
    geometry = KVGeometry(1, num_kv_heads, head_dim)
    block_bytes = geometry.block_bytes(FORMATS[name])
    assert block_bytes <= geometry.slot_bytes < 2 * num_kv_heads * 34 * head_dim + 256
    assert geometry.slot_bytes % 256 == 0


def test_arena_takes_no_more_than_its_bytes() -> None:
    slot_bytes = GEOMETRY.num_layers * GEOMETRY.slot_bytes
    assert Arena(GEOMETRY, 5 * slot_bytes - 1).bytes.nbytes == 4 * slot_bytes
    with pytest.raises(ConfigError, match="less than one slot"):
        Arena(GEOMETRY, slot_bytes - 1)


# --- the allocator ---


class Owners(RuleBasedStateMachine):
    """Any order of reserve, retain and release, against a plain list of who owns what."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = arena_of(24)
        self.owned: list[np.ndarray] = []

    @rule(num_slots=st.integers(0, 26))
    def reserve(self, num_slots: int) -> None:
        free = self._free()
        if num_slots > len(free):
            with pytest.raises(ArenaFull):
                self.arena.reserve(num_slots)
            return
        slots = self.arena.reserve(num_slots)
        assert slots.dtype == np.int32
        assert len(set(slots.tolist())) == num_slots
        assert set(slots.tolist()) <= set(free.tolist())
        assert num_runs(slots) == fewest_runs(free, num_slots)
        self.owned.append(slots)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        slots = data.draw(st.sampled_from(self.owned))
        self.arena.retain(slots)
        self.owned.append(slots)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.arena.release(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @rule(slot=st.integers(0, 23))
    def free_slots_have_no_owner_to_lose(self, slot: int) -> None:
        if slot in self._free():
            for change in (self.arena.retain, self.arena.release):
                with pytest.raises(LocalError, match="nobody owns"):
                    change(np.array([slot], np.int32))

    @invariant()
    def counts_are_those_of_the_owners(self) -> None:
        self.arena.check_integrity(self.owned)
        assert self.arena.free_slots == len(self._free())
        assert self.arena.used_slots + self.arena.free_slots == self.arena.num_slots

    @invariant()
    def a_forgotten_owner_is_noticed(self) -> None:
        if any(slots.size for slots in self.owned):
            *others, last = sorted(self.owned, key=len)
            for wrong in (others, [*self.owned, last]):
                with pytest.raises(LocalError, match="reference count"):
                    self.arena.check_integrity(wrong)

    def _free(self) -> np.ndarray:
        used = {int(slot) for slots in self.owned for slot in slots}
        return np.array([slot for slot in range(24) if slot not in used], np.int32)


Owners.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_owners = Owners.TestCase


def num_runs(slots: np.ndarray) -> int:
    """Pieces that a landing in these slots, in this order, is cut into."""
    return sum(after != before + 1 for before, after in pairwise(slots.tolist())) + bool(slots.size)


def fewest_runs(free: np.ndarray, num_slots: int) -> int:
    """As few as the free runs allow: take the longest first."""
    lengths = sorted((len(run) for run in free_runs(free)), reverse=True)
    return next(count for count in range(len(lengths) + 1) if sum(lengths[:count]) >= num_slots)


def test_best_fit_spares_the_long_run() -> None:
    arena = arena_of(12)
    arena.reserve(12)
    arena.release(np.r_[0:6, 8:11].astype(np.int32))
    assert arena.reserve(3).tolist() == [8, 9, 10]
    assert arena.reserve(4).tolist() == [0, 1, 2, 3]


# --- landing ---


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    heads=st.sampled_from([(0, 4), (0, 1), (1, 2), (3, 1), (2, 2)]),
    layers=st.sampled_from([range(1), range(1, 2), range(2)]),
    slots=st.permutations(range(9)).flatmap(lambda order: st.integers(1, 9).map(lambda count: order[:count])),
)
def test_landing_is_exactly_the_blocks_heads(
    name: str, heads: tuple[int, int], layers: range, slots: list[int]
) -> None:
    """The views take a payload in wire order: layer after layer, block after block, the bytes of these heads."""
    geometry, (first_head, num_heads) = KVGeometry(2, 4, 64), heads
    arena = Arena(geometry, 9 * 2 * geometry.slot_bytes)
    arena.bytes.zero_()
    panel_bytes = {"int8": 2176, "fp8_e4m3": 2176, "mxfp8": 2112, "bfp8": 2176}.get(name, 2048)
    start, size = 2 * panel_bytes * first_head, 2 * panel_bytes * num_heads
    payload = np.random.default_rng(0).integers(1, 256, (len(layers), len(slots), size), dtype=np.uint8)
    copy_into(
        HostLane(arena).place(layers, np.array(slots, np.int32), FORMATS[name], first_head, num_heads),
        payload.reshape(-1),
    )
    expected = np.zeros((2, 9, geometry.slot_bytes), np.uint8)
    for layer_id, each in zip(layers, payload, strict=True):
        expected[layer_id, slots, start : start + size] = each
    assert np.array_equal(arena.bytes.numpy(), expected)


def test_landing_joins_what_touches() -> None:
    """Slots as large as their blocks and in one run are one receive."""
    geometry = KVGeometry(1, 2, 128)  # bfp8 fills its slot
    arena = Arena(geometry, 8 * geometry.slot_bytes)
    slots = np.array([2, 3, 4, 6], np.int32)
    sizes = [len(view) for view in HostLane(arena).place(range(1), slots, FORMATS["bfp8"], 0, 2)]
    assert sizes == [3 * geometry.slot_bytes, geometry.slot_bytes]
