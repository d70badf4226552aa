"""What the log says, how often, and what it never says."""

import ast
import io
import json
import logging
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from daemons import Daemon, DecodeDaemon, PrefillDaemon, running, wait_for
from structlog.contextvars import bound_contextvars

from hmad.edges.logs import MAX_EVENTS_KNOWN, MAX_LINES_A_MINUTE, RateLimit, formatter
from hmad.facts.logs import get_logger

ROOT = Path(__file__).parent.parent
STRUCTURED = get_logger("hmad.of.tests")
STANDARD = logging.getLogger("hmad.of.tests")


# --- one line ---


@pytest.fixture(params=["json", "text"])
def log_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lines(log_format: Any) -> Iterator[io.StringIO]:
    """What reaches the handler of a process, without its filter."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(log_format))
    STANDARD.addHandler(handler)
    STANDARD.setLevel("INFO")
    yield stream
    STANDARD.removeHandler(handler)


def test_a_line_of_ours(lines: io.StringIO, log_format: str) -> None:
    with bound_contextvars(request_id="r1"):
        STRUCTURED.warning("peer lost", peer="d:1", transfer_id=b"\x0a\xff", after_s=1.5, cause="no sign of life")
    line = lines.getvalue()
    if log_format == "json":
        fields = json.loads(line)
        assert list(fields)[:4] == ["ts", "level", "event", "logger"]
        assert fields.pop("ts").endswith("Z")
        assert fields == {
            "level": "warning",
            "event": "peer lost",
            "logger": "hmad.of.tests",
            "request_id": "r1",
            "peer": "d:1",
            "transfer_id": "0aff",
            "after_s": 1.5,
            "cause": "no sign of life",
        }
    else:
        fields_as_text = 'peer=d:1 transfer_id=0aff after_s=1.5 cause="no sign of life" request_id=r1'
        assert line.endswith(f"Z warning hmad.of.tests: peer lost {fields_as_text}\n")


def test_a_line_of_the_standard_library_takes_the_same_way(lines: io.StringIO, log_format: str) -> None:
    with bound_contextvars(request_id="r1"):
        STANDARD.info("peer %s: %d slots", "d:1", 7, extra={"transfer_id": b"\x0a"})
    if log_format == "json":
        fields = json.loads(lines.getvalue())
        assert (fields["event"], fields["request_id"], fields["transfer_id"]) == ("peer d:1: 7 slots", "r1", "0a")
    else:
        assert "hmad.of.tests: peer d:1: 7 slots transfer_id=0a request_id=r1\n" in lines.getvalue()


def test_debug_is_not_told_at_info(lines: io.StringIO) -> None:
    STRUCTURED.debug("too much")
    assert lines.getvalue() == ""


def test_a_bug_comes_with_its_traceback(lines: io.StringIO, log_format: str) -> None:
    try:
        raise ZeroDivisionError("of nothing")
    except ZeroDivisionError:
        STRUCTURED.exception("a bug")
    text = lines.getvalue()
    if log_format == "json":
        assert text.count("\n") == 1
        text = json.loads(text)["exception"]
    assert "Traceback (most recent call last)" in text
    assert text.rstrip().endswith("ZeroDivisionError: of nothing")


def test_nobody_can_forge_a_line(lines: io.StringIO) -> None:
    STANDARD.info("peer said %s", "bye\n2026-01-01T00:00:00Z info forged: all is well")
    STRUCTURED.info("bye", reason="x\r\n\x1b[31mforged\u2028forged")
    assert len(lines.getvalue().splitlines()) == 2
    assert "\x1b" not in lines.getvalue()


# --- how often ---


class Limited:
    """A rate limit with a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.limit = RateLimit(lambda: self.now_s)

    def say(self, event: str, logger: str = "a") -> logging.LogRecord | None:
        record = logging.makeLogRecord({"name": logger, "msg": event})
        return record if self.limit.filter(record) else None


