"""What the benchmarks share: daemons on free ports, dummy models, medians, and one way to report."""

import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent
CHECKPOINT = SCRIPTS / "checkpoint"
READY_S = 120


@contextmanager
def dummy_model(name: str = "Qwen3-0.6B", **changes: Any) -> Iterator[Path]:
    """A directory with a published model's config.json, for dummy weights, and the embedded checkpoint's tokenizer."""
    config = json.loads((SCRIPTS / "models" / name / "config.json").read_text())
    with tempfile.TemporaryDirectory(prefix="hmad-bench-") as directory:
        path = Path(directory) / "model"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | changes))
        for file_name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(CHECKPOINT / file_name, path / file_name)
        yield path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass(frozen=True)
class Node:
    """A running daemon."""

    url: str
    port: int
    pid: int

    def usage(self) -> dict[str, int]:
        """What the process holds of the machine: resident bytes, open files, threads."""
        proc = Path(f"/proc/{self.pid}")
        fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return {
            "rss_bytes": int(fields["VmRSS"].split()[0]) * 1024,
            "fds": len(list((proc / "fd").iterdir())),
            "threads": int(fields["Threads"]),
        }


@contextmanager
def daemon(role: str, model: Path, *arguments: str) -> Iterator[str]:
    """The REST address of a real hmad daemon."""
    with node(role, model, *arguments) as running:
        yield running.url


@contextmanager
def node(role: str, model: Path, *arguments: str) -> Iterator[Node]:
    """A real hmad daemon; yields once it is healthy, stops it with SIGTERM."""
    port = free_port()
    command = [sys.executable, "-m", "hmad", "--role", role, "--model", str(model), "--port", str(port), *arguments]
    log = tempfile.NamedTemporaryFile("w+", prefix=f"hmad-{role}-", suffix=".log")  # noqa: SIM115 (closed below)
    process = subprocess.Popen([*command, "--log-level", "warning"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_healthy(url, process, log.name)
        yield Node(url, port, process.pid)
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def wait_healthy(url: str, process: subprocess.Popen[bytes], log: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            get(f"{url}/health")
            return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.1)
    raise SystemExit(f"the daemon at {url} did not become healthy:\n{Path(log).read_text()}")


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def complete(url: str, token_ids: Sequence[int], max_tokens: int, **fields: Any) -> Any:
    """One greedy completion of a prompt given as token ids."""
    body = {"prompt": list(token_ids), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True} | fields
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def last_timeline(url: str) -> Any:
    """The timeline of the request that finished last on a prefill node."""
    return get(f"{url}/status")["requests"][-1]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> str:
    """Processor and cores, for the head of a report."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    wide = [flag for flag in ("amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16", "avx2") if flag in flags.split()]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {' '.join(wide[:3])}"


def report(title: str, header: Sequence[str], rows: Sequence[Sequence[object]], result: dict[str, Any]) -> None:
    """A short table for people, and one JSON line for programs."""
    print(f"\n{title}\n{date.today()}, {machine()}\n")
    table = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    print(json.dumps({"benchmark": title, "date": str(date.today()), "machine": machine()} | result))
