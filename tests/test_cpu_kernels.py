"""The CPU kernels over KV bytes, each beside its reference twin."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hmad.compute.codecs import decode, encode
from hmad.facts.formats import FORMATS, KVFormat, KVGeometry
from hmad_kernels.cpu_append import append_kv
from hmad_kernels.cpu_attention import (
    AttentionPlan,
    paged_decode_attention,
    paged_decode_attention_reference,
    scratch_shape,
)
from hmad_kernels.cpu_common import FORMAT_NAMES, TOKENS_PER_BLOCK, panel_bytes
from hmad_kernels.cpu_pack import pack_blocks
from hmad_kernels.cpu_rows import add_rms_norm

NUM_KV_HEADS = 2
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
Segments = list[tuple[str, int]]  # format name, num_tokens


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One, which is quickest for tensors this small; tests of the sharing out change it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_kernels_and_facts_agree_on_the_formats() -> None:
    assert tuple(FORMATS) == FORMAT_NAMES
    for code, fmt in enumerate(FORMATS.values()):
        assert TOKENS_PER_BLOCK[code] == fmt.tokens_per_block
        assert panel_bytes(code, 96) == fmt.panel_bytes(96)


def wild_kv(num_tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V [num_tokens, 3, head_dim] with everything that a codec treats specially."""
    generator = torch.Generator().manual_seed(num_tokens * head_dim)
    binades = 24 * torch.randn(2, num_tokens, 3, 1, generator=generator)
    binades = binades + 8 * torch.randn(2, num_tokens, 3, head_dim, generator=generator)
    values = torch.randn(2, num_tokens, 3, head_dim, generator=generator) * binades.exp2()
    values = values.clamp(-1e37, 1e37)
    values[0, -1] = 0.0
    values[1, -1, :, ::2] = -0.0
    values[0, 0, 0] *= 2.0**-120
    values[1, 0, 1, :] = torch.arange(head_dim) - 15.5
    values[1, 0, 2, :] = (torch.arange(head_dim) - 15.5) * 2.0**-132
    k, v = values.to(dtype)
    return k, v


@every_format
@both_dtypes
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("num_tokens", [1, 33, 64, 77])
def test_packed_bytes_equal_the_codec(fmt: KVFormat, dtype: torch.dtype, head_dim: int, num_tokens: int) -> None:
    if not fmt.fits(head_dim):
        with pytest.raises(ValueError, match="not defined for head_dim"):
            pack_blocks(fmt.name, *wild_kv(1, head_dim, dtype), torch.empty(1, 0, dtype=torch.uint8))
        return
    k, v = wild_kv(num_tokens, head_dim, dtype)
    expected = encode(fmt, k, v)
    out = torch.full_like(expected, 0xA5)
    assert pack_blocks(fmt.name, k, v, out) == ()
    assert torch.equal(out, expected)


@every_format
def test_packing_takes_views_of_a_projection(fmt: KVFormat) -> None:
    qkv = torch.randn(40, 7, 64, generator=torch.Generator().manual_seed(1))
    k, v = qkv[1:, 2:4], qkv[1:, 4:6].flip(1).transpose(0, 1).contiguous().transpose(0, 1)
    expected = encode(fmt, k, v)
    out = torch.empty_like(expected)
    pack_blocks(fmt.name, k, v, out)
    assert torch.equal(out, expected)


@every_format
def test_threads_share_out_the_packing(fmt: KVFormat) -> None:
    torch.set_num_threads(2)
    k, v = wild_kv(203, 64, torch.float32)
    out = torch.empty_like(encode(fmt, k, v))
    assert pack_blocks(fmt.name, k, v, out) == ()
    assert torch.equal(out, encode(fmt, k, v))


@every_format
@both_dtypes
def test_packing_names_the_rows_that_are_not_finite(fmt: KVFormat, dtype: torch.dtype) -> None:
    k, v = torch.zeros(2, 40, 2, 64, dtype=dtype)
    k[3, 1, 63], v[39, 0, 0], v[17, 1, 1] = float("nan"), float("inf"), -float("inf")
    out = torch.empty_like(encode(fmt, torch.zeros_like(k), v.new_zeros(v.shape)))
    assert pack_blocks(fmt.name, k, v, out) == (3, 17, 39)


