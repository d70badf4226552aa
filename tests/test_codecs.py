"""The KV codecs: golden vectors made by others, the rules of docs/formats.md one by one, and properties."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmad.compute.codecs import decode, encode
from hmad.facts.errors import NonFiniteKVError
from hmad.facts.formats import FORMATS, KVFormat

VECTORS = Path(__file__).parent / "vectors"
INT8, FP8, MXFP8, BFP8 = (FORMATS[name] for name in ("int8", "fp8_e4m3", "mxfp8", "bfp8"))
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
scaled_by_token = pytest.mark.parametrize(("fmt", "largest"), [(INT8, 127.0), (FP8, 448.0)], ids=["int8", "fp8_e4m3"])

# The largest rounding error: relative to the value, relative to the largest value that shares its scale, absolute.
ROUNDING = {
    "fp32": (0.0, 0.0, 0.0),
    "bf16": (2.0**-8, 0.0, 2.0**-134),
    "int8": (0.0, 0.5 / 127 * 1.0001, 127 * 2.0**-126),
    "fp8_e4m3": (2.0**-4 * 1.0001, 2.0**-10 / 448 * 1.0001, 448 * 2.0**-126),
    "mxfp8": (2.0**-3, 2.0**-10 / 256, 2.0**-127),  # floor scaling saturates up to 12.5 % below the peak
    "bfp8": (0.0, 2.0**-7 * 1.01, 2.0**-126),
}
SHARE_A_SCALE = {"mxfp8": 32, "bfp8": 16}  # others: a whole token


def one_head(values: Tensor) -> Tensor:
    """[tokens, head_dim] -> [tokens, 1, head_dim]."""
    return values.unsqueeze(1)


def encode_k(fmt: KVFormat, values: Tensor) -> np.ndarray:
    """The K panels uint8 [num_blocks, panel_bytes] of one head's values [tokens, head_dim]."""
    k = one_head(values)
    return encode(fmt, k, torch.zeros_like(k))[:, : fmt.panel_bytes(values.shape[1])].numpy()


def decode_k(fmt: KVFormat, panels: np.ndarray, head_dim: int) -> np.ndarray:
    """The values [tokens, head_dim] of one head's K panels."""
    blocks = torch.from_numpy(np.concatenate((panels, np.zeros_like(panels)), axis=1))
    k, _ = decode(fmt, blocks, len(panels) * fmt.tokens_per_block, 1, head_dim)
    return k[:, 0].numpy()


def e4m3_value(byte: int) -> float:
    """What an E4M3 byte means, by the letter of the OCP format."""
    exponent, mantissa = byte >> 3 & 0xF, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte & 0x80 else size


def bfp8_value(tile: np.ndarray, token: int, dim: int) -> float:
    """What one element of a 1,088-byte tile means, by the letter of docs/formats.md."""
    face, row, column = token // 16 * 2 + dim // 16, token % 16, dim % 16
    byte = int(tile[64 + face * 256 + row * 16 + column])
    size = (byte & 0x7F) * 2.0 ** (int(tile[face * 16 + row]) - 127 - 6)
    return -size if byte & 0x80 else size


def test_bfp8_encodes_the_golden_tiles() -> None:
    golden = np.load(VECTORS / "bfp8_tiles.npz")
    panels = encode_k(BFP8, torch.from_numpy(golden["values"]).reshape(-1, 32))
    np.testing.assert_array_equal(panels, golden["packed"])


def test_bfp8_decodes_the_golden_tiles() -> None:
    packed = np.load(VECTORS / "bfp8_tiles.npz")["packed"]
    expected = [[bfp8_value(tile, t, d) for d in range(32)] for tile in packed for t in range(32)]
    np.testing.assert_array_equal(decode_k(BFP8, packed, 32), np.array(expected))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_mxfp8_encodes_the_golden_vectors(head_dim: int) -> None:
    golden = np.load(VECTORS / "mxfp8.npz")
    panels = encode_k(MXFP8, torch.from_numpy(golden[f"values_{head_dim}"]).reshape(-1, head_dim))
    np.testing.assert_array_equal(panels[:, : 32 * head_dim], golden[f"data_{head_dim}"].reshape(len(panels), -1))
    np.testing.assert_array_equal(panels[:, 32 * head_dim :], golden[f"scale_{head_dim}"].reshape(len(panels), -1))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_mxfp8_decodes_the_golden_vectors(head_dim: int) -> None:
    golden = np.load(VECTORS / "mxfp8.npz")
    data, scale = golden[f"data_{head_dim}"], golden[f"scale_{head_dim}"]
    values = np.vectorize(e4m3_value)(data) * np.repeat(2.0 ** (scale.astype(np.float64) - 127), 32, axis=-1)
    panels = np.concatenate((data.reshape(len(data), -1), scale.reshape(len(data), -1)), axis=1)
    np.testing.assert_array_equal(decode_k(MXFP8, panels, head_dim), values.reshape(-1, head_dim))


