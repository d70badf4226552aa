"""The forward pass against transformers, and every precision against float64."""

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hmad.compute.loading import load_model
from hmad.compute.model import Projected, Qwen3

SHAPES = [
    # group 1, 4, 5, 8; head_dim 32, 64, 128; tied or not; sharded or not; both spellings of the rotary base
    {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32},
    {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "tied": False, "rope_style": "rope_theta"},
    {"num_heads": 5, "num_kv_heads": 1, "head_dim": 128, "sharded": True},
    {"num_heads": 8, "num_kv_heads": 1, "head_dim": 32, "tied": False, "sharded": True, "rope_style": "rope_theta"},
]
# Relative error of the hidden states against fp32 after four layers: what this random model shows, with half as much
# again to spare. tests/test_linears.py holds each precision to its exact numerics; this one guards how they add up.
ERROR_BOUNDS = {"bf16": 0.034, "int8": 0.08, "fp8": 0.27, "bfp8": 0.085}


def forward(model: Qwen3, token_ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Hidden states of one prompt, by torch's attention."""

    def attend(layer_id: int, rows: Projected) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in model.heads(rows))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).squeeze(0).transpose(0, 1)

    return model.forward(token_ids, torch.arange(len(token_ids)) if positions is None else positions, attend)


def prompt(vocab: int, length: int = 50) -> Tensor:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_equals_transformers(tmp_path: Path, shape: dict) -> None:
    reference = write_checkpoint(tmp_path, **shape)
    model = load_model(tmp_path, "fp32")
    token_ids = prompt(320)
    with torch.inference_mode():
        expected = reference(token_ids[None]).logits[0]
    torch.testing.assert_close(model.logits(forward(model, token_ids)), expected, atol=1e-4, rtol=0)


def test_bf16_is_as_close_to_fp32_as_transformers_bf16(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path, num_layers=4, dtype=torch.bfloat16)
    token_ids = prompt(320)
    ours = load_model(tmp_path, "bf16")
    with torch.inference_mode():
        theirs = reference(token_ids[None]).logits[0].float()
        exact = reference.float()(token_ids[None]).logits[0]
    our_error = (ours.logits(forward(ours, token_ids)) - exact).norm()
    assert our_error < 1.2 * (theirs - exact).norm()


@pytest.mark.parametrize("precision", ERROR_BOUNDS)
def test_error_against_fp32_is_bounded(tmp_path: Path, precision: str) -> None:
    write_checkpoint(tmp_path, num_layers=4, hidden=128, intermediate=256)
    token_ids = prompt(320)
    exact = forward(load_model(tmp_path, "fp32"), token_ids)
    hidden = forward(load_model(tmp_path, precision), token_ids)
    error = ((hidden.float() - exact).norm() / exact.norm()).item()
    assert ERROR_BOUNDS[precision] / 3 < error < ERROR_BOUNDS[precision]


def test_tokens_one_by_one_equal_the_whole_prompt(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model = load_model(tmp_path, "fp32")
    token_ids = prompt(320, 12)
    cache: dict[int, list[tuple[Tensor, Tensor]]] = {0: [], 1: []}

    def attend_cache(layer_id: int, rows: Projected) -> Tensor:
        q, k, v = model.heads(rows)
        cache[layer_id].append((k, v))
        past_k, past_v = (torch.cat(part).transpose(0, 1)[None] for part in zip(*cache[layer_id], strict=True))
        out = scaled_dot_product_attention(q.transpose(0, 1)[None], past_k, past_v, enable_gqa=True)
        return out[0].transpose(0, 1)

    steps = [model.forward(token_ids[i : i + 1], torch.tensor([i]), attend_cache) for i in range(12)]
    torch.testing.assert_close(torch.cat(steps), forward(model, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "fp8", "bfp8"])
def test_nan_in_one_token_stays_visible_and_alone(tmp_path: Path, precision: str) -> None:
    write_checkpoint(tmp_path)
    model = load_model(tmp_path, precision)

    def poison(layer_id: int, rows: Projected) -> Tensor:
        attended = model.heads(rows)[0].clone()
        attended[1, 0, 0] = torch.nan
        return attended

    hidden = model.forward(prompt(320, 3), torch.arange(3), poison)
    assert hidden.isnan().any(dim=1).tolist() == [False, True, False]


def test_ids_outside_the_tables_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model = load_model(tmp_path, "fp32")
    with pytest.raises(IndexError):
        forward(model, torch.tensor([320]))
    with pytest.raises(IndexError):
        forward(model, torch.tensor([0]), torch.tensor([1024]))


def test_dummy_is_the_same_for_a_seed_and_finite(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_layers=12)
    (tmp_path / "model.safetensors").unlink()
    token_ids = prompt(320)
    one, again, other = (forward(load_model(tmp_path, "bf16", "dummy", seed), token_ids) for seed in (1, 1, 2))
    assert one.isfinite().all()
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
