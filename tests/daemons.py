"""Real daemons as child processes on loopback, for tests that go in by REST and come out by REST."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

ROOT = Path(__file__).parent.parent
ANSWER_S = 60.0  # machines under load, kernels that were never compiled here
STOP_S = 20.0
POLL_S = 0.05
needs_gpu = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
)
PORTS = range(12_000, 32_000)  # below those that the kernel gives to outgoing connections


@dataclass(frozen=True)
class Answer:
    """What came back over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def choices(self) -> list[dict[str, Any]]:
        """The choices of a request that must have gone well."""
        assert self.status == 200, self.body
        return list(self.json["choices"])


class Daemon:
    """One hmad process. ``flags`` are its options: ``max_queue=1`` is ``--max-queue 1``."""

    program: tuple[str, ...] = ("-m", "hmad")

    def __init__(self, role: str, model: Path, **flags: object) -> None:
        self.role = role
        self.port = int(str(flags.setdefault("port", free_port())))
        self._flags: dict[str, object] = {"role": role, "model": model, "threads": 1, **flags}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        self._process: subprocess.Popen[bytes]

    # --- life ---

    def start(self) -> None:
        options = [word for name, value in self._flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, *self.program, *options]
        self._process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=self._log, stderr=self._log)

    def wait_until(self, path: str, status: int = 200) -> Answer:
        """Ask until the answer has this status."""

        def answer() -> Answer | None:
            assert self._process.poll() is None, f"the {self.role} daemon has ended:\n{self.log}"
            try:
                given = self.get(path)
            except ConnectionError:
                return None
            return given if given.status == status else None

        return wait_for(answer, lambda: self.log)

    def end(self) -> int:
        """Wait for a process that ends by itself; its exit code."""
        return self._process.wait(ANSWER_S)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        """Stop as an operator does: SIGTERM, exit code 0, nothing unforeseen in the log."""
        self.signal(signal.SIGTERM)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """It was asked to stop: exit code 0, nothing unforeseen in the log."""
        code = self._process.wait(STOP_S)
        assert code == 0, f"exit code {code}:\n{self.log}"
        assert "Traceback" not in self.log, self.log

    def kill(self) -> None:
        """Whatever happened, leave no process behind."""
        self.die()
        self._log.close()

    def die(self) -> None:
        """SIGKILL; may be started again."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    # --- REST ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, **body: object) -> Answer:
        return self._ask("POST", path, json.dumps(body).encode())

    def complete(self, prompt: object, headers: dict[str, str] | None = None, **fields: object) -> Answer:
        """/v1/completions to the asked length, with token ids."""
        fields = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True} | fields
        return self._ask("POST", "/v1/completions", json.dumps(fields).encode(), headers)

    @contextmanager
    def stream(self, **body: object) -> Iterator[Iterator[bytes]]:
        """The lines of a streamed completion; leaving early is a client that hangs up."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), headers)
            with connection.getresponse() as response:
                yield iter(response.readline, b"")
        finally:
            connection.close()

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str] | None = None) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            kind = {"Content-Type": "application/json"} if body else {}
            connection.request(method, path, body, kind | (headers or {}))
            with connection.getresponse() as response:
                return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    @property
    def status(self) -> Any:
        return self.get("/status").json

    @property
    def used_slots(self) -> int:
        return int(self.status["arena"]["used_slots"])

    def wait_until_empty(self) -> None:
        """Every slot of a decode node comes back, soon after the last answer."""
        wait_for(lambda: self.used_slots == 0, lambda: f"{self.status['arena']}\n{self.log}")

    def metric(self, sample: str) -> float:
        """The value of a sample, labels summed: ``hmad_output_tokens_total``."""
        lines = self.get("/metrics").body.decode().splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{sample} ", f"{sample}{{"))]
        assert values, f"{sample} is not among the metrics"
        return sum(values)


class DecodeDaemon(Daemon):
    """A decode node; ``stream_port`` is where prefill nodes dial."""

    def __init__(self, model: Path, **flags: object) -> None:
        self.stream_port = int(str(flags.setdefault("stream_port", free_port())))
        super().__init__("decode", model, **{"arena_bytes": "16M", "lease": ANSWER_S, **flags})

    @property
    def peer(self) -> str:
        return f"127.0.0.1:{self.stream_port}"


class Peer(Protocol):
    """What a prefill node dials: a decode node, or a proxy before one."""

    @property
    def peer(self) -> str: ...


class PrefillDaemon(Daemon):
    """A prefill node of some decode nodes."""

    def __init__(self, model: Path, peers: Sequence[Peer], **flags: object) -> None:
        super().__init__("prefill", model, peer=",".join(peer.peer for peer in peers), **flags)


@contextmanager
def running(*daemons: Daemon, healthy: bool = True) -> Iterator[None]:
    """Start all at once and wait until they are healthy, or at least alive; at the end stop them, the last first."""
    try:
        for daemon in daemons:
            daemon.start()
        for daemon in daemons:
            daemon.wait_until("/health" if healthy else "/livez")
        yield
        for daemon in reversed(daemons):
            daemon.stop()
    finally:
        for daemon in daemons:
            daemon.kill()


def wait_for(look: Callable[[], Any], describe: Callable[[], str] = str) -> Any:
    """Look until there is something to see; fail with a description when it never comes."""
    deadline_s = time.monotonic() + ANSWER_S
    while not (seen := look()):
        assert time.monotonic() < deadline_s, f"waited {ANSWER_S:.0f} s in vain:\n{describe()}"
        time.sleep(POLL_S)
    return seen


def free_port() -> int:
    """A TCP port that nobody listens on, and that was not given out before: its daemon may be yet to start."""
    for port in _unused_ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("every port was used")


_unused_ports = iter(random.sample(PORTS, len(PORTS)))


def clean_environment() -> dict[str, str]:
    """Ours without the variables that configure a daemon."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HMAD_")}
