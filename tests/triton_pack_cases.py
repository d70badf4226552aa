"""The Triton pack kernel beside the codecs. test_triton_kernels.py runs this file, in a process of its own: in Triton's
interpreter on any machine, and compiled where there is a GPU.
"""

import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernels import both_dtypes, every_format, wild_kv
from torch import Tensor

from hmad.compute.codecs import encode
from hmad.facts.formats import FORMATS, KVFormat
from hmad_kernels.triton_common import FORMAT_NAMES, TOKENS_PER_BLOCK, divide, panel_bytes
from hmad_kernels.triton_pack import pack_blocks

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
numpy_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN and overflow, in the interpreter
head_dims = pytest.mark.parametrize("head_dim", [64, 128])


def test_kernels_and_facts_agree_on_the_formats() -> None:
    assert tuple(FORMATS) == FORMAT_NAMES
    for code, fmt in enumerate(FORMATS.values()):
        assert TOKENS_PER_BLOCK[code] == fmt.tokens_per_block
        assert panel_bytes(code, 128) == fmt.panel_bytes(128)


def block_rows(fmt: KVFormat, lengths: Sequence[int]) -> list[list[int]]:
    """(first row, number of tokens) of every block of sequences that lie end to end."""
    rows = []
    first = 0
    for length in lengths:
        for start in range(0, length, fmt.tokens_per_block):
            rows.append([first + start, min(fmt.tokens_per_block, length - start)])
        first += length
    return rows