def test_mxfp8_holds_values_down_to_its_smallest_scale() -> None:
    values = torch.zeros(32, 64)
    values[0, :3] = torch.tensor([448.0, -1.5, 2.0**-9]) * 2.0**-127
    panels = encode_k(MXFP8, values)
    assert not panels[0, 32 * 64 :].any()
    assert panels[0, :3].tolist() == [0x7E, 0xBC, 0x01]
    np.testing.assert_array_equal(decode_k(MXFP8, panels, 64), values.numpy())


def test_bfp8_reads_magnitudes_that_are_not_normalised() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2, 1088), dtype=np.uint8)
    tiles[0, :64] = np.arange(64)  # down to scales that are subnormal
    tiles[1, :64] = np.arange(190, 254)
    expected = [[bfp8_value(tile, t, d) for d in range(32)] for tile in tiles for t in range(32)]
    np.testing.assert_array_equal(decode_k(BFP8, tiles, 32), np.array(expected))


def test_bfp8_rounds_ties_to_even_and_gives_zero_no_sign() -> None:
    values = torch.zeros(32, 32)
    values[0, :7] = torch.tensor([64.0, 2.5, -3.5, -0.5, 0.49, -0.0, 127.9])
    panel = encode_k(BFP8, values)[0]
    assert panel[0] == 127 + 6
    assert panel[64:71].tolist() == [64, 2, 0x84, 0, 0, 0, 127]


def test_e4m3_rounds_ties_to_even_and_saturates() -> None:
    values = torch.zeros(32, 64)
    values[0, :8] = torch.tensor([511.0, 500.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 440.0])
    panel = encode_k(MXFP8, values)[0]
    assert panel[32 * 64] == 127  # 511 shares exponent 8, so the scale is 1
    assert panel[:8].tolist() == [0x7E, 0x7E, 0x58, 0x5A, 0xD8, 0, 2, 0x7E]


@scaled_by_token
def test_scale_is_the_correctly_rounded_quotient(fmt: KVFormat, largest: float) -> None:
    peaks = torch.rand(320, generator=torch.Generator().manual_seed(1)) + 0.5
    values = torch.zeros(320, 64)
    values[:, 5] = -peaks
    scales = encode_k(fmt, values)[:, 32 * 64 :].copy().view(np.float32).reshape(-1)
    expected = (peaks.double() / largest).float().numpy()
    np.testing.assert_array_equal(scales, expected)
    reciprocal = peaks.numpy() * np.float32(1 / largest)
    assert (reciprocal != expected).any(), "these peaks could not tell a division from a multiplication"


@scaled_by_token
def test_tiny_scales_become_one_and_their_values_zero(fmt: KVFormat, largest: float) -> None:
    smallest = largest * 2.0**-126
    values = torch.zeros(32, 64)
    values[0, :2] = torch.tensor([-smallest * 0.999, -0.0])
    values[1, 0] = smallest
    panel = encode_k(fmt, values)[0]
    scales = panel[32 * 64 :].copy().view(np.float32)
    assert scales[:3].tolist() == [1.0, 2.0**-126, 1.0]
    assert not panel[:64].any()
    assert panel[64] == (127 if fmt is INT8 else 0x7E)


def test_blocks_interleave_k_and_v_by_head_and_pad_with_zeros() -> None:
    k = torch.arange(9 * 2 * 4, dtype=torch.float32).reshape(9, 2, 4)
    blocks = encode(FORMATS["fp32"], k, -k).view(torch.float32)
    blocks = blocks.reshape(2, 2, 2, 8, 4)  # [block, head, k or v, token, dim]
    torch.testing.assert_close(blocks[0, :, 0], k[:8].transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(blocks[1, 1, 1, 0], -k[8, 1], rtol=0, atol=0)
    assert not blocks[1, :, :, 1:].any()


@every_format
def test_padding_is_encoded_as_zeros(fmt: KVFormat) -> None:
    k = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(2))
    padded = torch.cat((k, torch.zeros(fmt.tokens_per_block - 3, 2, 64)))
    assert torch.equal(encode(fmt, k, k), encode(fmt, padded, padded))


