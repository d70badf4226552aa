"""The unit, judged by systemd's own tools; and scripts/install, run into a directory."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hmad.edges.cli import EXIT_MISTAKE
from hmad.edges.node_model import SHUTDOWN_S
from hmad.facts.config import KNOBS
from hmad.facts.keys import load_api_keys, load_cluster_key

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "systemd" / "hmad@.service"
MAX_EXPOSURE = 3.0
judged = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False)


@judged
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_unit_has_no_mistake(role: str, tmp_path: Path) -> None:
    """Installed programs aside: one that is always there stands in for ours."""
    unit = tmp_path / f"hmad@{role}.service"
    unit.write_text(UNIT.read_text().replace("/opt/hmad/current/.venv/bin/hmad", "/bin/true"))
    found = analyze("verify", unit)
    assert (found.returncode, found.stderr) == (0, "")


@judged
def test_the_judge_finds_mistakes(tmp_path: Path) -> None:
    unit = tmp_path / "hmad@decode.service"
    unit.write_text("[Service]\nExecStart=/bin/true\nProtectEverything=yes\n")
    assert "ProtectEverything" in analyze("verify", unit).stderr


@judged
def test_the_unit_is_little_exposed() -> None:
    found = analyze("security", "--offline=true", f"--threshold={int(MAX_EXPOSURE * 10)}", UNIT)
    level = re.search(r"Overall exposure level for hmad@\S+: ([0-9.]+)", found.stdout)
    assert level is not None, found.stderr
    assert float(level[1]) < MAX_EXPOSURE, found.stdout
    assert found.returncode == 0


def settings() -> dict[str, str]:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_and_the_daemon_agree() -> None:
    unit = settings()
    assert unit["Type"] == "notify"
    assert int(unit["RestartPreventExitStatus"]) == EXIT_MISTAKE
    assert unit["WatchdogSignal"] == "SIGABRT"  # of which faulthandler tells the stacks
    assert "--role %i" in unit["ExecStart"]
    assert int(unit["TimeoutStopSec"]) > KNOBS["drain_timeout"].default("decode") + 2 * SHUTDOWN_S


# --- scripts/install ---

# A Python that installs nothing and compiles nothing, but runs hmad.
STAND_IN = f"""#!/bin/sh
case "$*" in
    "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    --version) echo Python 3.11.9 ;;
    *pip\\ install*) exit ${{PIP_FAILS:-0}} ;;
    "-m hmad_kernels") mkdir -p "$NUMBA_CACHE_DIR" && touch "$NUMBA_CACHE_DIR/compiled" ;;
    "-m hmad "*) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


class Machine:
    """A directory to install into."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root = root
        self._python = python

    def install(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHON": str(self._python)} | environment
        command = [ROOT / "scripts/install", "--prefix", self.root, *options]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    @property
    def home(self) -> Path:
        return self.root / "opt/hmad"

    @property
    def current(self) -> str:
        return (self.home / "current").resolve().name

    @property
    def releases(self) -> list[str]:
        return sorted(path.name for path in (self.home / "releases").iterdir())

    def etc(self, name: str) -> Path:
        return self.root / "etc" / name

    def predate(self) -> str:
        """Make the only release an old one, as if time had passed."""
        (name,) = self.releases
        (self.home / "releases" / name).rename(self.home / "releases/20200101T000000Z")
        (self.home / "current").unlink()
        (self.home / "current").symlink_to("releases/20200101T000000Z")
        return "20200101T000000Z"


@pytest.fixture
def machine(tmp_path: Path, python: Path) -> Machine:
    return Machine(tmp_path / "machine", python)


def test_install_makes_a_release_a_configuration_and_keys(machine: Machine) -> None:
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert machine.releases == [machine.current]
    assert (machine.home / "current/hmad/edges/cli.py").is_file()
    assert (machine.home / "current/kernel-cache/compiled").is_file()
    assert machine.etc("systemd/system/hmad@.service").read_text() == UNIT.read_text()
    assert machine.etc("hmad/hmad.toml").read_text() == (ROOT / "hmad.toml").read_text()
    assert len(load_cluster_key(machine.etc("hmad/cluster.key"))) >= 32
    told = re.search(r"(sk-[0-9a-f]{48})$", done.stderr, re.MULTILINE)
    assert told is not None
    assert told[1] not in machine.etc("hmad/api.keys").read_text()
    hashed = subprocess.run(
        [sys.executable, "-m", "hmad", "hash-key"], input=told[1], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert machine.etc("hmad/api.keys").read_text() == hashed.stdout
    assert len(load_api_keys(machine.etc("hmad/api.keys"))) == 1
    for name in ("cluster.key", "api.keys"):
        assert machine.etc(f"hmad/{name}").stat().st_mode & 0o077 == 0


def test_upgrade_keeps_what_is_the_users_and_rollback_returns(machine: Machine) -> None:
    assert machine.install().returncode == 0
    old = machine.predate()
    for name in ("hmad.toml", "cluster.key", "api.keys"):
        machine.etc(f"hmad/{name}").write_text("mine")
    assert machine.install().returncode == 0
    new = machine.current
    assert machine.releases == [old, new]
    assert {machine.etc(f"hmad/{name}").read_text() for name in ("hmad.toml", "cluster.key", "api.keys")} == {"mine"}
    assert machine.install("--rollback").returncode == 0
    assert machine.current == old
    again = machine.install("--rollback")
    assert (again.returncode, machine.current) == (1, old)
    assert f"there is no release before {old}" in again.stderr
    assert machine.install("--rollback", new).returncode == 0
    assert machine.current == new
    assert machine.install("--rollback", "never").returncode == 1
    assert machine.current == new


def test_an_upgrade_that_fails_changes_nothing(machine: Machine) -> None:
    assert machine.install().returncode == 0
    old = machine.predate()
    failed = machine.install(PIP_FAILS="1")
    assert failed.returncode != 0
    assert "what was installed before is as it was" in failed.stderr
    assert (machine.releases, machine.current) == ([old], old)


def test_unknown_options_are_refused(machine: Machine) -> None:
    refused = machine.install("--frobnicate")
    assert (refused.returncode, machine.root.exists()) == (2, False)
    assert "scripts/install [--prefix DIR] --rollback" in refused.stderr