def pack(fmt: KVFormat, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
    """The blocks that the kernel makes, and the rows that it finds bad."""
    k, v = k.to(DEVICE), v.to(DEVICE)
    blocks = torch.tensor(block_rows(fmt, lengths or [len(k)]), dtype=torch.int32, device=DEVICE)
    shape = (len(blocks), 2 * k.shape[1] * fmt.panel_bytes(k.shape[2]))
    out = torch.full(shape, 0xA5, dtype=torch.uint8, device=DEVICE)
    bad_rows = torch.zeros(len(k), dtype=torch.uint8, device=DEVICE)
    pack_blocks(fmt.name, k, v, blocks, out, bad_rows)
    return out.cpu(), bad_rows.nonzero().flatten().tolist()


@every_format
@both_dtypes
@head_dims
def test_packed_bytes_equal_the_codec(fmt: KVFormat, dtype: torch.dtype, head_dim: int) -> None:
    k, v = wild_kv(77, head_dim, dtype)
    out, bad_rows = pack(fmt, k, v)
    assert torch.equal(out, encode(fmt, k, v))
    assert bad_rows == []


@numpy_warns
@pytest.mark.parametrize("exponent", range(10))
def test_subnormal_numbers_beside_small_maxima(exponent: int) -> None:
    """bfp8 reads a hidden one into them, which counts beside small numbers. All maxima of a launch have one exponent:
    the least decides for all.
    """
    subnormal = torch.arange(128, dtype=torch.int16).repeat_interleave(2)
    subnormal[1::2] |= -0x8000  # and their negatives
    pieces = torch.empty(3, len(subnormal) // 8, 16, dtype=torch.int16)
    pieces[..., :8] = subnormal.view(-1, 8)
    pieces[..., 8:] = torch.tensor([exponent << 7 | mantissa for mantissa in (1, 64, 127)])[:, None, None]
    k = pieces.view(torch.bfloat16).view(-1, 1, 64)
    out, bad_rows = pack(FORMATS["bfp8"], k, k.flip(0))
    assert torch.equal(out, encode(FORMATS["bfp8"], k, k.flip(0)))
    assert bad_rows == []


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.sampled_from(list(FORMATS.values())), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.booleans())
def test_packing_a_batch_out_of_a_projection(fmt: KVFormat, lengths: list[int], is_bf16: bool) -> None:
    """K and V as a model's one projection makes them, of sequences that each begin a block of their own."""
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = torch.randn(sum(lengths), 6, 64, generator=generator) * 8
    qkv = qkv.bfloat16() if is_bf16 else qkv
    k, v = qkv[:, 2:4], qkv[:, 4:6]
    parts = zip(k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([encode(fmt, *part) for part in parts])
    assert torch.equal(pack(fmt, k, v, lengths)[0], expected)


@every_format
def test_a_block_without_tokens_is_that_of_zeros(fmt: KVFormat) -> None:
    k = torch.randn(1, 2, 64, device=DEVICE)
    zeros = torch.zeros(1, 2, 64)
    expected = encode(fmt, zeros, zeros)
    out = torch.full_like(expected, 0xA5, device=DEVICE)
    blocks = torch.tensor([[0, 0]], dtype=torch.int32, device=DEVICE)
    pack_blocks(fmt.name, k, k, blocks, out, torch.zeros(1, dtype=torch.uint8, device=DEVICE))
    assert torch.equal(out.cpu(), expected)


@numpy_warns
@every_format
def test_packing_names_the_rows_that_are_not_finite(fmt: KVFormat) -> None:
    k, v = torch.zeros(2, 40, 2, 64, dtype=torch.bfloat16)
    k[3, 1, 5], v[33, 0, 63], v[39, 1, 0] = float("nan"), float("inf"), float("-inf")
    assert pack(fmt, k, v)[1] == [3, 33, 39]


@numpy_warns
def test_packing_bf16_names_what_would_round_to_infinity() -> None:
    k = torch.full((3, 1, 64), np.uint32(0x7F7F7FFF).view(np.float32).item())
    k[1, 0, 9] = -np.uint32(0x7F7F8000).view(np.float32).item()
    assert pack(FORMATS["bf16"], k, k)[1] == [1]
    assert pack(FORMATS["fp32"], k, k)[1] == []


def test_bad_rows_of_an_earlier_launch_stay() -> None:
    k = torch.zeros(4, 1, 64, device=DEVICE)
    bad_rows = torch.tensor([0, 1, 0, 1], dtype=torch.uint8, device=DEVICE)
    blocks = torch.tensor([[0, 4]], dtype=torch.int32, device=DEVICE)
    out = torch.empty(1, 2 * 34 * 64, dtype=torch.uint8, device=DEVICE)
    pack_blocks("bfp8", k, k, blocks, out, bad_rows)
    assert bad_rows.tolist() == [0, 1, 0, 1]


@triton.jit
def _divide_kernel(x, divisors, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    place = rows[:, None] * COLUMNS + columns[None, :]
    tl.store(out + place, divide(tl.load(x + place), tl.load(divisors + rows)[:, None]))


@pytest.mark.parametrize("largest", [127.0, 448.0])
def test_quotients_are_correctly_rounded(largest: float) -> None:
    generator = torch.Generator().manual_seed(int(largest))
    binades = torch.randint(-100, 100, (64, 1), generator=generator).float()
    x = torch.randn(64, 1024, generator=generator) * binades.exp2()
    divisors = x.abs().amax(1) / largest
    out = torch.empty_like(x, device=DEVICE)
    _divide_kernel[(1,)](x.to(DEVICE), divisors.to(DEVICE), out, 64, 1024, enable_fp_fusion=False)
    assert torch.equal(out.cpu(), x / divisors[:, None])


@pytest.mark.parametrize(("name", "binades"), [("int8", 9), ("fp8_e4m3", 20)])
def test_every_quotient_of_bfloat16_values(name: str, binades: int) -> None:
    """Significands of a row's largest value (a few in the interpreter, else all) with each of the others', as far
    below as they count."""
    generator = torch.Generator().manual_seed(binades)
    peaks = torch.randperm(128, generator=generator)[: 4 if DEVICE == "cpu" else 128]
    peak = peaks.repeat(binades)[:, None]  # [rows, 1]
    field = torch.randint(1, 255, peak.shape, generator=generator)
    below = torch.arange(binades).repeat_interleave(len(peaks))[:, None]
    x = ((field - below).clamp(min=0) << 7) + torch.arange(128)  # [rows, 128]
    peak = (field << 7) + peak
    k, v = x.minimum(peak), x.minimum(peak) + (1 << 15)  # v is negative
    k[:, :1], v[:, -1:] = peak, peak
    k, v = ((bits & 0x7FFF).short() | -(bits >> 15 << 15).short() for bits in (k, v))
    k, v = (bits.view(torch.bfloat16)[:, None] for bits in (k, v))
    assert (v < 0).any()
    assert torch.equal(pack(FORMATS[name], k, v)[0], encode(FORMATS[name], k, v))


def test_packing_refuses_what_does_not_fit() -> None:
    k = torch.zeros(4, 2, 64, device=DEVICE)
    blocks = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    out = torch.zeros(1, 2 * 2 * 34 * 64, dtype=torch.uint8, device=DEVICE)
    bad = torch.zeros(4, dtype=torch.uint8, device=DEVICE)
    wide = torch.zeros(4, 2, 66, device=DEVICE)
    with pytest.raises(ValueError, match="unknown KV format 'int4'"):
        pack_blocks("int4", k, k, blocks, out, bad)
    with pytest.raises(ValueError, match=r"v must be .* as k is, not bfloat16"):
        pack_blocks("bfp8", k, k.bfloat16(), blocks, out, bad)
    with pytest.raises(ValueError, match=r"aligned to 16 bytes, not .* strides \(132, 66, 1\)"):
        pack_blocks("bfp8", wide[..., :64], wide[..., :64], blocks, out, bad)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        pack_blocks("bfp8", k, k, blocks, torch.zeros(8705, dtype=torch.uint8, device=DEVICE)[1:].view(1, -1), bad)
    with pytest.raises(ValueError, match=r"out must be contiguous uint8 \[1, 8448\]"):
        pack_blocks("mxfp8", k, k, blocks, out, bad)
    with pytest.raises(ValueError, match="head_dim must be one of"):
        pack_blocks("bfp8", k[..., :32], k[..., :32], blocks, out, bad)
    with pytest.raises(ValueError, match="blocks must be contiguous int32"):
        pack_blocks("bfp8", k, k, blocks.long(), out, bad)
    with pytest.raises(ValueError, match=r"bad_rows must be contiguous uint8 \[4\]"):
        pack_blocks("bfp8", k, k, blocks, out, bad[:3])
    with pytest.raises(
        ValueError, match=r"bad_rows, uint8 \[4\], strides \(1,\), must begin at a multiple of 16 bytes"
    ):
        pack_blocks("bfp8", k, k, blocks, out, torch.zeros(5, dtype=torch.uint8, device=DEVICE)[1:])
    with pytest.raises(ValueError, match="a kernel writes to bad_rows, on meta: it must be pinned memory of the host"):
        pack_blocks("bfp8", k, k, blocks, out, bad.to("meta"))
    with pytest.raises(ValueError, match="v is on meta"):
        pack_blocks("bfp8", k, k.to("meta"), blocks, out, bad)
