"""Every script runs: what needs no GPU at its smallest size, through its command line; the others tell their help.

Figures of such runs mean nothing. What they show is that a change elsewhere has not broken a benchmark unseen.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL_MODEL = ("--tokens", "32", "--rounds", "1", "--layers", "2")
SMALLEST = {
    "bench_overlap": SMALL_MODEL,
    "bench_decode": ("--batches", "1", "--tokens", "2", "--rounds", "1"),
    "bench_timelines": ("--rounds", "1", "--requests", "2", "--at-once", "2"),
    "bench_wire": ("--rounds", "1", "--megabytes", "1"),
    "cancel_storm": ("--count", "24", "--at-once", "12"),
    "kv_loss": ("questions.jsonl", "--questions", "1"),
    "make_questions": ("--questions", "1", "--texts", "1", "--output", "."),
}
# They want a GPU, or take long at their smallest: training, a search for the peak, memory that must not grow. What
# bench_prefill does, bench_overlap does too.
HELP_ONLY = ("bench_gpu", "bench_kernels", "bench_overload", "bench_prefill", "bench_rows", "soak", "train_checkpoint")
TESTED_ELSEWHERE = {"demo", "fuzz", "install", "openapi", "setup", "test"}
QUESTION = {"prompt": "one two", "answer": " three", "compare": "exact", "chat": True, "max_tokens": 2}


Runs = dict[str, Future[subprocess.CompletedProcess[str]]]


def run(name: str, directory: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / name), *arguments]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=110, check=False
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All of them, two at a time: most of a run is one daemon after the other that starts.

    They are given a copy of the environment: pytest changes its own between the phases of a test, and a program that
    another thread starts at that moment with the environment itself fails with EFAULT.
    """
    environment = dict(os.environ)
    directory = tmp_path_factory.mktemp("scripts")
    (directory / "questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    with ThreadPoolExecutor(2) as workers:
        commands = SMALLEST | dict.fromkeys(HELP_ONLY, ("--help",))
        yield {
            name: workers.submit(run, name, directory, environment, *arguments) for name, arguments in commands.items()
        }


@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs(runs: Runs, name: str) -> None:
    done = runs[name].result()
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    if name == "make_questions":
        assert done.stdout.count(".jsonl: 1 lines") == 4
    else:
        [result] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert result["benchmark"].startswith(name)


@pytest.mark.parametrize("name", HELP_ONLY)
def test_it_can_be_asked_for_help(runs: Runs, name: str) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}")


def test_no_script_is_forgotten() -> None:
    executables = {path.name for path in SCRIPTS.iterdir() if path.is_file() and os.access(path, os.X_OK)}
    assert executables == {*SMALLEST, *HELP_ONLY} | TESTED_ELSEWHERE
