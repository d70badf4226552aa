"""scripts/setup, run against a stand-in for Python that writes down what it was told to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAND_IN = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
    "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    --version) echo Python 3.11.9 ;;
    *version_info*) exit ${TOO_OLD:-0} ;;
    *ensurepip*) exit ${NO_VENV:-0} ;;
    *pip\\ install*) exit ${PIP_FAILS:-0} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("scripts/setup", "pyproject.toml", "constraints.txt", "kernels/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run_setup(checkout: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run it; what it printed, and the steps it took: venv, torch, hmad, kernels."""
    log = checkout / "log"
    log.write_text("")
    env = os.environ | {"PYTHON": str(checkout / "python"), "LOG": str(log)} | environment
    done = subprocess.run([checkout / "scripts/setup"], env=env, capture_output=True, text=True, check=False)
    marks = {"-m venv": "venv", "torch setuptools": "torch", ".[test]": "hmad", "-m hmad_kernels": "kernels"}
    lines = log.read_text().splitlines()
    return done, [step for line in lines for mark, step in marks.items() if mark in line]


def test_first_run_does_all_in_order_and_the_second_nothing(checkout: Path) -> None:
    done, steps = run_setup(checkout)
    assert (done.returncode, steps) == (0, ["venv", "torch", "hmad", "kernels"])
    done, steps = run_setup(checkout)
    assert (done.returncode, steps, done.stderr) == (0, [], "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kernels/__init__.py", ["kernels"]),
        ("constraints.txt", ["torch", "hmad", "kernels"]),
        ("pyproject.toml", ["torch", "hmad", "kernels"]),
    ],
)
def test_changes_redo_what_depends_on_them(checkout: Path, name: str, expected: list[str]) -> None:
    run_setup(checkout)
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    assert run_setup(checkout)[1] == expected


def test_a_failed_install_is_tried_again(checkout: Path) -> None:
    done, steps = run_setup(checkout, PIP_FAILS="1")
    assert (done.returncode, steps) == (1, ["venv", "torch"])
    assert run_setup(checkout)[1] == ["torch", "hmad", "kernels"]


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"TOO_OLD": "1"}, "Python 3.11.9 is too old, hmad needs 3.11 or newer"),
        ({"NO_VENV": "1"}, "lacks venv: apt install python3-venv"),
        ({"PYTHON": "python-of-nowhere"}, "no python-of-nowhere found: install Python 3.11 or newer"),
    ],
)
def test_what_is_missing_is_said(checkout: Path, environment: dict[str, str], complaint: str) -> None:
    done, steps = run_setup(checkout, **environment)
    assert (done.returncode, steps) == (1, [])
    assert complaint in done.stderr


def test_torch_is_pinned_exactly() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all("==" in pin and "+" not in pin for pin in pins)
