"""The Triton kernels' tests (triton_*_cases.py), each way in a process of its own: interpreted and compiled kernels
cannot live in one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = sorted(map(str, Path(__file__).parent.glob("triton_*_cases.py")))


def run_cases(interpreted: bool) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *CASES]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    assert re.search(r"\d+ passed in", done.stdout)  # and nothing else, such as skipped


def test_in_the_interpreter() -> None:
    run_cases(interpreted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_compiled_on_the_gpu() -> None:
    run_cases(interpreted=False)
