"""Linear layers and row kernels against float64 and their reference twins."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hmad.compute import linears
from hmad.compute.codecs import decode, encode
from hmad.compute.linears import Int8Linear, Linear, make_down, make_linear, round_bfp8, round_e4m3, stacked
from hmad.facts.errors import ModelError
from hmad.facts.formats import FORMATS
from hmad_kernels import cpu_rows
from hmad_kernels.cpu_rows import ScaledRows, wide
from hmad_kernels.cpu_turn import turned

SHAPES = ((5, 300), (48, 300))  # of int8 operands
BF16_ULP = 2.0**-7  # spacing of bfloat16 above 1: seven fraction bits
DTYPES = (torch.bfloat16, torch.float32)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- linears: an independent float64 computation of the same quantized numerics ---------------------------------------


def exact_plain(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def exact_int8(x: Tensor) -> np.ndarray:
    rows = x.float().numpy()
    largest = np.abs(rows).max(axis=1, keepdims=True)  # scales and quotients are float32 by definition
    return np.round(rows * (np.float32(127) / largest)).astype(np.float64) * (largest / np.float32(127))


def exact_fp8(x: Tensor) -> np.ndarray:
    """e4m3 by its definition: 3 mantissa bits, subnormals below 2^-6."""
    rows = x.float().numpy()
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(448)
    quotient = (rows / scale).astype(np.float64)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(quotient), 2.0**-30))), -6)
    step = 2.0 ** (exponent - 3)
    return np.round(quotient / step) * step * scale


def exact_bfp8(x: Tensor) -> np.ndarray:
    groups = x.double().numpy().reshape(len(x), -1, 16)
    step = 2.0 ** (np.floor(np.log2(np.abs(groups).max(axis=-1, keepdims=True))) - 6)
    magnitude = np.minimum(np.round(np.abs(groups) / step), 127)
    return (np.sign(groups) * magnitude * step).reshape(x.shape)


# Half a unit in the last place of the output, twice where sums are rounded before their scales.
ROUNDING = {"fp32": 1e-6, "bf16": BF16_ULP / 2, "int8": BF16_ULP, "fp8": BF16_ULP, "bfp8": BF16_ULP / 2}
EXACT = {"fp32": exact_plain, "bf16": exact_plain, "int8": exact_int8, "fp8": exact_fp8, "bfp8": exact_bfp8}


@pytest.mark.parametrize("num_rows", [1, 7, 65])
@pytest.mark.parametrize("precision", EXACT)
def test_linear_equals_float64_of_the_same_numerics(precision: str, num_rows: int) -> None:
    x = randn(num_rows, 96, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    parts = [randn(48, 96, seed=1), randn(16, 96, seed=2)]
    exact = EXACT[precision](x) @ np.concatenate([EXACT[precision](part) for part in parts]).T
    y = wide(make_linear(precision, *parts)(x))
    assert y.shape == (num_rows, 64)
    # What cancels in a float32 sum leaves its rounding behind: hence the absolute term.
    np.testing.assert_allclose(y.double().numpy(), exact, rtol=1.01 * ROUNDING[precision], atol=2e-5)


def test_int8_takes_rows_already_quantized() -> None:
    linear, x = make_linear("int8", randn(32, 64, seed=1)), randn(5, 64)
    assert torch.equal(wide(linear(cpu_rows.quantize_int8(x))), wide(linear(x)))
    down, gate_up = make_down("int8", randn(32, 64, seed=1)), randn(5, 128)
    assert torch.equal(wide(down(cpu_rows.silu_mul_int8(gate_up))), wide(down(cpu_rows.silu_mul(gate_up))))


@pytest.mark.parametrize("width", [96, 768])
@pytest.mark.parametrize("outlier", [1, 100])
def test_int8_down_equals_float64_of_the_same_numerics(width: int, outlier: int) -> None:
    x, weight = randn(7, width), randn(48, width, seed=1)
    x[:, 5] *= outlier
    exact = exact_int8(turned(x)) @ exact_int8(turned(weight)).T
    np.testing.assert_allclose(
        wide(make_down("int8", weight)(x)).double().numpy(), exact, rtol=1.01 * BF16_ULP, atol=2e-5 * outlier
    )


def test_what_turning_gains_int8_down() -> None:
    """With outliers nearly all the error; without, nothing is lost."""
    x, weight = randn(64, 768), randn(48, 768, seed=1)

    def error_of(product: Tensor) -> float:
        return float((product.double() - x.double() @ weight.double().T).norm())

    def gain() -> float:
        return error_of(wide(make_linear("int8", weight)(x))) / error_of(wide(make_down("int8", weight)(x)))

    assert 0.9 < gain() < 1.2
    x[:, 5::256] *= 100
    assert gain() > 4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "bfp8"])
def test_the_other_precisions_do_not_turn(precision: str) -> None:
    x, weight = randn(5, 64, dtype=torch.float32 if precision == "fp32" else torch.bfloat16), randn(32, 64, seed=1)
    assert torch.equal(make_down(precision, weight)(x), make_linear(precision, weight)(x))


@pytest.mark.parametrize("has_amx", [False, True])
def test_int8_sums_are_exact_with_and_without_matrix_units(has_amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to ask oneDNN give the same sums on any CPU with VNNI, though only one of them is fast there."""
    monkeypatch.setattr(linears, "has_amx", lambda: has_amx)
    x, weight = (torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1)) for shape in SHAPES)
    packed = torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), None)
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
    sums = linears.int8_product(x.to(torch.int8), packed, scales, zeros, torch.float32)
    assert torch.equal(sums.long(), x @ weight.T)


