"""Triton attention beside its reference twin. test_triton_kernels.py runs this file as it does the others."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernels import NUM_KV_HEADS, Segments, every_format, paged
from torch import Tensor

from hmad.compute.codecs import decode, encode
from hmad.facts.formats import FORMATS, KVFormat
from hmad_kernels import triton_attention
from hmad_kernels.triton_attention import (
    Tuning,
    paged_decode_attention,
    paged_decode_attention_reference,
    partial_shapes,
    programs_at_once,
)
from hmad_kernels.triton_plan import split_items

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
QUANTIZED = ("int8", "fp8_e4m3", "mxfp8", "bfp8")
FLOAT_ERROR = 1e-5  # of float32 operands; relative, over all results
# Operands of 11 bits (float16), or of 8 (bfloat16, on a GPU only: the interpreter computes in float32).
OPERAND_ERROR = {"fp32": FLOAT_ERROR, "bf16": FLOAT_ERROR if DEVICE == "cpu" else 8e-3} | dict.fromkeys(QUANTIZED, 1e-3)
numpy_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN and overflow, in the interpreter
head_dims = pytest.mark.parametrize("head_dim", [64, 128])


@dataclass
class Case:
    """One attention launch. Scratch and result begin as NaN, and every byte that belongs to no token is 0xFF."""

    sequences: list[Segments]
    head_dim: int = 64
    group: int = 4
    dtype: torch.dtype = torch.float32
    item_tokens: int = 128  # more than a step of the kernels' loops
    spare_items: int = 0
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        case = paged(self.sequences, self.head_dim, self.group, self.dtype)
        self.q, self.slots, self.block_table = (x.to(DEVICE) for x in (case.q, case.slots, case.block_table))
        self.seq_segments, self.segments = case.seq_segments, case.segments
        self.sm_scale = case.sm_scale

    def run(self) -> Tensor:
        used = {name for sequence in self.sequences for name, _ in sequence}
        formats = sorted(used, reverse=len(used) > 2)  # any order
        segments = self.seq_segments.numpy(), self.segments.numpy(), self.block_table.cpu().numpy(), formats
        capacity = int(split_items(*segments, self.item_tokens).num_items.sum()) + self.spare_items
        plan = split_items(*segments, self.item_tokens, capacity)
        for items, number in zip(plan.items, plan.num_items, strict=True):
            items[number:] = 1 << 30  # nobody may look there
        out = torch.full_like(self.q, float("nan"), memory_format=torch.contiguous_format)
        scratch = [
            torch.full(shape, float("nan"), device=DEVICE)
            for shape in partial_shapes(capacity, self.q.shape[1], self.head_dim)
        ]
        paged_decode_attention(
            self.q, self.slots, torch.from_numpy(plan.items).to(DEVICE),
            torch.from_numpy(plan.num_items).to(DEVICE), torch.from_numpy(plan.seq_items).to(DEVICE),
            self.block_table, out, *scratch, self.sm_scale, NUM_KV_HEADS,
            formats, self.tuning,
        )  # fmt: skip
        return out.cpu()

    def reference(self) -> Tensor:
        def read(name: str, blocks: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
            return decode(FORMATS[name], blocks, num_tokens, NUM_KV_HEADS, self.head_dim)

        return paged_decode_attention_reference(
            self.q.cpu(), self.slots.cpu(), self.seq_segments, self.segments, self.block_table.cpu(),
            self.sm_scale, NUM_KV_HEADS, read,
        )  # fmt: skip

    def error(self) -> float:
        expected = self.reference()
        return ((self.run() - expected).norm() / expected.norm()).item()


@every_format
@head_dims
def test_attention_equals_float64_over_the_decoded_values(fmt: KVFormat, head_dim: int) -> None:
    # Blocks past powers of two; items and steps that end in the middle.
    lengths = (1, 33, 65, 130) if head_dim == 64 else (33, 130)
    assert Case([[(fmt.name, n)] for n in lengths], head_dim).error() < OPERAND_ERROR[fmt.name]


@every_format
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_blocks_past_a_power_of_two(fmt: KVFormat, num_blocks: int) -> None:
    """The last of them is not full."""
    num_tokens = 128 + num_blocks * fmt.tokens_per_block - 3
    assert Case([[(fmt.name, num_tokens)]], group=1).error() < OPERAND_ERROR[fmt.name]


@every_format
@pytest.mark.parametrize("group", range(1, 9))
def test_query_heads_share_a_kv_head(fmt: KVFormat, group: int) -> None:
    assert Case([[(fmt.name, 40)]], group=group).error() < OPERAND_ERROR[fmt.name]


@pytest.mark.parametrize("raw", QUANTIZED)
@pytest.mark.parametrize("k_width", [2, 4])
@pytest.mark.parametrize("query_rows", [8, 16])
@head_dims
def test_operands_in_any_layout(
    monkeypatch: pytest.MonkeyPatch, raw: str, k_width: int, query_rows: int, head_dim: int
) -> None:
    monkeypatch.setattr(triton_attention, "K_WIDTH", k_width)
    case = Case([[(raw, 40)]], head_dim, tuning=Tuning(32, 1, 1, query_rows=query_rows))
    assert case.error() < OPERAND_ERROR[raw]


SEGMENTS = st.lists(st.tuples(st.sampled_from(list(FORMATS)), st.integers(1, 70)), min_size=1, max_size=3)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(SEGMENTS, min_size=1, max_size=3), st.sampled_from([32, 96, 128]), st.integers(0, 3))
def test_segments_of_any_formats_mix(sequences: list[Segments], item_tokens: int, spare_items: int) -> None:
    """Raw prefixes without a tail, tails without a prefix, and all between, in items of any size."""
    case = Case(sequences, item_tokens=item_tokens, spare_items=spare_items)
    assert case.error() < max(OPERAND_ERROR.values())


@pytest.mark.parametrize("many_items", [17, 18], ids=["four warps", "one warp"])
def test_more_items_than_a_warp_of_the_merge_reads_at_once(monkeypatch: pytest.MonkeyPatch, many_items: int) -> None:
    monkeypatch.setattr(triton_attention, "MANY_ITEMS", many_items)
    case = Case([[("int8", 16 * 32 + 1)]], group=1, item_tokens=32)
    assert case.error() < OPERAND_ERROR["int8"]


def test_bfloat16_queries_and_results() -> None:
    mixed: Segments = [("bfp8", 45), ("bf16", 19)]
    assert Case([mixed, [("bf16", 1)]], dtype=torch.bfloat16).error() < 8e-3


def test_queries_may_be_a_part_of_a_projection() -> None:
    case = Case([[("bfp8", 40)], [("bf16", 20)], [("int8", 33)]])
    expected = case.run()
    num_heads = case.q.shape[1]
    product = torch.full((3, num_heads + 2 * NUM_KV_HEADS, 64), float("nan"), device=DEVICE)
    product[:, :num_heads] = case.q
    case.q = product[:, :num_heads]
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("name", list(FORMATS))
def test_large_scores_do_not_overflow(name: str) -> None:
    case = Case([[(name, 100)]])
    case.q *= 500
    assert case.run().isfinite().all()
    assert case.error() < 2e-2


@pytest.mark.parametrize("raw", QUANTIZED)
@pytest.mark.parametrize("binades", [-100, -40, 40, 100])
def test_values_far_from_one_keep_their_precision(raw: str, binades: int) -> None:
    """Float16 operands hold five binades; scales must carry the rest, of values that differ from token to token."""
    case = Case([[(raw, 70)]])
    generator = torch.Generator().manual_seed(binades)
    k = torch.randn(70, NUM_KV_HEADS, 64, generator=generator)
    steps = torch.arange(70).fmod(7).view(-1, 1, 1) - 3.0
    v = torch.randn(70, NUM_KV_HEADS, 64, generator=generator) * (binades + 5 * steps).exp2()
    blocks = encode(FORMATS[raw], k, v).to(DEVICE)
    case.slots[case.block_table.long(), : blocks.shape[1]] = blocks
    assert case.error() < OPERAND_ERROR[raw]


@pytest.mark.parametrize("raw", QUANTIZED)
def test_one_token_returns_its_v(raw: str) -> None:
    """Whatever its bytes: E4M3 subnormals, magnitudes that are not normalised, scales at either end."""
    case = Case([[(raw, 1)]], group=1)
    size = FORMATS[raw].panel_bytes(64)
    slot = case.slots[int(case.block_table[0])]
    rng = np.random.default_rng(1)
    for scale_byte in (12, 100, 127, 200, 246):
        slot[: 4 * size] = 0  # K: every score is 0
        for head in range(NUM_KV_HEADS):
            v = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8) & 0xBF)
            if raw == "mxfp8":
                v[32 * 64 :] = scale_byte
            elif raw == "bfp8":
                v.view(2, 1088)[:, :64] = scale_byte
            else:
                v[32 * 64 :] = torch.tensor([2.0 ** (scale_byte - 126)]).view(torch.uint8).repeat(32)
            slot[(2 * head + 1) * size : (2 * head + 2) * size] = v.to(DEVICE)
        assert torch.allclose(case.run().double(), case.reference(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("raw", [*QUANTIZED, "bf16", "fp32"])
def test_every_byte_of_the_cache_matters(raw: str) -> None:
    case = Case([[(raw, FORMATS[raw].tokens_per_block)]], group=1)
    before = case.run()
    slot = case.slots[int(case.block_table[0])]
    size = FORMATS[raw].panel_bytes(64)
    for position in (3, size - 1 if raw in ("int8", "fp8_e4m3") else size - 70, size + 3):
        slot[position] ^= 0x44
        assert not torch.equal(case.run(), before)
        slot[position] ^= 0x44
    assert torch.equal(case.run(), before)


@numpy_warns
@pytest.mark.parametrize("panel", [0, 1], ids=["k", "v"])
def test_a_nan_in_the_cache_stays_visible(panel: int) -> None:
    case = Case([[("bf16", 40)]])
    slot = case.slots[int(case.block_table[1])].view(torch.bfloat16)
    slot[panel * 16 * 64 + 5] = float("nan")
    out = case.run()
    assert not out[0, :4].isfinite().all()
    assert out[0, 4:].isfinite().all()


@pytest.mark.parametrize(
    ("num_registers", "shared_bytes", "num_warps", "programs"),
    [(164, 0, 1, 12), (186, 1024, 1, 8), (255, 0, 1, 8), (112, 98304, 4, 2), (112, 0, 4, 4), (255, 0, 16, 1)],
)
def test_programs_that_fit(num_registers: int, shared_bytes: int, num_warps: int, programs: int) -> None:
    """On a Hopper GPU: 65,536 registers, 228 KiB of shared memory."""
    assert programs_at_once(num_registers, shared_bytes, num_warps, 228 << 10) == programs


@numpy_warns
def test_attention_refuses_what_does_not_fit() -> None:
    def launch(
        head_dim: int = 64,
        num_heads: int = 4,
        slot_bytes: int = 17408,
        formats: Sequence[str] = ("bfp8",),
        tuning: Tuning | None = None,
        **changes: Tensor,
    ) -> None:
        q = torch.zeros(1, num_heads, head_dim, device=DEVICE)
        scratch = [torch.zeros(shape, device=DEVICE) for shape in partial_shapes(1, num_heads, head_dim)]
        tensors = {
            "q": q, "slots": torch.zeros(1, slot_bytes, dtype=torch.uint8, device=DEVICE),
            "items": torch.zeros(1, 1, 8, dtype=torch.int32, device=DEVICE),
            "num_items": torch.zeros(1, dtype=torch.int32, device=DEVICE),
            "seq_items": torch.zeros(2, dtype=torch.int32, device=DEVICE),
            "block_table": torch.zeros(1, dtype=torch.int32, device=DEVICE), "out": q.clone(),
            "partial_values": scratch[0], "partial_stats": scratch[1],
        }  # fmt: skip
        paged_decode_attention(**(tensors | changes), sm_scale=1.0, num_kv_heads=2, formats=formats, tuning=tuning)

    launch()
    with pytest.raises(ValueError, match="formats names none"):
        launch(formats=())
    with pytest.raises(ValueError, match="head_dim must be one of"):
        launch(head_dim=96)
    with pytest.raises(ValueError, match="1 to 8 query heads, but 5 share 2"):
        launch(num_heads=5)
    with pytest.raises(ValueError, match="a block of 8704 bytes does not fit into a slot of 8448"):
        launch(slot_bytes=8448)
    with pytest.raises(ValueError, match=r"q and out must both be .* and bfloat16"):
        launch(out=torch.zeros(1, 4, 64, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(ValueError, match=r"items must be contiguous int32 \[1, -1, 8\]"):
        launch(items=torch.zeros(2, 1, 8, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match=r"num_items must be contiguous int32 \[1\]"):
        launch(num_items=torch.zeros(2, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match="bfp8: a step of 256 tokens is of more than 4 blocks"):
        launch(tuning=Tuning(256, 1, 1))
    with pytest.raises(ValueError, match=r"partial_stats must be float32 \[1, 4, 2\]"):
        launch(partial_stats=torch.zeros(1, 4, 3, device=DEVICE))
    with pytest.raises(
        ValueError, match=r"heads of q must be contiguous .* not float32 \[1, 4, 64\], strides \(256, 1, 4"
    ):
        launch(q=torch.zeros(1, 64, 4, device=DEVICE).mT)
    with pytest.raises(ValueError, match=r"rows aligned to 16 bytes, not .* strides \(258, 64, 1\)"):
        launch(q=torch.zeros(258, device=DEVICE).as_strided((1, 4, 64), (258, 64, 1)))
    with pytest.raises(ValueError, match=r"out must be contiguous, not float32 \[1, 4, 64\], strides"):
        launch(out=torch.zeros(1, 64, 4, device=DEVICE).mT)
    with pytest.raises(ValueError, match="block_table is on meta"):
        launch(block_table=torch.zeros(1, dtype=torch.int32, device="meta"))
