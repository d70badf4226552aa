"""The Triton kernels' tests (triton_*_cases.py), each file and way in a process of its own: interpreted and compiled
kernels cannot live in one."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from daemons import needs_gpu

CASES = {path.stem: path for path in sorted(Path(__file__).parent.glob("triton_*_cases.py"))}

Runs = dict[str, Future[subprocess.CompletedProcess[str]]]


def run_cases(path: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # Whatever else is tested meanwhile has the cores first.
    command = ["nice", sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", path]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


@pytest.fixture(
    scope="module", params=[pytest.param(True, id="interpreted"), pytest.param(False, id="gpu", marks=needs_gpu)]
)
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """All files side by side: the interpreter is one thread of Python."""
    environment = os.environ | {"TRITON_INTERPRET": "1" if request.param else "0"}
    with ThreadPoolExecutor(len(CASES)) as runners:
        yield {name: runners.submit(run_cases, path, environment) for name, path in CASES.items()}


@pytest.mark.timeout(600)  # the first waits for its file, which shares the cores with all others
@pytest.mark.parametrize("name", CASES)
def test_all_cases_pass(runs: Runs, name: str) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-8000:]
    assert re.search(r"\d+ passed in", done.stdout)  # and nothing else, such as skipped