def test_int8_sums_are_exact() -> None:
    x = torch.full((3, 4096), 127.0)
    weight = torch.where(torch.arange(4096) % 2 == 0, 127.0, -126.0).repeat(16, 1)
    y = wide(Int8Linear([weight])(x.bfloat16()))
    assert y.unique().tolist() == [127.0 * 2048]


@pytest.mark.parametrize("make", [make_linear, make_down])
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8", "bfp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_weights_of_every_stored_dtype_load(precision: str, dtype: torch.dtype, make: Callable[..., Linear]) -> None:
    weight, x = randn(32, 64, seed=1), randn(4, 64)
    expected, actual = (wide(make(precision, stored)(x)) for stored in (weight, weight.to(dtype)))
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0)


def test_a_single_part_of_the_right_dtype_is_not_copied() -> None:
    weight = randn(4, 8)
    assert stacked([weight], torch.bfloat16).data_ptr() == weight.data_ptr()


def test_bfp8_needs_whole_groups() -> None:
    with pytest.raises(ModelError, match="16 divides"):
        make_linear("bfp8", randn(4, 24))


def test_bfp8_rounds_to_even_and_saturates() -> None:
    unit = 2.0**-6
    x = torch.zeros(1, 16)
    x[0, :6] = torch.tensor([1.0, 2.5 * unit, 3.5 * unit, -2.5 * unit, 2.6 * unit, 127.9 * unit])
    assert (round_bfp8(x)[0, :6] / unit).tolist() == [64, 2, 4, -2, 3, 127]


def test_zero_rows_stay_zero_and_nan_rows_nan() -> None:
    x = torch.zeros(2, 32)
    x[1, 3] = torch.nan
    e4m3, scales = round_e4m3(x)
    rows = cpu_rows.quantize_int8(x)
    for y in (round_bfp8(x), e4m3 * scales, rows.values * rows.scales[:, None]):
        assert y[0].tolist() == [0.0] * 32
        assert y[1].isnan().any()


# --- the turn ---------------------------------------------------------------------------------------------------------


def hadamard(size: int) -> np.ndarray:
    """Sylvester's, orthonormal, float64."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix / np.sqrt(size)


# 100 and 7 have no power of two of note, and 1024 has more than is turned together.
@pytest.mark.parametrize(
    ("width", "block"), [(128, 128), (64, 64), (1024, 256), (768, 256), (96, 32), (80, 16), (8, 8), (100, 4), (7, 1)]
)
def test_turning_is_a_product_with_hadamard_matrices_and_its_own_inverse(width: int, block: int) -> None:
    rows = randn(5, width, dtype=torch.float32)
    exact = (rows.double().numpy().reshape(-1, block) @ hadamard(block)).reshape(5, width)
    np.testing.assert_allclose(turned(rows).numpy(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(turned(turned(rows)), rows, rtol=0, atol=4e-6)


def test_a_key_with_an_outlier_channel_loses_less() -> None:
    keys, values = randn(32, 2, 128, dtype=torch.float32), randn(32, 2, 128, dtype=torch.float32, seed=1)
    keys[:, :, 5] += 50

    def noise(k: Tensor) -> float:
        blocks = encode(FORMATS["int8"], k, values)
        return float((decode(FORMATS["int8"], blocks, *k.shape)[0] - k).norm())

    assert noise(turned(keys)) < noise(keys) / 4


@pytest.mark.parametrize("head_dim", [8, 64, 96, 128])
def test_attention_sees_no_turn(head_dim: int) -> None:
    """q.k in float64 of heads that were normed and rotated, but not turned."""
    qkv, ones = randn(9, 4 * head_dim, dtype=torch.float32), torch.ones(head_dim)
    angles = randn(9, head_dim // 2, dtype=torch.float32, seed=1)
    cos, sin = angles.double().cos()[:, None], angles.double().sin()[:, None]
    heads = qkv.double().view(9, 4, head_dim)[:, :3]
    low, high = (heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-6)).chunk(2, dim=-1)
    exact = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    found = cpu_rows.qk_norm_rope(qkv, ones, ones, table, 2, 1, 1e-6).view(9, 4, head_dim).double()
    for head in range(2):
        torch.testing.assert_close(
            found[:, head] @ found[:, 2].T, exact[:, head] @ exact[:, 2].T, rtol=0, atol=1e-6 * head_dim
        )


# --- row kernels against their twins ----------------------------------------------------------------------------------


def assert_close_rows(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the order of a sum: one rounding step of the row's type."""
    rtol = BF16_ULP if actual.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "n"), [(1, 8), (3, 100), (130, 1024)])