@every_format
def test_strides_and_bfloat16_do_not_matter(fmt: KVFormat) -> None:
    qkv = torch.randn(64, 3 * 40, 2, generator=torch.Generator().manual_seed(3)).bfloat16()
    k, v = qkv[:, :40].permute(1, 2, 0), qkv[:, 40:80].permute(1, 2, 0)  # [40, 2, 64], the last dimension strided
    blocks = encode(fmt, k, v)
    assert blocks.shape == (fmt.num_blocks(40), 4 * fmt.panel_bytes(64))
    assert torch.equal(blocks, encode(fmt, k.float().contiguous(), v.float().contiguous()))


@every_format
def test_decode_ignores_the_rest_of_the_slot(fmt: KVFormat) -> None:
    k = torch.randn(5, 1, 64, generator=torch.Generator().manual_seed(4))
    blocks = encode(fmt, k, -k)
    slots = torch.nn.functional.pad(blocks, (0, 7), value=255)
    for narrow, wide in zip(decode(fmt, blocks, 5, 1, 64), decode(fmt, slots, 5, 1, 64), strict=True):
        assert torch.equal(narrow, wide)


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_row(fmt: KVFormat, value: float) -> None:
    k, v = torch.zeros(40, 2, 64), torch.zeros(40, 2, 64)
    k[3, 1, 5] = v[33, 0, 63] = value
    with pytest.raises(NonFiniteKVError, match="token rows") as caught:
        encode(fmt, k, v)
    assert caught.value.rows == (3, 33)


def test_bf16_refuses_what_would_round_to_infinity() -> None:
    k = torch.full((1, 1, 64), 3.4e38)
    with pytest.raises(NonFiniteKVError):
        encode(FORMATS["bf16"], k, k)
    encode(FORMATS["fp32"], k, k)


@pytest.mark.parametrize(("name", "head_dim"), [("int8", 32), ("fp8_e4m3", 32), ("mxfp8", 48), ("bfp8", 80)])
def test_a_format_that_does_not_fit_is_refused(name: str, head_dim: int) -> None:
    k = torch.zeros(1, 1, head_dim)
    with pytest.raises(ValueError, match=f"head_dim {head_dim}"):
        encode(FORMATS[name], k, k)


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"want uint8 \[2, 4352\]"):
        decode(BFP8, torch.zeros(1, 4352, dtype=torch.uint8), 33, 1, 64)


@st.composite
def wild_values(draw: st.DrawFn) -> Tensor:
    """[tokens, 64] with magnitudes spread over many binades, zeros of both signs and subnormals."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tokens, spread, middle = draw(st.integers(1, 70)), draw(st.integers(0, 40)), draw(st.integers(-110, 60))
    binades = middle + spread * (torch.rand(tokens, 64, generator=generator) - 0.5)
    values = torch.randn(tokens, 64, generator=generator) * binades.exp2()
    kinds = torch.rand(tokens, 64, generator=generator)
    return values.masked_fill(kinds < 0.03, 0.0).masked_fill(kinds > 0.97, -0.0).masked_fill(kinds > 0.99, 1e-40)


@every_format
@settings(max_examples=12, deadline=None)
@given(values=wild_values())
def test_decoded_values_are_within_the_rounding_of_the_format(fmt: KVFormat, values: Tensor) -> None:
    k, v = one_head(values), one_head(values.flip(0))
    decoded, decoded_v = decode(fmt, encode(fmt, k, v), len(values), 1, 64)
    group = SHARE_A_SCALE.get(fmt.name, 64)
    peak = torch.unflatten(values.abs(), 1, (-1, group)).amax(-1).repeat_interleave(group, dim=1)
    of_value, of_peak, absolute = ROUNDING[fmt.name]
    assert ((decoded[:, 0] - values).abs() <= values.abs() * of_value + peak * of_peak + absolute).all()
    assert torch.equal(decoded_v.flip(0), decoded)


@every_format
@settings(max_examples=8, deadline=None)
@given(values=wild_values())
def test_encoding_what_was_decoded_changes_nothing(fmt: KVFormat, values: Tensor) -> None:
    k = one_head(values)
    once, _ = decode(fmt, encode(fmt, k, k), len(k), 1, 64)
    twice, _ = decode(fmt, encode(fmt, once, once), len(k), 1, 64)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=2.0**-120)
