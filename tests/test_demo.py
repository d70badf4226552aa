"""scripts/demo.py as a newcomer runs it: real daemons, and an output that tells what it promises."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hmad.facts.formats import FORMATS

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "scripts" / "demo.py"
CONFIG = json.loads((ROOT / "scripts" / "checkpoint" / "config.json").read_text())
LAYER_ROW = re.compile(r"^ +(\d+) +([\d.]+) ms +([\d.]+) ms +([\d,]+)  \|([#+ -]+)\|$", re.MULTILINE)


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in\n{text}"
    return float(found[1].replace(",", ""))


@pytest.fixture(scope="module")
def output() -> str:
    done = subprocess.run([sys.executable, DEMO], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_it_streams_an_answer(output: str) -> None:
    answer = re.search(r"user> What is module math for\?\nassistant> (.+?)\n\n", output, re.DOTALL)
    assert answer, output
    assert answer[1].strip()
    assert number(r"(\d+) output tokens", output) > 1


def test_it_shows_every_layer_with_its_bytes(output: str) -> None:
    rows = LAYER_ROW.findall(output)
    assert [int(row[0]) for row in rows] == list(range(CONFIG["num_hidden_layers"]))
    num_blocks = FORMATS["int8"].num_blocks(int(number(r"(\d+) prompt tokens", output)))
    block_bytes = 2 * CONFIG["num_key_value_heads"] * FORMATS["int8"].panel_bytes(CONFIG["head_dim"])
    assert {int(row[3].replace(",", "")) for row in rows} == {num_blocks * block_bytes}
    assert all({"#", "+"} & set(row[4]) and {"-", "+"} & set(row[4]) for row in rows)


def test_it_tells_what_the_transfer_cost(output: str) -> None:
    num_tokens = number(r"(\d+) prompt tokens", output)
    assert num_tokens > 700
    assert 0 <= number(r"hidden +([\d.]+) % of", output) <= 100
    assert number(r": ([\d.]+) ms exposed", output) >= 0
    total_bytes = sum(int(row[3].replace(",", "")) for row in LAYER_ROW.findall(output))
    assert number(r"wire +([\d,]+) bytes of int8", output) == total_bytes
    assert number(r"bytes of int8: ([\d,]+) per", output) == round(total_bytes / num_tokens)


def test_it_tells_what_the_arena_holds(output: str) -> None:
    num_tokens = int(number(r"(\d+) prompt tokens", output))
    assert number(r"arena +(\d+) slots", output) == FORMATS["int8"].num_blocks(num_tokens)
    raw = number(r"bytes: ([\d,]+) per prompt token, raw", output)
    assert raw < 0.6 * number(r"raw as sent\n +\(bf16: ([\d,]+)\)", output)


def test_it_tells_latencies(output: str) -> None:
    assert number(r"TTFT +([\d.]+) ms", output) >= number(r"([\d.]+) ms of it prefill", output) > 0
    assert number(r"ms median, ([\d.]+) ms at most", output) >= number(r"ITL +([\d.]+) ms median", output) > 0
    assert number(r"decode +(\d+) tokens/s", output) > 0


def test_it_stops_both_nodes(output: str) -> None:
    stopped = re.findall(r"(\w+) node: SIGTERM, exit code (-?\d+)", output)
    assert stopped == [("prefill", "0"), ("decode", "0")]


def test_interrupted_it_leaves_no_daemon_behind() -> None:
    # A shell's background jobs, of which these tests may be one, ignore interrupts, and so do their children.
    command = ["env", "--default-signal=INT", sys.executable, DEMO]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as demo:
        assert demo.stdout
        while "--role prefill" not in demo.stdout.readline():
            pass
        demo.send_signal(signal.SIGINT)
        _, told = demo.communicate(timeout=60)
        assert demo.returncode == 130
        assert "both daemons are stopped" in told
        with pytest.raises(ProcessLookupError):
            os.killpg(demo.pid, 0)


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hmad_demo", DEMO)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_a_daemon_that_cannot_start_is_shown_with_its_log(tmp_path: Path) -> None:
    demo = load_demo()
    daemon = demo.Daemon("decode", demo.pick_port(8001), tmp_path, ["--arena-bytes", "plenty"])
    told = r"exit code 2(.|\n)*--arena-bytes plenty(.|\n)*should be a size"
    with pytest.raises(demo.DemoError, match=told), demo.running(daemon):
        pytest.fail("it should not have started")


def test_help_needs_no_setup() -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "scripts" / "demo", "--help"], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stderr == ""
    assert all(option in done.stdout for option in ("--precision", "--kv-format", "--prompt"))