def test_add_rms_norm(dtype: torch.dtype, num_rows: int, n: int) -> None:
    x, delta = randn(num_rows, n, dtype=dtype), randn(num_rows, n, dtype=dtype, seed=1)
    weight, expected_x = randn(n, dtype=dtype, seed=2), x.clone()
    expected = cpu_rows.add_rms_norm_reference(expected_x, delta, weight, 1e-6)
    assert_close_rows(cpu_rows.add_rms_norm(x, delta, weight, 1e-6), expected)
    assert torch.equal(x, expected_x)
    assert_close_rows(cpu_rows.add_rms_norm(x, None, weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "n"), [(1, 8), (3, 100), (130, 1024)])
def test_silu_mul(dtype: torch.dtype, num_rows: int, n: int) -> None:
    gate_up = randn(num_rows, 2 * n, dtype=dtype) * 20
    assert_close_rows(cpu_rows.silu_mul(gate_up), cpu_rows.silu_mul_reference(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_int8(dtype: torch.dtype) -> None:
    x = randn(130, 1000, dtype=dtype) * torch.logspace(-20, 20, 130)[:, None].to(dtype)
    actual, expected = cpu_rows.quantize_int8(x), cpu_rows.quantize_int8_reference(x)
    assert torch.equal(actual.values, expected.values)
    assert torch.equal(actual.scales, expected.scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_quantization_equals_quantization_after(dtype: torch.dtype) -> None:
    x, weight = randn(5, 64, dtype=dtype), randn(64, dtype=dtype)
    every_block = [randn(3, 2 * 3 * block, dtype=dtype) for block in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
    for fused, plain in (
        (cpu_rows.add_rms_norm_int8(x, None, weight, 1e-6), cpu_rows.add_rms_norm(x, None, weight, 1e-6)),
        *((cpu_rows.silu_mul_int8(rows), turned(cpu_rows.silu_mul(rows))) for rows in every_block),
    ):
        expected = cpu_rows.quantize_int8(plain)
        assert torch.equal(fused.values, expected.values)
        assert torch.equal(fused.scales, expected.scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 8), (5, 1, 128), (8, 2, 64), (2, 1, 96)])
def test_qk_norm_rope(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    qkv = randn(70, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    weights = randn(head_dim, dtype=dtype, seed=1), randn(head_dim, dtype=dtype, seed=2)
    arguments = *weights, randn(70, head_dim, dtype=dtype, seed=3), num_heads, num_kv_heads, 1e-6
    for product in (qkv, ScaledRows(qkv.clone(), randn(70, dtype=torch.float32, seed=4))):
        expected = cpu_rows.qk_norm_rope_reference(product, *arguments)
        actual = cpu_rows.qk_norm_rope(product, *arguments)
        # A rotated value is a difference of two rounded products.
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.07 if dtype == torch.bfloat16 else 2e-5)
        untouched = num_kv_heads * head_dim
        assert torch.equal(actual[:, -untouched:], expected[:, -untouched:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_a_product_are_applied_by_its_reader(dtype: torch.dtype) -> None:
    x, weight = randn(70, 96, dtype=dtype), randn(96, dtype=dtype, seed=1)
    delta = ScaledRows(randn(70, 96, dtype=dtype, seed=2), randn(70, dtype=torch.float32, seed=3))
    expected_x = x.clone()
    expected = cpu_rows.add_rms_norm_reference(expected_x, delta, weight, 1e-6)
    assert_close_rows(cpu_rows.add_rms_norm(x, delta, weight, 1e-6), expected)
    assert torch.equal(x, expected_x)
    assert_close_rows(cpu_rows.silu_mul(delta), cpu_rows.silu_mul_reference(delta))


def test_launchers_refuse_what_a_kernel_would_misread() -> None:
    x, weight = randn(4, 8), randn(8)
    for bad in (x.T, x[:, ::2], x.float()):
        with pytest.raises(ValueError, match="contiguous"):
            cpu_rows.add_rms_norm(bad, None, weight, 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        cpu_rows.add_rms_norm(x, x[:2], weight, 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        cpu_rows.qk_norm_rope(x, weight, weight, x, 1, 1, 1e-6)
