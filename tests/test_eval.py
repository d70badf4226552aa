"""``hmad eval``: its statistics, its files, and a small evaluation that is killed, goes on, and finds out 3 bits."""

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from daemons import clean_environment, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

from hmad.compute.device import EncodedBlocks
from hmad.edges.cli import main
from hmad.edges.evaluation import table
from hmad.edges.evaluation.coarse_node import coarsen
from hmad.edges.evaluation.journal import Forced, Free, Header, Journal, Record, Traffic
from hmad.edges.evaluation.measures import RowMeasures, measure_all
from hmad.edges.evaluation.questions import BrokenLineError, Item, Question, Task, is_right, read_tasks
from hmad.edges.evaluation.settings import Pair, Settings
from hmad.edges.evaluation.statistics import (
    Z_95,
    PairedLoss,
    divergences,
    first_difference,
    surprises,
)
from hmad.facts.errors import ConfigError
from hmad.facts.formats import KVGeometry

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "scripts" / "checkpoint"

# --- statistics ---


def likeliest_score(loss: PairedLoss, true_loss: float) -> float:
    """The score statistic by brute force: the likeliest share of gains is looked for, not solved for."""
    n, same = loss.num_questions, loss.num_questions - loss.lost - loss.gained
    gains = np.linspace(max(0.0, -true_loss), (1 - true_loss) / 2, 200_001)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [(loss.lost, gains + true_loss), (loss.gained, gains), (same, 1 - 2 * gains - true_loss)]
        likelihood = sum(np.where(count > 0, count * np.log(np.maximum(p, 0.0)), 0.0) for count, p in terms)
    gained = gains[int(np.argmax(likelihood))]
    return (loss.lost - loss.gained - n * true_loss) / math.sqrt(n * (2 * gained + true_loss * (1 - true_loss)))


@st.composite
def paired_losses(draw: st.DrawFn) -> PairedLoss:
    n = draw(st.integers(20, 3000))
    lost = draw(st.integers(0, n // 3))
    return PairedLoss(n, lost, draw(st.integers(0, n // 3)))


@given(paired_losses())
@settings(max_examples=15, deadline=None)
def test_the_interval_ends_where_the_score_is_unlikely(loss: PairedLoss) -> None:
    assert loss.low < loss.loss < loss.high
    assert likeliest_score(loss, loss.high) == pytest.approx(-Z_95, rel=2e-3)
    assert likeliest_score(loss, loss.low) == pytest.approx(Z_95, rel=2e-3)


@given(paired_losses())
@settings(max_examples=40, deadline=None)
def test_the_interval_of_a_gain_is_that_of_a_loss_mirrored(loss: PairedLoss) -> None:
    mirrored = PairedLoss(loss.num_questions, loss.gained, loss.lost)
    assert (mirrored.low, mirrored.high) == pytest.approx((-loss.high, -loss.low), abs=1e-9)


@pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.02), (0.004, 0.0), (0.0, 0.0), (0.1, 0.03)])
def test_the_interval_holds_the_true_loss_as_often_as_it_says(lost: float, gained: float) -> None:
    draws = np.random.default_rng(1).multinomial(800, [lost, gained, 1 - lost - gained], size=400)
    intervals = [PairedLoss(800, int(a), int(b)) for a, b, _ in draws]
    held = sum(found.low <= lost - gained + 1e-12 and lost - gained - 1e-12 <= found.high for found in intervals)
    assert held / len(intervals) >= 0.92


def test_nothing_lost_in_a_thousand_is_not_nothing_lost() -> None:
    assert PairedLoss(1000, 0, 0).high == pytest.approx(Z_95**2 / (1000 + Z_95**2))
    assert PairedLoss.of([True, True, False, False], [True, False, True, False]) == PairedLoss(4, 1, 1)


@pytest.mark.parametrize(
    ("loss", "verdict"),
    [
        (PairedLoss(1000, 0, 0), "non-inferior"),
        (PairedLoss(700, 0, 0), "cannot tell"),
        (PairedLoss(1000, 12, 10), "cannot tell"),
        (PairedLoss(1000, 20, 2), "worse"),
        (PairedLoss(1000, 2, 20), "non-inferior"),
        (PairedLoss(100_000, 100, 10), "non-inferior"),  # surely worse, and surely by too little to matter
    ],
)
def test_verdicts(loss: PairedLoss, verdict: str) -> None:
    assert loss.verdict(0.005) == verdict


def test_divergences_and_surprises_are_torchs() -> None:
    rng = np.random.default_rng(2)
    one, other = (8 * rng.standard_normal((2, 5, 300))).astype(np.float32)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (one, other))
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert divergences(one, other) == pytest.approx(expected.numpy(), rel=1e-9)
    assert divergences(one, one + np.float32(1)) == pytest.approx(np.zeros(5), abs=1e-6)
    assert surprises(one, [0, 1, 2, 3, 299]) == pytest.approx(-log_p[range(5), [0, 1, 2, 3, 299]].numpy())


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [1], 0), ([], [], None)],
)
def test_first_difference(one: list[int], other: list[int], place: int | None) -> None:
    assert first_difference(one, other) == place


