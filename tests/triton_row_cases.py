"""The Triton row kernels beside the CPU's. test_triton_kernels.py runs this file as it does the others."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cpu_kernels import both_dtypes, wild_kv
from torch import Tensor

from hmad.compute.linears import round_bfp8, round_e4m3
from hmad_kernels import cpu_rows, triton_rope, triton_rows
from hmad_kernels.cpu_append import append_kv
from hmad_kernels.cpu_rows import Int8Rows, quantize_int8_reference
from hmad_kernels.cpu_turn import turn_block, turned
from hmad_kernels.triton_rows import E4M3Rows

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EPS = 1e-6
ONE_PLACE = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-21}  # relative: two roundings that fell the other way
WIDTHS = (64, 80, 1040)  # a power of two, less than a warp's worth more, and more than a piece of a row
numpy_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN and overflow, in the interpreter
every_width = pytest.mark.parametrize("width", WIDTHS)

Quantized = Int8Rows | E4M3Rows


def whole_numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values whose squares add up to the same float32 in any order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wild_rows(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Values of all magnitudes and signed zeros; a row of zeros, and rows too small for a scale."""
    rows = torch.cat([x.flatten(1) for x in wild_kv(num_rows, width, dtype)])[:, :width].contiguous()
    tiny = torch.linspace(-3, 2, width).to(dtype) * 2.0**-123
    return torch.cat([rows, torch.zeros(1, width, dtype=dtype), tiny[None], tiny[None] * 2.0**-8])


def on_cpu(out: Any) -> Any:
    return out.cpu() if isinstance(out, Tensor) else type(out)(*(x.cpu() for x in out))


def launch(run: Callable[..., Any], *arguments: Any) -> Any:
    """What a launcher makes of tensors of the host."""
    return on_cpu(run(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments)))


def assert_same(found: Quantized, expected: Quantized) -> None:
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales)


def e4m3_reference(x: Tensor) -> E4M3Rows:
    values, scales = round_e4m3(x)
    return E4M3Rows(values.to(torch.float8_e4m3fn), scales)


def fnuz_reference(x: Tensor) -> E4M3Rows:
    scales = x.float().abs().amax(-1, keepdim=True) / 240
    scales = torch.where(scales < 2.0**-126, 1.0, scales)
    return E4M3Rows((x.float() / scales).to(torch.float8_e4m3fnuz), scales)


def quantize_fnuz(x: Tensor) -> E4M3Rows:
    return triton_rows.quantize_fp8(x, torch.float8_e4m3fnuz)


# --- norm -------------------------------------------------------------------------------------------------------------


@both_dtypes
@every_width
@pytest.mark.parametrize("has_delta", [True, False])
def test_norms_equal_the_cpu_kernel(dtype: torch.dtype, width: int, has_delta: bool) -> None:
    x, weight = whole_numbers(3, width, dtype=dtype), torch.linspace(-2, 3, width).to(dtype)
    delta = whole_numbers(3, width, dtype=dtype, seed=1) if has_delta else None
    on_device = x.clone().to(DEVICE)
    found = launch(triton_rows.add_rms_norm, on_device, delta, weight, EPS)
    assert torch.equal(found, cpu_rows.add_rms_norm(x, delta, weight, EPS))
    assert torch.equal(on_device.cpu(), x)  # now the sum