def test_a_flood_is_cut_and_counted() -> None:
    limited = Limited()
    passed = [limited.say("peer lost") for _ in range(MAX_LINES_A_MINUTE + 7)]
    assert sum(map(bool, passed)) == MAX_LINES_A_MINUTE
    assert limited.say("peer lost", logger="b")
    assert limited.say("peer found")
    limited.now_s = 59.9
    assert limited.say("peer lost") is None
    limited.now_s = 60.0
    told, next_ = limited.say("peer lost"), limited.say("peer lost")
    assert told is not None
    assert next_ is not None
    assert (told.__dict__["dropped"], "dropped" in next_.__dict__) == (8, False)


def test_events_that_a_library_makes_up_cost_no_memory() -> None:
    limited = Limited()
    for number in range(3 * MAX_EVENTS_KNOWN):
        assert limited.say(f"request {number}")
    assert len(limited.limit._windows) == MAX_EVENTS_KNOWN


FLOOD = """
import logging, warnings
from hmad.edges import logs
from hmad.facts.logs import get_logger
logs.configure("json", "debug")
for number in range(100): get_logger("hmad.x").debug("again", number=number)
logging.getLogger("numba").info("a library's life")
logging.getLogger("aiohttp").warning("a library's trouble")
warnings.warn("old ways")
"""


def test_a_process_logs_json_alone_and_limits_it() -> None:
    done = subprocess.run([sys.executable, "-c", FLOOD], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["number"] for line in lines if line["event"] == "again"] == list(range(MAX_LINES_A_MINUTE))
    assert [line["logger"] for line in lines if line["event"] != "again"] == ["aiohttp", "py.warnings"]


def test_a_terminal_gets_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "hmad", "check-config", "--role", "decode", "--model", str(tmp_path)]
    terminal, its_end = pty.openpty()
    told = [
        subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT, check=True).stdout
        for stderr in (its_end, subprocess.DEVNULL)
    ]
    os.close(terminal)
    os.close(its_end)
    assert [b'log_format = "text"' in out for out in told] == [True, False]
    assert b'log_format = "json"' in told[1]


# --- every call ---