# --- questions ---


@pytest.mark.parametrize(
    ("compare", "text", "right"),
    [
        ("exact", " ab \n", True),
        ("exact", "abc", False),
        ("prefix", "abc", True),
        ("prefix", "cab", False),
        ("contains", "xabx", True),
        ("contains", "ba", False),
    ],
)
def test_comparisons(compare: str, text: str, right: bool) -> None:
    assert is_right(Question("?", "ab ", compare), text) == right  # type: ignore[arg-type]


GOOD = '{"prompt": "2+2=", "answer": "4"}'
BROKEN = {
    "{": "Input data was truncated",
    '{"prompt": "x"}': "`answer`",
    '{"prompt": "", "answer": "4"}': "prompt",
    '{"prompt": "x", "answer": "4", "compare": "roughly"}': "roughly",
    '{"prompt": "x", "answer": "4", "max_token": 3}': "max_token",
    '{"prompt": "far too long", "answer": "4"}': "does not fit",
    '{"prompt": "\udc80", "answer": "4"}': "UTF-8|utf-8",
}


def encode(question: Question) -> tuple[list[int], list[int]]:
    if "too long" in question.prompt:
        raise BrokenLineError("does not fit")
    return list(question.prompt.encode()), list(question.answer.encode())


@pytest.mark.parametrize(("line", "cause"), BROKEN.items())
def test_a_broken_line_is_named_and_stops_or_is_left_out(line: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n{GOOD}\n", errors="surrogateescape")
    with pytest.raises(ConfigError, match=rf"sums\.jsonl:3: .*({cause})"):
        read_tasks([path], encode, None, "stop", pytest.fail)
    warnings: list[str] = []
    [task] = read_tasks([path], encode, 2, "skip", warnings.append)
    assert [item.line for item in task.items] == [1, 4]  # two questions, and not two lines
    assert [warning.partition(": ")[0] for warning in warnings] == [f"{path}:3"]


def test_files_that_are_no_task(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "sums.jsonl").write_text(GOOD)
    (tmp_path / "sums.jsonl").write_text(GOOD)
    (tmp_path / "empty.jsonl").write_text("\n")
    for names, cause in {
        ("missing.jsonl",): "cannot read .*missing",
        ("empty.jsonl",): "no question",
        ("sums.jsonl", "a/sums.jsonl"): "another file is called 'sums'",
    }.items():
        with pytest.raises(ConfigError, match=cause):
            read_tasks([tmp_path / name for name in names], encode, None, "skip", pytest.fail)


# --- the journal, and what is made of it ---

HEADER = Header("1.0", "model", "bf16/bf16", 8)
ITEM = Item("sums", 7, Question("2+2=", "4"), [1], [2])


def test_the_journal_forgets_half_a_line_and_nothing_else(tmp_path: Path) -> None:
    records: list[Record] = [
        Free("a", "sums", "q1", [5], True),
        Forced("b", "sums", "q1", [0.5], [0.25]),
        Traffic("a", 9, 3),
    ]
    journal = Journal(tmp_path, HEADER)
    for record in records:
        journal.add(record)
    journal.close()
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    for cut_bytes in (0, 1, 40):
        path.write_bytes(whole + whole[: len(whole) and cut_bytes])
        again = Journal(tmp_path, HEADER)
        again.close()
        assert [*again.free.values(), *again.forced.values(), *again.traffic] == records
        assert path.read_bytes() == whole
    with pytest.raises(ConfigError, match="another evaluation, of which baseline, kl_tokens differs"):
        Journal(tmp_path, Header("1.0", "model", "fp32/fp32", 9))
    path.write_bytes(whole.replace(b'"free"', b'"fee"'))
    with pytest.raises(ConfigError, match=r"journal\.jsonl:2 is damaged"):
        Journal(tmp_path, HEADER)


def test_the_journal_keeps_logits(tmp_path: Path) -> None:
    journal = Journal(tmp_path, HEADER)
    logits = np.random.default_rng(3).standard_normal((4, 9)).astype(np.float32)
    journal.save_logits(ITEM, logits)
    journal.close()
    assert (journal.load_logits(ITEM, 4) == logits).all()


@pytest.fixture
def measured(tmp_path: Path) -> Callable[[float], tuple[Settings, list[RowMeasures]]]:
    """Measures of made-up answers: the control is wrong, and far off, in this share of 1,000 questions."""
    items = tuple(replace(ITEM, question=Question(f"{number}+2=", "4")) for number in range(1000))
    chosen = Settings(Path("model"), (), tmp_path, candidates=(Pair("int8", "int8"),), kl_questions=1000)

    def of(wrong: float) -> tuple[Settings, list[RowMeasures]]:
        journal = Journal(tmp_path / str(wrong), HEADER)
        for row in chosen.rows:
            num_wrong = round(1000 * wrong) if row == chosen.control_row else 0
            for number, item in enumerate(items):
                right = number >= num_wrong
                journal.add(Free(row.name, *item.key, [4, 4] if right else [4, 5, 6], right))
                kl = [] if row == chosen.baseline_row else [0.0 if right else 1.0]
                journal.add(Forced(row.name, *item.key, [math.log(2)], kl))
        journal.add(Traffic("int8/int8", 700, 3))
        journal.add(Traffic("int8/int8", 300, 2))
        journal.close()
        return chosen, measure_all(chosen, [Task("sums", items)], journal, KVGeometry(2, 1, 64))

    return of


def test_an_evaluation_that_does_not_see_3_bits_is_not_valid(
    measured: Callable[[float], tuple[Settings, list[RowMeasures]]],
) -> None:
    chosen, rows = measured(0.0)
    assert ["3 bits" in line for line in table.trouble(chosen, rows)] == [True]
    assert "NOT VALID" in table.as_markdown(chosen, rows, {})
    chosen, rows = measured(0.1)
    assert table.trouble(chosen, rows) == []
    assert "NOT VALID" not in table.as_markdown(chosen, rows, {})


def test_measures(measured: Callable[[float], tuple[Settings, list[RowMeasures]]]) -> None:
    chosen, rows = measured(0.1)
    told = table.as_json(chosen, rows, {})
    by_name = {row["name"]: row for row in told["rows"]}
    assert list(by_name) == ["bf16/bf16", "bf16/bf16, 8 at once", "bf16/3 bits", "int8/int8"]
    control, candidate = by_name["bf16/3 bits"], by_name["int8/int8"]
    assert control["flag"] == "worse: sums; KL too large"
    assert control["kl"] == {"tokens": 1000, "mean": pytest.approx(0.1), "p99": 1.0}
    assert (control["identical"], control["median_first_difference"]) == (0.9, 1)
    sums = control["tasks"]["sums"]
    assert (sums["questions"], sums["exact"], sums["lost"], sums["gained"], sums["loss"]) == (1000, 0.9, 100, 0, 0.1)
    assert sums["perplexity"] == pytest.approx(2.0)
    assert candidate["flag"] == "non-inferior"
    assert candidate["link_bytes_per_prompt_token"] == 200.0
    assert candidate["kv_bytes_per_token"] == 2 * 2 * (64 + 4)  # layers, K and V, values and a scale


# --- the command ---


def run_eval(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hmad", "eval", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--candidate", "int7/int8"], "argument --candidate: 'int7/int8' should be .* fp32, bf16, int8, fp8, bfp8"),
        (["--candidate", "int8"], "argument --candidate: 'int8' should be PRECISION/FORMAT"),
        (["--baseline", "bf16/int4"], "argument --baseline: .* KV format of fp32, bf16, int8, fp8_e4m3, mxfp8, bfp8"),
        (["--questions", "0"], "argument --questions: should be a whole number above 0, not '0'"),
        (["--margin", "wide"], "argument --margin: should be a number above 0, not 'wide'"),
        (["--on-broken-line", "shrug"], "argument --on-broken-line: invalid choice"),
        (["--model", "/nowhere"], "/nowhere is not a directory"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_mistakes_are_told(words: list[str], cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", str(CHECKPOINT), "questions.jsonl", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("hmad: ")
    assert re.search(cause, told), told


def test_a_format_that_the_model_cannot_have_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, head_dim=32)
    assert main(["eval", "--model", str(tmp_path), "--candidate", "int8/int8", "questions.jsonl"]) == 2
    assert "int8/int8: for this model's head_dim of 32 there are fp32, bf16, mxfp8, bfp8" in capsys.readouterr().err


def test_3_bits_are_left() -> None:
    values = torch.randn(64, 32).bfloat16()
    payload = values.clone().view(torch.uint8).flatten().numpy()
    coarsen(EncodedBlocks(None, 0, 1, 0, 1, 0, payload), head_dim=32)  # type: ignore[arg-type]
    kept = torch.from_numpy(payload).view(torch.bfloat16).view(64, 32)
    assert max(len(row.unique()) for row in kept) <= 7
    assert (kept - values).abs().amax() <= values.abs().amax() / 6 * 1.02
    assert (kept.abs().amax(-1) / values.abs().amax(-1) - 1).abs().amax() < 0.01


def test_a_node_that_dies_is_told_with_its_log(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", head_dim=32)
    (tmp_path / "sums.jsonl").write_text(GOOD)
    nodes = tmp_path / "nodes.toml"
    nodes.write_text("[decode]\narena_bytes = 100\n")
    words = ("--candidate", "bf16/mxfp8", "--config", nodes, "--output", tmp_path / "out")
    _, told = run_eval("--model", tmp_path / "model", *words, tmp_path / "sums.jsonl").communicate(timeout=60)
    assert "the decode node ended with exit code 2" in told, told
    assert "decode.log ends so:" in told
    assert "hmad: arena-bytes = 100 is less than one slot" in told.partition("ends so:")[2]
    assert "Traceback" not in told


def sorting_lines(count: int) -> Iterator[str]:
    """What the embedded checkpoint does right with faithful KV, and never with 3 bits."""
    rng = random.Random(4)
    for _ in range(count):
        numbers = rng.sample(range(10, 100), 12)
        question = f"Numbers: {' '.join(map(str, numbers))}\n\nSort the numbers."
        yield json.dumps({"prompt": question, "answer": " ".join(map(str, sorted(numbers))), "chat": True})


def processes_of(directory: Path) -> list[int]:
    """Nodes whose command line names this directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(directory).encode() in words:
            found.append(int(path.parent.name))
    return found


def test_a_killed_evaluation_goes_on_and_finds_out_3_bits(tmp_path: Path) -> None:
    """Of its own the model is a link, so that its nodes are known among all processes by its name."""
    model, output, file = tmp_path / "model", tmp_path / "out", tmp_path / "sort.jsonl"
    model.symlink_to(CHECKPOINT)
    file.write_text("\n".join(sorting_lines(24)))
    words = ("--model", model, "--candidate", "bf16/bf16", "--kl-questions", 4, "--output", output, file)
    journal = output / "journal.jsonl"

    def answers() -> list[str]:
        lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
        return [line for line in lines if '"free"' in line and line.endswith("\n")]

    killed = run_eval(*words)
    wait_for(lambda: len(answers()) >= 3 or killed.poll() is not None)
    killed.kill()
    _, told = killed.communicate()
    before = answers()
    assert 3 <= len(before) < 72, told
    wait_for(lambda: not processes_of(model))  # its nodes ended with it

    resumed = run_eval(*words)
    printed, told = resumed.communicate(timeout=100)
    assert resumed.returncode == 0, told
    after = answers()
    assert after[: len(before)] == before
    assert len(after) == len({tuple(json.loads(line)[key] for key in ("row", "question")) for line in after}) == 3 * 24
    assert printed.strip() == (output / "quality.md").read_text().strip()
    assert not processes_of(model)

    baseline, noise, control = json.loads((output / "quality.json").read_text())["rows"]
    assert baseline["tasks"]["sort"]["exact"] > 0.5
    assert "worse" not in noise["flag"]
    assert control["flag"] == "worse: sort; KL too large"
    assert control["kl"]["mean"] > 100 * noise["kl"]["mean"]