def test_packing_bf16_names_what_would_round_to_infinity() -> None:
    k = torch.full((1, 1, 32), np.uint32(0x7F7F7FFF).view(np.float32).item())
    out = torch.empty(1, 2 * 32 * 32, dtype=torch.uint8)
    assert pack_blocks("bf16", k, k, out) == ()
    k[0, 0, 9] = -np.uint32(0x7F7F8000).view(np.float32).item()
    assert pack_blocks("bf16", k, k, out) == (0,)
    assert pack_blocks("fp32", k, k, out) == ()


@pytest.mark.parametrize(
    ("k_shape", "out_shape", "match"),
    [
        ((1, 2, 64), (1, 2 * 34 * 64), r"out must be contiguous uint8 \[1, 8704\]"),
        ((33, 1, 64), (1, 2 * 34 * 64), r"\[2, 4352\]"),
        ((33, 64), (1, 2 * 34 * 64), "num_kv_heads"),
    ],
)
def test_packing_refuses_shapes(k_shape: tuple[int, ...], out_shape: tuple[int, ...], match: str) -> None:
    k = torch.zeros(k_shape)
    with pytest.raises(ValueError, match=match):
        pack_blocks("bfp8", k, k, torch.empty(out_shape, dtype=torch.uint8))


def test_packing_refuses_mixed_dtypes_and_strided_rows() -> None:
    k, out = torch.zeros(1, 1, 64), torch.empty(1, 2 * 32 * 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="both"):
        pack_blocks("fp32", k, k.bfloat16(), out)
    with pytest.raises(ValueError, match="last dimension"):
        pack_blocks("fp32", torch.zeros(1, 64, 2)[..., :1].mT, k, out)
    with pytest.raises(ValueError, match="CPU memory"):
        pack_blocks("fp32", k, k.to("meta"), out)
    with pytest.raises(ValueError, match="unknown KV format"):
        pack_blocks("int4", k, k, out)


@dataclass
class Paged:
    """The arguments of one attention launch over slots in a shuffled arena."""

    q: Tensor
    slots: Tensor
    seq_segments: Tensor
    segments: Tensor
    block_table: Tensor
    out: Tensor
    scratch: Tensor
    sm_scale: float

    def run(self) -> Tensor:
        paged_decode_attention(**vars(self), num_kv_heads=NUM_KV_HEADS)
        return self.out

    def reference(self) -> Tensor:
        def read(name: str, blocks: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
            return decode(FORMATS[name], blocks, num_tokens, NUM_KV_HEADS, self.q.shape[2])

        out = torch.empty(self.q.shape, dtype=torch.float64)
        paged_decode_attention_reference(**{**vars(self), "out": out}, num_kv_heads=NUM_KV_HEADS, decode=read)
        return out


def paged(
    sequences: list[Segments], head_dim: int, group: int, dtype: torch.dtype = torch.float32, num_threads: int = 2
) -> Paged:
    """Random K and V in the given segments. Every byte that belongs to no token is 0xFF: a NaN in most formats."""
    generator = torch.Generator().manual_seed(len(sequences) * head_dim + group)
    blocks: list[Tensor] = []
    segments: list[tuple[int, int, int]] = []
    seq_segments = [0]
    for sequence in sequences:
        for name, num_tokens in sequence:
            kv = 2 * torch.randn(2, num_tokens, NUM_KV_HEADS, head_dim, generator=generator)
            segments.append((FORMAT_NAMES.index(name), num_tokens, len(blocks)))
            blocks += list(poison_padding(FORMATS[name], encode(FORMATS[name], *kv), num_tokens, head_dim))
        seq_segments.append(len(segments))
    block_table = torch.randperm(len(blocks) + 2, generator=generator)[: len(blocks)].int()
    slots = torch.full((len(blocks) + 2, KVGeometry(1, NUM_KV_HEADS, head_dim).slot_bytes), 0xFF, dtype=torch.uint8)
    for slot, block in zip(block_table.tolist(), blocks, strict=True):
        slots[slot, : len(block)] = block
    num_heads = NUM_KV_HEADS * group
    q = torch.randn(len(sequences), num_heads, head_dim, generator=generator).to(dtype)
    return Paged(
        q,
        slots,
        torch.tensor(seq_segments, dtype=torch.int32),
        torch.tensor(segments, dtype=torch.int32),
        block_table,
        torch.full_like(q, float("nan")),
        torch.full(scratch_shape(num_threads, num_heads, NUM_KV_HEADS, head_dim), float("nan")),
        head_dim**-0.5,
    )


def poison_padding(fmt: KVFormat, blocks: Tensor, num_tokens: int, head_dim: int) -> Tensor:
    """Overwrite a tail block's unused positions, as stale bytes of an earlier owner would."""
    used = (num_tokens - 1) % fmt.tokens_per_block + 1
    if fmt.name in ("fp32", "bf16"):
        panels = blocks[-1].reshape(2 * NUM_KV_HEADS, fmt.tokens_per_block, -1)
        panels[:, used:] = 0xFF
    return blocks


def error(case: Paged) -> float:
    return (case.run().double() - case.reference()).abs().max().item()


@every_format
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
def test_attention_equals_float64_over_the_decoded_values(fmt: KVFormat, head_dim: int, group: int) -> None:
    if not fmt.fits(head_dim):
        case = paged([[("fp32", 1)]], head_dim, group)
        case.segments[0, 0] = FORMAT_NAMES.index(fmt.name)
        with pytest.raises(ValueError, match="not defined for head_dim"):
            case.run()
        return
    lengths = (1, 7, 32, 33, 130)
    assert error(paged([[(fmt.name, n)] for n in lengths], head_dim, group)) < 1e-5


@both_dtypes
@pytest.mark.parametrize("raw", ["int8", "fp8_e4m3", "mxfp8", "bfp8"])
def test_raw_and_bf16_segments_mix_in_one_sequence(raw: str, dtype: torch.dtype) -> None:
    mixed: Segments = [(raw, 45), ("bf16", 19), (raw, 32), ("fp32", 3)]
    case = paged([mixed, [("bf16", 1)], mixed[:2]], 64, 4, dtype)
    assert error(case) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8, 40])