LOG_CALLS = {f"log.{level}" for level in ("debug", "info", "warning", "error", "exception", "log")}
TAKEN = {*vars(logging.makeLogRecord({})), "message", "asctime", "ts", "level", "event", "logger", "dropped"}


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted((ROOT / "hmad").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in LOG_CALLS:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


@pytest.mark.parametrize("call", [pytest.param(call, id=where) for where, call in log_calls()])
def test_events_are_constant_and_fields_have_names_of_their_own(call: ast.Call) -> None:
    """An event that varies cannot be limited or searched for; a field named like a LogRecord's own is a KeyError."""
    event = call.args[ast.unparse(call.func) == "log.log"]  # that one has the level first
    assert all(isinstance(arm, ast.Constant) for arm in arms(event))
    assert {keyword.arg for keyword in call.keywords} & (TAKEN - {"exc_info", "stack_info"}) == set()


def arms(event: ast.expr) -> list[ast.expr]:
    return [event.body, event.orelse] if isinstance(event, ast.IfExp) else [event]


# --- real nodes, at debug, with everything that goes wrong ---

CLUSTER_KEY, OTHER_KEY = "cluster-key-0123456789", "another-key-0123456789"
API_KEY, WRONG_API_KEY = "sk-right-0123456789", "sk-wrong-0123456789"
PROMPT = "quixotic zephyr confidences"


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The logs of a prefill node that lost its decode node, of that, and of a stranger with the wrong key."""
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, num_kv_heads=2, head_dim=64, max_positions=2048)
    files = {name: directory / name for name in ("cluster", "other", "api")}
    for name, text in (("cluster", CLUSTER_KEY), ("other", OTHER_KEY), ("api", API_KEY)):
        files[name].write_text(text)
        files[name].chmod(0o600)
    common = {"log_level": "debug", "api_key_file": files["api"]}
    decode = DecodeDaemon(directory, cluster_key_file=files["cluster"], **common)
    prefill = PrefillDaemon(directory, [decode], cluster_key_file=files["cluster"], **common)
    stranger = PrefillDaemon(directory, [decode], cluster_key_file=files["other"], **common)
    with running(stranger, healthy=False), running(prefill, healthy=False):
        with killed_at_the_end(decode):
            prefill.wait_until("/health")
            misbehave(prefill)
            wait_for(lambda: "cluster key" in stranger.log, lambda: stranger.log)
            lose_decode_node(prefill, decode)
            decode_log = decode.log
        prefill.wait_until("/health", 503)
        return {"prefill": prefill.log, "stranger": stranger.log, "decode": decode_log}


@contextmanager
def killed_at_the_end(daemon: Daemon) -> Iterator[None]:
    try:
        daemon.start()
        daemon.wait_until("/health")
        yield
    finally:
        daemon.kill()


def ask(daemon: Daemon, key: str = API_KEY, **body: Any) -> HTTPConnection:
    connection = HTTPConnection("127.0.0.1", daemon.port, timeout=30)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def status(connection: HTTPConnection) -> int:
    with connection.getresponse() as response:
        response.read()
    connection.close()
    return response.status


def misbehave(prefill: Daemon) -> None:
    """Whatever a client does wrong, with the secrets at the places where it does it."""
    assert status(ask(prefill, prompt=PROMPT, max_tokens=3)) == 200
    assert status(ask(prefill, WRONG_API_KEY, prompt=PROMPT)) == 401
    assert status(ask(prefill, prompt=PROMPT, temperature=PROMPT)) == 400
    assert status(ask(prefill, prompt=[PROMPT, {"text": PROMPT}])) == 400
    for garbage in (
        f"POST /v1/completions HTTP/1.1\r\nAuthorization Bearer {API_KEY}\r\n\r\n",
        f"GET /{API_KEY} {PROMPT} HTTP/9\r\nAuthorization: Bearer {API_KEY}\r\n\r\n",
        f"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\nContent-Length: {PROMPT}\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", prefill.port)) as sock:
            sock.sendall(garbage.encode())
            sock.settimeout(30)
            assert b" 400 " in sock.recv(1000)


def lose_decode_node(prefill: Daemon, decode: Daemon) -> None:
    """It is killed in the middle of an answer."""
    connection = ask(prefill, prompt=PROMPT, max_tokens=1500, ignore_eos=True, stream=True)
    with connection.getresponse() as response:
        assert response.readline().startswith(b"data: ")
        decode._process.kill()
        assert b'"error"' in response.read()
    connection.close()


@pytest.mark.parametrize("who", ["prefill", "stranger", "decode"])
def test_keys_and_prompts_are_in_no_log(logged: dict[str, str], who: str) -> None:
    log = logged[who]
    assert "serving" in log
    for secret in (CLUSTER_KEY, OTHER_KEY, API_KEY, WRONG_API_KEY, PROMPT, *PROMPT.split()):
        assert secret not in log, secret


@pytest.mark.parametrize("who", ["prefill", "stranger", "decode"])
def test_every_line_of_a_node_is_json(logged: dict[str, str], who: str) -> None:
    lines = [json.loads(line) for line in logged[who].splitlines()]
    assert all({"ts", "level", "event", "logger"} <= line.keys() for line in lines)
    assert "Traceback" not in logged[who]


def test_a_request_that_its_decode_node_failed_is_one_line(logged: dict[str, str]) -> None:
    lines = [json.loads(line) for line in logged["prefill"].splitlines()]
    (failed,) = [line for line in lines if line["event"] == "a request failed"]
    assert (failed["level"], failed["path"]) == ("warning", "/v1/completions")
    assert len(failed["request_id"]) == 32
    assert "RemoteError" in failed["cause"]
    assert not [line for line in lines if line["event"] == "not healthy" and "request_id" in line]