@both_dtypes
def test_norms_of_any_rows_are_within_a_rounding(dtype: torch.dtype) -> None:
    x, delta, weight = (torch.randn(n, 1040, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (3, 3, 1))
    found = launch(triton_rows.add_rms_norm, x.clone(), delta, weight[0], EPS)
    expected = cpu_rows.add_rms_norm(x, delta, weight[0], EPS)
    torch.testing.assert_close(found, expected, rtol=2 * ONE_PLACE[dtype], atol=0)


@both_dtypes
@every_width
def test_quantized_norms_are_norms_quantized(dtype: torch.dtype, width: int) -> None:
    x, delta = (whole_numbers(3, width, dtype=dtype, seed=seed) for seed in range(2))
    weight = torch.linspace(-2, 3, width).to(dtype)
    normed = cpu_rows.add_rms_norm(x.clone(), delta, weight, EPS)
    arguments = x, delta, weight, EPS
    assert_same(launch(triton_rows.add_rms_norm_int8, *map(copied, arguments)), quantize_int8_reference(normed))
    assert_same(launch(triton_rows.add_rms_norm_fp8, *map(copied, arguments)), e4m3_reference(normed))


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


# --- silu -------------------------------------------------------------------------------------------------------------


@both_dtypes
@every_width
def test_silu_is_within_a_rounding_of_the_cpu_kernel(dtype: torch.dtype, width: int) -> None:
    gate_up = 20 * torch.randn(3, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)
    expected = cpu_rows.silu_mul(gate_up)
    found = launch(triton_rows.silu_mul, gate_up)
    # A GPU's own exponential is off by a few units in the last place, which only float32 shows.
    tolerance = 8 * ONE_PLACE[dtype] if DEVICE == "cuda" and dtype == torch.float32 else ONE_PLACE[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-30)


@both_dtypes
@pytest.mark.parametrize("width", [1040, 96, 64, 128, 768], ids=lambda width: f"blocks of {turn_block(width)}")
def test_quantized_silu_is_silu_quantized(dtype: torch.dtype, width: int) -> None:
    """Of what the same exponential gave: the plain kernel's result, for int8 turned."""
    gate_up = 5 * torch.randn(3, 2 * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = launch(triton_rows.silu_mul, gate_up)
    assert_same(launch(triton_rows.silu_mul_int8, gate_up), quantize_int8_reference(turned(plain)))
    assert_same(launch(triton_rows.silu_mul_fp8, gate_up), e4m3_reference(plain))


# --- quantizing -------------------------------------------------------------------------------------------------------


@numpy_warns
@both_dtypes
@every_width
@pytest.mark.parametrize(
    ("run", "reference"),
    [
        (triton_rows.quantize_int8, quantize_int8_reference),
        (triton_rows.quantize_fp8, e4m3_reference),
        (quantize_fnuz, fnuz_reference),
    ],
    ids=["int8", "e4m3", "fnuz"],
)
def test_quantized_rows_equal_the_cpu(
    run: Callable[[Tensor], Quantized], reference: Callable[[Tensor], Quantized], dtype: torch.dtype, width: int
) -> None:
    rows = wild_rows(3, width, dtype)
    assert_same(launch(run, rows), reference(rows))


@numpy_warns
@pytest.mark.parametrize("run", [triton_rows.quantize_int8, triton_rows.quantize_fp8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_such_a_scale(run: Callable[[Tensor], Quantized], bad: float) -> None:
    rows = torch.ones(2, 64)
    rows[0, 63] = bad
    assert launch(run, rows).scales.flatten().isfinite().tolist() == [False, True]


@numpy_warns
@both_dtypes
@every_width
def test_bfp8_equals_the_cpu(dtype: torch.dtype, width: int) -> None:
    rows = wild_rows(3, width, dtype)
    rows[1, 5], rows[2, 20] = float("nan"), float("inf")
    found, expected = launch(triton_rows.round_bfp8, rows), round_bfp8(rows)
    assert torch.equal(found.isnan(), expected.isnan())
    assert expected.isnan().sum() == 32  # the two groups
    assert torch.equal(found.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))


@every_width
def test_scaled_sums_equal_torch(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    acc = torch.randint(-(2**31), 2**31, (3, width), generator=generator).int()
    row_scales, column_scales = torch.rand(3, generator=generator), torch.rand(width, generator=generator)
    expected = (acc.float() * row_scales[:, None] * column_scales).bfloat16()
    assert torch.equal(launch(triton_rows.scale_int32, acc, row_scales, column_scales), expected)


def test_no_rows_are_no_launch() -> None:
    x, weight = torch.empty(0, 64, device=DEVICE), torch.empty(64, device=DEVICE)
    assert triton_rows.add_rms_norm_int8(x, None, weight, EPS).values.shape == (0, 64)
    assert triton_rows.silu_mul_fp8(x).scales.shape == (0, 1)
    assert triton_rows.round_bfp8(x).shape == (0, 64)


def test_rows_refuse_what_does_not_fit() -> None:
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.zeros(64, device=DEVICE)
    with pytest.raises(ValueError, match=r"K a multiple of 16 up to 32768, not float32 \[2, 72\]"):
        triton_rows.quantize_int8(torch.zeros(2, 72, device=DEVICE))
    with pytest.raises(ValueError, match=r"K a multiple of 16 up to 32768, not float32 \[1, 32784\]"):
        triton_rows.round_bfp8(torch.zeros(1, 32784, device=DEVICE))
    with pytest.raises(ValueError, match=r"rows must be float32 or bfloat16, not float16"):
        triton_rows.silu_mul(x.half())
    with pytest.raises(ValueError, match=r"delta must be contiguous float32 \[2, 64\], not bfloat16"):
        triton_rows.add_rms_norm(x, x.bfloat16(), weight, EPS)
    with pytest.raises(ValueError, match=r"x must be contiguous .* strides \(1, 64\)"):
        triton_rows.add_rms_norm(torch.zeros(64, 64, device=DEVICE).T, None, weight, EPS)
    with pytest.raises(ValueError, match=r"weight must be contiguous float32 \[64\], not float32 \[63\]"):
        triton_rows.add_rms_norm_int8(x, None, weight[:63], EPS)
    with pytest.raises(ValueError, match=r"gate_up must be \[T, 2 N\], not float32 \[2, 33\]"):
        triton_rows.silu_mul(torch.zeros(2, 33, device=DEVICE))
    with pytest.raises(ValueError, match=r"must be float8_e4m3fn or float8_e4m3fnuz, not torch.float8_e5m2"):
        triton_rows.quantize_fp8(x, torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"acc must be contiguous int32 \[2, 64\]"):
        triton_rows.scale_int32(x, x[:, 0], weight)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        triton_rows.quantize_int8(torch.zeros(129, device=DEVICE)[1:].view(2, 64))
    with pytest.raises(ValueError, match="weight is on meta"):
        triton_rows.add_rms_norm(x, None, weight.to("meta"), EPS)


# --- rotary embedding, and the append ---------------------------------------------------------------------------------


class Heads:
    """A projection's rows with what rotates them; the sums of squares are exact."""

    num_heads, num_kv_heads = 5, 2  # 7 or 9 heads: programs have 8

    def __init__(self, head_dim: int, dtype: torch.dtype, num_rows: int = 4) -> None:
        width = (self.num_heads + 2 * self.num_kv_heads) * head_dim
        self.head_dim = head_dim
        self.qkv = whole_numbers(num_rows, width, dtype=dtype)
        self.weights = [torch.linspace(-2, 3, head_dim).to(dtype), torch.linspace(4, 1, head_dim).to(dtype)]
        angles = torch.rand(9, head_dim // 2, generator=torch.Generator().manual_seed(head_dim))
        self.rope_table = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)
        self.positions = torch.tensor([8, 0, 3, 3])[:num_rows]

    def arguments(self) -> list[Any]:
        """Of the Triton launchers, on their device."""
        tensors = [self.qkv, *self.weights, self.rope_table, self.positions]
        return [*(x.clone().to(DEVICE) for x in tensors), self.num_heads, self.num_kv_heads, EPS]

    def expected(self) -> Tensor:
        counts = self.num_heads, self.num_kv_heads, EPS
        return cpu_rows.qk_norm_rope(self.qkv.clone(), *self.weights, self.rope_table[self.positions], *counts)


head_dims = pytest.mark.parametrize("head_dim", [64, 128])


@both_dtypes
@head_dims
def test_rotated_heads_equal_the_cpu_kernel(dtype: torch.dtype, head_dim: int) -> None:
    heads = Heads(head_dim, dtype)
    qkv, *rest = heads.arguments()
    assert triton_rope.qk_norm_rope(qkv, *rest) is qkv
    assert torch.equal(qkv.cpu(), heads.expected())


@pytest.mark.parametrize("position", [-1, 9, 2**62])
def test_a_position_that_no_table_has_reads_nothing(position: int) -> None:
    heads = Heads(64, torch.float32, num_rows=1)
    heads.positions[0] = position
    rotated = triton_rope.qk_norm_rope(*heads.arguments()).cpu().view(9, 64)
    assert torch.equal(rotated[:7], torch.zeros(7, 64))
    assert torch.equal(rotated[7:], heads.qkv.view(9, 64)[7:])


@numpy_warns
@both_dtypes
@head_dims
@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_appending_fused_equals_rotating_then_appending(name: str, head_dim: int, dtype: torch.dtype) -> None:
    heads = Heads(head_dim, dtype)
    heads.qkv.view(4, 9, head_dim)[:, 7:] = wild_kv(4, head_dim, dtype)[1][:, 1:]  # V is rounded, and no more
    expected_qkv = heads.expected()
    q, k, v = expected_qkv.view(4, 9, head_dim).split([5, 2, 2], dim=1)
    ids, offsets = torch.tensor([4, -1, 0, 2]), torch.tensor([0, 1 << 30, 7, 3])  # the second row is padding
    expected = torch.full((5, 2 * 2 * 34 * head_dim), 0xA5, dtype=torch.uint8)
    slots, bad_rows = expected.clone().to(DEVICE), torch.zeros(4, dtype=torch.uint8, device=DEVICE)
    live = torch.tensor([0, 2, 3])
    append_kv(k[live], v[live], expected, ids[live].int(), offsets[live].int(), name)

    qkv, *rest = heads.arguments()
    tails = slots, ids.int().to(DEVICE), offsets.int().to(DEVICE), bad_rows
    triton_rope.norm_rope_append(qkv, *rest, name, *tails)
    assert torch.equal(slots.cpu(), expected)
    assert bad_rows.tolist() == [0, 0, 0, 0]
    q_width = 5 * head_dim
    assert torch.equal(qkv.cpu()[live, :q_width], q.flatten(1)[live])
    assert torch.equal(qkv.cpu()[1], heads.qkv[1])
    assert torch.equal(qkv.cpu()[:, q_width:], heads.qkv[:, q_width:])  # k and v went elsewhere


@numpy_warns
@pytest.mark.parametrize("head", [5, 6, 8], ids=["k", "last k", "last v"])
def test_the_fused_append_names_rows_that_are_not_finite(head: int) -> None:
    heads = Heads(64, torch.float32)
    heads.qkv.view(4, 9, 64)[1:3, head, 63] = float("nan")
    heads.qkv.view(4, 9, 64)[3, 0, 0] = float("nan")  # a query is nothing that a format must hold
    slots = torch.zeros(4, 2 * 2 * 34 * 64, dtype=torch.uint8, device=DEVICE)
    ids = torch.tensor([3, 1, -1, 0], dtype=torch.int32, device=DEVICE)
    bad_rows = torch.tensor([1, 0, 0, 0], dtype=torch.uint8, device=DEVICE)
    triton_rope.norm_rope_append(*heads.arguments(), "bf16", slots, ids, torch.zeros_like(ids), bad_rows)
    assert bad_rows.tolist() == [1, 1, 0, 0]  # what was marked stays, padding is not


@numpy_warns
@pytest.mark.parametrize(("name", "bad"), [("bf16", [0, 0, 1, 0]), ("fp32", [0, 0, 0, 0])])
def test_the_fused_append_names_what_would_round_to_infinity(name: str, bad: list[int]) -> None:
    heads = Heads(64, torch.float32)
    last_v = heads.qkv.view(4, 9, 64)[:, 8, 63]
    last_v[1:3] = -torch.tensor([0x7F7F7FFF, 0x7F7F8000], dtype=torch.int32).view(torch.float32)
    slots = torch.zeros(4, 2 * 2 * 34 * 64, dtype=torch.uint8, device=DEVICE)
    ids = torch.arange(4, dtype=torch.int32, device=DEVICE)
    bad_rows = torch.zeros(4, dtype=torch.uint8, device=DEVICE)
    triton_rope.norm_rope_append(*heads.arguments(), name, slots, ids, torch.zeros_like(ids), bad_rows)
    assert bad_rows.tolist() == bad


def test_rotating_refuses_what_does_not_fit() -> None:
    qkv, q_weight, k_weight, table, positions, *rest = Heads(64, torch.float32).arguments()
    slots = torch.zeros(1, 2 * 2 * 34 * 64, dtype=torch.uint8, device=DEVICE)
    ids, bad = torch.zeros(4, dtype=torch.int32, device=DEVICE), torch.zeros(4, dtype=torch.uint8, device=DEVICE)

    def append(name: str = "bf16", **changes: Tensor) -> None:
        tails = {"slots": slots, "slot_ids": ids, "offsets": ids, "bad_rows": bad} | changes
        triton_rope.norm_rope_append(qkv, q_weight, k_weight, table, positions, *rest, name, *tails.values())

    with pytest.raises(ValueError, match="head_dim must be one of"):
        triton_rope.qk_norm_rope(qkv, q_weight[:32], k_weight, table, positions, *rest)
    with pytest.raises(ValueError, match=r"qkv must be contiguous float32 \[-1, 576\]"):
        triton_rope.qk_norm_rope(qkv[:, :512], q_weight, k_weight, table, positions, *rest)
    with pytest.raises(ValueError, match=r"rope_table must be contiguous float32 \[-1, 64\], not bfloat16"):
        triton_rope.qk_norm_rope(qkv, q_weight, k_weight, table.bfloat16(), positions, *rest)
    with pytest.raises(ValueError, match=r"positions must be contiguous int64 \[4\]"):
        triton_rope.qk_norm_rope(qkv, q_weight, k_weight, table, ids, *rest)
    with pytest.raises(ValueError, match="a tail is fp32 or bf16, not 'int8'"):
        append("int8")
    with pytest.raises(ValueError, match=r"room for a block of 8192, not uint8 \[1, 8176\]"):
        append(slots=slots[:, :8176].contiguous())
    with pytest.raises(ValueError, match=r"slot_ids must be contiguous int32 \[4\]"):
        append(slot_ids=ids.long())
    with pytest.raises(ValueError, match=r"bad_rows must be contiguous uint8 \[4\]"):
        append(bad_rows=bad[:3])