def test_splits_between_threads_do_not_change_the_result(num_threads: int) -> None:
    torch.set_num_threads(2)
    sequences: list[Segments] = [[("int8", 500), ("bf16", 9)], [("bf16", 2)], [("bfp8", 90)]]
    case = paged(sequences, 64, 2, num_threads=num_threads)
    assert error(case) < 1e-5
    assert error(paged([[("bf16", 3)]], 64, 2, num_threads=num_threads)) < 1e-5


def test_sequences_may_share_blocks() -> None:
    case = paged([[("mxfp8", 70)], [("bf16", 5)], [("bf16", 11)]], 64, 2)
    prefix, one, other = case.segments
    case.segments = torch.stack((prefix, one, prefix, other))
    case.seq_segments = torch.tensor([0, 2, 4], dtype=torch.int32)
    case.q, case.out = case.q[:2].contiguous(), case.out[:2].contiguous()
    assert error(case) < 1e-5


def test_nothing_in_scratch_survives_a_launch() -> None:
    case = paged([[("bfp8", 300)], [("bf16", 9)], [("mxfp8", 40)]], 64, 4, num_threads=3)
    first = case.run().clone()
    case.scratch.fill_(1e30)
    assert torch.equal(case.run(), first)
    case.scratch.fill_(float("nan"))
    assert torch.equal(case.run(), first)


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_large_scores_do_not_overflow(num_threads: int) -> None:
    case = paged([[("fp32", 40)], [("bf16", 100)]], 64, 2, num_threads=num_threads)
    case.q *= 500
    assert error(case) < 1e-4
    assert case.out.isfinite().all()


@pytest.mark.parametrize("raw", ["int8", "fp8_e4m3", "mxfp8", "bfp8"])
def test_one_token_returns_its_v_exactly(raw: str) -> None:
    """Whatever the bytes: E4M3 subnormals, scales that are subnormal, magnitudes that are not normalised."""
    case = paged([[(raw, 1)]], 128, 1)
    panel_size, code = FORMATS[raw].panel_bytes(128), FORMAT_NAMES.index(raw)
    slot = case.slots[int(case.block_table[0])]
    rng = np.random.default_rng(code)
    for scale_byte in (0, 1, 5, 6, 7, 8, 100, 127, 200):
        slot[: 4 * panel_size] = 0  # K: every score is 0
        for v in (slot[panel_size : 2 * panel_size], slot[3 * panel_size : 4 * panel_size]):
            v[:] = torch.from_numpy(rng.integers(0, 256, panel_size, dtype=np.uint8) & 0xBF)
            if raw == "mxfp8":
                v[32 * 128 :] = scale_byte
            elif raw == "bfp8":
                v.view(4, 1088)[:, :64] = scale_byte
            else:
                v[32 * 128 :] = torch.tensor([2.0 ** (scale_byte - 126)]).view(torch.uint8).repeat(32)
        _, v_decoded = decode(FORMATS[raw], slot.unsqueeze(0), 1, NUM_KV_HEADS, 128)
        assert torch.equal(case.run(), v_decoded)
        assert v_decoded.any()


