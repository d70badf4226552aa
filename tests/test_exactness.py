"""Token for token against transformers: fp32 on both nodes, two real daemons, in by REST and out by REST; on a CPU and,
where there is one, on a GPU.
"""

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from daemons import DecodeDaemon, PrefillDaemon, needs_gpu, running

VOCAB = 320
PROMPT_TOKENS = (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 129, 300, 600)
NUM_OUTPUT_TOKENS = 20
CHUNK_TOKENS = 64
TIE = 1e-4  # two best logits of the reference closer than this may change places
LOGITS_TOLERANCE = 1e-3
OTHER_WAYS = {"tied": False, "rope_style": "rope_theta"}
SHAPES: dict[str, dict[str, Any]] = {
    "group1-dim32": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32},
    "group4-dim64-untied": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, **OTHER_WAYS},
    "group5-dim128-sharded": {"num_heads": 5, "num_kv_heads": 1, "head_dim": 128, "sharded": True},
    "group8-dim32-untied-sharded": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 32, "sharded": True, **OTHER_WAYS},
}

Report = Callable[[str], None]


@dataclass
class Setup:
    """A model at transformers and in daemons."""

    reference: Any
    prefills: dict[str, PrefillDaemon]  # whole: a prompt in one pass; chunked: in several

    def expected_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """float32 [len(answer), vocab]: what the reference says before each token of the answer."""
        token_ids = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            return self.reference(token_ids).logits[0, len(prompt) - 1 : -1]


ON_A_GPU = [  # its kernels know head_dim 64 and 128
    pytest.param((shape, "cuda:0"), id=f"{shape}-gpu", marks=needs_gpu) for shape in SHAPES if "dim32" not in shape
]


@pytest.fixture(scope="module", params=[*(pytest.param((shape, "cpu"), id=shape) for shape in SHAPES), *ON_A_GPU])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    shape, device = request.param
    directory = tmp_path_factory.mktemp("model")
    reference = write_checkpoint(directory, vocab=VOCAB, **SHAPES[shape])
    flags = {"precision": "fp32", "device": device}
    decode = DecodeDaemon(directory, arena_bytes="64M", **flags)
    whole = PrefillDaemon(directory, [decode], **flags)
    chunked = PrefillDaemon(directory, [decode], max_batch_tokens=CHUNK_TOKENS, **flags)
    with running(decode, whole, chunked):
        yield Setup(reference, {"whole": whole, "chunked": chunked})
        decode.wait_until_empty()


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Say something in the test run's output, pass or fail."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", end="")

    return say


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def check_greedy(setup: Setup, prompt: Sequence[int], answer: Sequence[int], report: Report) -> None:
    """Every token is the reference's best after the same tokens before it, which by induction is its greedy answer.

    A tie of the reference is reported; what follows is then no longer its own answer, so it is left alone.
    """
    assert len(answer) == NUM_OUTPUT_TOKENS
    for index, logits in enumerate(setup.expected_logits(prompt, answer)):
        (best, second), (token_id, other) = (x.tolist() for x in logits.topk(2))
        if answer[index] == token_id:
            continue
        assert answer[index] == other, f"token {index} after {len(prompt)} prompt tokens is neither of the best"
        assert best - second < TIE, f"token {index} after {len(prompt)} prompt tokens: {answer[index]}, not {token_id}"
        report(f"tie: token {index} after {len(prompt)} prompt tokens, logits {best - second:.1e} apart")
        return


@pytest.mark.parametrize("passes", ["whole", "chunked"])
def test_greedy_tokens_alone(setup: Setup, passes: str, report: Report) -> None:
    for prompt in prompts_of(PROMPT_TOKENS[::3]):
        [choice] = setup.prefills[passes].complete(prompt, max_tokens=NUM_OUTPUT_TOKENS).choices
        check_greedy(setup, prompt, choice["token_ids"], report)


@pytest.mark.parametrize("passes", ["whole", "chunked"])
def test_greedy_tokens_batched(setup: Setup, passes: str, report: Report) -> None:
    """All prompts at once: prefill packs them into common passes, decode into common steps."""
    prompts = prompts_of(PROMPT_TOKENS)
    choices = setup.prefills[passes].complete(prompts, max_tokens=NUM_OUTPUT_TOKENS).choices
    for prompt, choice in zip(prompts, choices, strict=True):
        check_greedy(setup, prompt, choice["token_ids"], report)


def test_greedy_tokens_are_what_generate_says(setup: Setup, report: Report) -> None:
    """The check itself against transformers' own loop, on one prompt."""
    [prompt] = prompts_of([50])
    with torch.inference_mode():
        output = setup.reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_OUTPUT_TOKENS, eos_token_id=None
        )
    answer = output[0, len(prompt) :].tolist()
    check_greedy(setup, prompt, answer, report)
    [choice] = setup.prefills["whole"].complete(prompt, max_tokens=NUM_OUTPUT_TOKENS).choices
    assert choice["token_ids"] == answer


@pytest.mark.parametrize("passes", ["whole", "chunked"])
def test_logits_after_forced_tokens(setup: Setup, passes: str) -> None:
    prompts = prompts_of([1, 40, 97, 600])
    forced = prompts_of([NUM_OUTPUT_TOKENS])[0]
    choices = setup.prefills[passes].complete(prompts, forced_token_ids=forced, return_logits=True).choices
    for prompt, choice in zip(prompts, choices, strict=True):
        assert choice["token_ids"] == forced
        logits = torch.from_numpy(logits_of(choice))
        torch.testing.assert_close(logits, setup.expected_logits(prompt, forced), atol=LOGITS_TOLERANCE, rtol=0)


def logits_of(choice: dict[str, Any]) -> np.ndarray:
    """float32 [tokens, vocab]"""
    return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in choice["logits"]]).copy()
