"""Linear layers over few rows. test_triton_kernels.py runs this file as it does the others."""

import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from hmad_kernels import triton_linear
from hmad_kernels.triton_linear import MOST_ROWS, linear_few_rows, takes

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def operands(num_rows: int, num_columns: int, depth: int, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Whole numbers, whose sums are the same float32 in any order; or what weights and activations look like."""
    generator = torch.Generator().manual_seed(num_rows)
    shapes = ((num_rows, depth), (num_columns, depth))
    if whole:
        return tuple(torch.randint(-9, 10, shape, generator=generator).bfloat16() for shape in shapes)  # type: ignore[return-value]
    x, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.bfloat16(), (0.02 * weight).bfloat16()


@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, MOST_ROWS])
@pytest.mark.parametrize("num_columns", [64, 192])
def test_sums_are_exact(num_rows: int, num_columns: int) -> None:
    x, weight = operands(num_rows, num_columns, 1024, whole=True)
    expected = (x.double() @ weight.double().t()).bfloat16()
    assert torch.equal(linear_few_rows(x.to(DEVICE), weight.to(DEVICE)).cpu(), expected)


def test_a_wide_weight_is_multiplied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "WIDE", 192)  # else the interpreter has too much to do
    x, weight = operands(3, 192, 512, whole=True)
    expected = (x.double() @ weight.double().t()).bfloat16()
    assert torch.equal(linear_few_rows(x.to(DEVICE), weight.to(DEVICE)).cpu(), expected)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_as_near_to_float64_as_torch_is(num_rows: int) -> None:
    x, weight = operands(num_rows, 128, 4096, whole=False)
    exact = x.double() @ weight.double().t()
    found = linear_few_rows(x.to(DEVICE), weight.to(DEVICE)).cpu().double()
    assert (found - exact).norm() <= 1.1 * (linear(x, weight).double() - exact).norm()


def test_refuses_what_does_not_fit() -> None:
    weight = torch.zeros(64, 512, dtype=torch.bfloat16, device=DEVICE)
    x = weight[:1]
    with pytest.raises(ValueError, match=r"1 to 16 rows .* not bfloat16 \[17, 512\], .* and bfloat16 \[64, 512\]"):
        linear_few_rows(weight[:17], weight)
    with pytest.raises(ValueError, match=r"x must be contiguous bfloat16 \[-1, 512\], not float32"):
        linear_few_rows(x.float(), weight)
    for other in (weight[:63], weight[:, :256].contiguous(), weight.float()):
        assert not takes(other)
    with pytest.raises(ValueError, match=r"multiples of \[64, 512\]"):
        linear_few_rows(x, weight[:63])