@pytest.mark.parametrize("raw", ["int8", "fp8_e4m3", "mxfp8", "bfp8", "bf16", "fp32"])
def test_every_byte_of_the_cache_matters(raw: str) -> None:
    case = paged([[(raw, FORMATS[raw].tokens_per_block)]], 64, 1)
    before = case.run().clone()
    slot = case.slots[int(case.block_table[0])]
    for position in (3, FORMATS[raw].panel_bytes(64) + 3):
        slot[position] ^= 0x44
        assert not torch.equal(case.run(), before)
        slot[position] ^= 0x44
    assert torch.equal(case.run(), before)


@pytest.mark.parametrize("panel", [0, 1], ids=["k", "v"])
def test_a_nan_in_the_cache_stays_visible(panel: int) -> None:
    case = paged([[("bf16", 40)]], 64, 2)
    slot = case.slots[int(case.block_table[1])].view(torch.bfloat16)
    slot[panel * 16 * 64 + 5] = float("nan")
    out = case.run()
    assert not out[0, :2].isfinite().all()
    assert out[0, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seq_segments": [0, 2]}, "seq_segments must rise"),
        ({"seq_segments": [0, 0]}, "seq_segments must rise"),
        ({"segments": [[6, 1, 0]]}, "format code"),
        ({"segments": [[-1, 1, 0]]}, "format code"),
        ({"segments": [[1, 0, 0]]}, "no tokens"),
        ({"segments": [[1, 17, 0]]}, "outside block_table"),
        ({"segments": [[1, 1, -1]]}, "outside block_table"),
        ({"block_table": [-1]}, "slot id"),
        ({"block_table": [3]}, "slot id"),
    ],
)
def test_metadata_that_points_outside_is_refused(changes: dict[str, list[int]], match: str) -> None:
    case = paged([[("bf16", 3)]], 64, 1)
    for name, value in changes.items():
        setattr(case, name, torch.tensor(value, dtype=torch.int32))
    with pytest.raises(ValueError, match=match):
        case.run()


def test_memory_of_the_wrong_kind_is_refused() -> None:
    def refuses(match: str, **changes: Tensor) -> None:
        case = paged([[("bf16", 3)]], 64, 1)
        with pytest.raises(ValueError, match=match):
            Paged(**{**vars(case), **changes}).run()

    refuses("int32", block_table=torch.zeros(1, dtype=torch.int64))
    refuses("scratch", scratch=torch.empty(2, 10))
    refuses("q and out", out=torch.empty(1, 2, 64, dtype=torch.bfloat16))
    refuses("q and out", q=torch.empty(2, 2, 64))
    refuses("contiguous", q=torch.empty(1, 64, 2).mT)
    refuses("CPU memory", q=torch.empty(1, 2, 64, device="meta"))
    refuses("does not fit", slots=torch.zeros(3, 4096, dtype=torch.uint8))
    refuses("uint8", slots=torch.zeros(3, 8704, dtype=torch.int8))


def test_a_plan_serves_every_layer() -> None:
    case = paged([[("int8", 40), ("bf16", 3)]], 64, 2)
    plan = AttentionPlan.build(
        case.seq_segments, case.segments, case.block_table, case.scratch,
        num_heads=4, num_kv_heads=2, head_dim=64, num_slots=case.slots.shape[0], slot_bytes=case.slots.shape[1],
    )  # fmt: skip
    expected = case.run().clone()
    for _layer in range(2):
        case.out.fill_(float("nan"))
        plan.run(case.q, case.slots, case.out, case.sm_scale)
        assert torch.equal(case.out, expected)


@both_dtypes
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_appended_tokens_are_where_the_codec_reads_them(name: str, dtype: torch.dtype) -> None:
    fmt = FORMATS[name]
    qkv = torch.randn(5, 6, 64, generator=torch.Generator().manual_seed(7)).to(dtype)
    k, v = qkv[:, :2], qkv[:, 2:4]  # [5, 2, 64]
    slots = torch.full((6, KVGeometry(1, 2, 64).slot_bytes), 0xFF, dtype=torch.uint8)
    slot_ids = torch.tensor([4, 0, 2, 2, 5], dtype=torch.int32)
    offsets = torch.tensor([0, 3, 7, 6, 1], dtype=torch.int32)
    before = slots.clone()
    assert append_kv(k, v, slots, slot_ids, offsets, name) == ()
    for b, (slot, offset) in enumerate(zip(slot_ids.tolist(), offsets.tolist(), strict=True)):
        stored_k, stored_v = decode(fmt, slots[slot : slot + 1], fmt.tokens_per_block, 2, 64)
        expected_k, expected_v = decode(fmt, encode(fmt, k[b : b + 1], v[b : b + 1]), 1, 2, 64)
        assert torch.equal(stored_k[offset], expected_k[0])
        assert torch.equal(stored_v[offset], expected_v[0])
    value_bytes = 4 if name == "fp32" else 2
    assert (slots != before).sum() <= 5 * 2 * 2 * 64 * value_bytes
    assert torch.equal(slots[[1, 3]], before[[1, 3]])


def test_appending_names_the_rows_that_are_not_finite() -> None:
    k = torch.zeros(3, 2, 64)
    k[1, 1, 5], k[2, 0, 0] = float("inf"), 3.4e38
    slots = torch.zeros(3, KVGeometry(1, 2, 64).slot_bytes, dtype=torch.uint8)
    ids = torch.arange(3, dtype=torch.int32)
    assert append_kv(k, torch.zeros_like(k), slots, ids, ids, "bf16") == (1, 2)
    assert append_kv(torch.zeros_like(k), k, slots, ids, ids, "fp32") == (1,)


@pytest.mark.parametrize(("slot", "offset", "name"), [(2, 0, "bf16"), (-1, 0, "bf16"), (0, 16, "bf16"), (0, 8, "fp32")])
def test_appending_outside_the_arena_writes_nothing(slot: int, offset: int, name: str) -> None:
    k = torch.ones(2, 2, 64)
    slots = torch.zeros(2, KVGeometry(1, 2, 64).slot_bytes, dtype=torch.uint8)
    ids, offsets = torch.tensor([0, slot], dtype=torch.int32), torch.tensor([0, offset], dtype=torch.int32)
    with pytest.raises(ValueError, match="outside"):
        append_kv(k, k, slots, ids, offsets, name)
    assert not slots.any()


def test_appending_refuses_a_raw_tail() -> None:
    k, ids = torch.zeros(1, 2, 64), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="fp32 or bf16"):
        append_kv(k, k, torch.zeros(1, 8704, dtype=torch.uint8), ids, ids, "int8")


def shared_out_work() -> str:
    """A digest of what kernels that share out their work give."""
    k, v = wild_kv(203, 64, torch.float32)
    packed = torch.empty_like(encode(FORMATS["bfp8"], k, v))
    pack_blocks("bfp8", k, v, packed)
    attended = paged([[("int8", 500), ("bf16", 9)], [("bf16", 2)], [("bfp8", 90)]], 64, 2, num_threads=3).run()
    x = torch.randn(67, 512, generator=torch.Generator().manual_seed(3))
    normed = add_rms_norm(x, None, torch.ones(512), 1e-6)
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in (packed, attended, normed))).hexdigest()


WITHOUT_A_TEAM = """
from pathlib import Path
import torch
read_text, maps = Path.read_text, Path("/proc/self/maps")
Path.read_text = lambda path, *args, **options: "" if path == maps else read_text(path, *args, **options)
from hmad_kernels import cpu_team
from test_cpu_kernels import shared_out_work
print(cpu_team.OPENMP, shared_out_work())
"""


def test_without_torchs_team_one_thread_does_the_same() -> None:
    torch.set_num_threads(2)
    alone = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_TEAM], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True
    )
    assert alone.stdout.split() == ["None", shared_out_work()]
