"""One chat request through a prefill daemon and a decode daemon on this machine, and what happened to it.

Starts both with the embedded checkpoint, streams the answer as it comes, shows for each layer when it was computed
and when its KV was on the wire, what that cost in bytes and time, and stops both. Needs only the standard library.
"""

import argparse
import importlib
import inspect
import json
import math
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from hmad.facts.formats import FORMATS, NATIVE_FORMAT, KVGeometry

ROOT = Path(__file__).parent.parent
MODEL = Path("scripts/checkpoint")
HOST = "127.0.0.1"
STREAM_RATE = "64M"  # bytes/s: slow enough that the KV's way over loopback can be seen
MAX_TOKENS = 120
READY_S, STOP_S, ANSWER_S = 120.0, 20.0, 120.0
POLL_S = 0.05
PICTURE_CHARS = 64

QUESTION = "What is module math for?"
SYSTEM = "You explain Python and its standard library."
EARLIER_MODULES = ("shutil", "heapq", "textwrap", "random")  # about 1,000 tokens of docstrings


class DemoError(Exception):
    """What went wrong, in words for the person at the terminal."""


# --- daemons ---


class Daemon:
    """One hmad process, its log in a file."""

    def __init__(self, role: str, port: int, logs: Path, options: Sequence[str]) -> None:
        self.role = role
        self.port = port
        self.exit_code: int | None = None
        self._log_path = logs / f"{role}.log"
        self._arguments = ["-m", "hmad", "--role", role, "--model", str(MODEL), "--port", str(port), *options]
        self._process: subprocess.Popen[bytes]

    @property
    def command(self) -> str:
        """As one would type it in the project's folder."""
        python = Path(sys.executable)
        shown = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
        return shlex.join([str(shown), *self._arguments])

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def start(self) -> None:
        # Variables that configure the user's own node are not meant for ours.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HMAD_")}
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def wait_until_healthy(self) -> None:
        deadline_s = time.monotonic() + READY_S
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise self._failure(f"ended with exit code {self._process.returncode}")
            if time.monotonic() > deadline_s:
                raise self._failure(f"was not healthy after {READY_S:.0f} s")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """SIGTERM, as an operator does it; by force only what does not listen."""
        self._process.terminate()
        try:
            self.exit_code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.exit_code = self._process.wait()

    def check_stopped_well(self) -> None:
        if self.exit_code != 0:
            raise self._failure(f"stopped with exit code {self.exit_code}")

    def _failure(self, what: str) -> DemoError:
        started = f"It was started with\n  {self.command}\nand its log says\n"
        return DemoError(f"the {self.role} node {what}.\n{started}{self.log or '(nothing)'}")

    # --- REST, past any proxy that the environment may name ---

    def status(self) -> Any:
        with self._ask("GET", "/status") as response:
            return json.load(response)

    @contextmanager
    def stream_chat(self, body: dict[str, Any]) -> Iterator[Iterator[Any]]:
        """The events of a streamed chat completion, as they come."""
        with self._ask("POST", "/v1/chat/completions", body | {"stream": True}) as response:
            if response.status != 200:
                raise self._failure(f"answers {response.status}: {json.load(response)['error']['message']}")
            yield self._events(response)

    def _events(self, response: HTTPResponse) -> Iterator[Any]:
        """Server-sent events up to [DONE]."""
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            if data:
                event = json.loads(data)
                if "error" in event:
                    raise self._failure(f"broke the answer off: {event['error']['message']}")
                yield event
        raise self._failure("closed the connection before the end of the answer")

    def _is_healthy(self) -> bool:
        try:
            with self._ask("GET", "/health") as response:
                return response.status == 200
        except ConnectionError:
            return False

    @contextmanager
    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[HTTPResponse]:
        connection = HTTPConnection(HOST, self.port, timeout=ANSWER_S)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()


@contextmanager
def running(*daemons: Daemon) -> Iterator[None]:
    """Start all, wait until all are healthy, and stop them whatever happens, the last first."""
    started: list[Daemon] = []
    try:
        for daemon in daemons:
            with held_interrupts():  # no process may exist that we do not know of
                daemon.start()
                started.append(daemon)
        for daemon in daemons:
            daemon.wait_until_healthy()
        yield
    finally:
        with held_interrupts():
            for daemon in reversed(started):
                daemon.stop()


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda caught_number, frame: caught.append(caught_number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


def pick_port(default: int) -> int:
    """The default where it is free, else any free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, default))
        except OSError:
            probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


# --- the request ---


@dataclass
class Answer:
    """What the client saw, by its own clock."""

    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    decode_status: Any = None  # of the decode node, while it held the request

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies."""
        return [later - earlier for earlier, later in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


def conversation(question: str) -> list[dict[str, str]]:
    """The question after some turns about other modules, so that there is a prompt worth its prefill."""
    messages = [{"role": "system", "content": SYSTEM}]
    for name in EARLIER_MODULES:
        docstring = inspect.getdoc(importlib.import_module(name)) or name
        messages.append({"role": "user", "content": f"What is the module {name} for?"})
        messages.append({"role": "assistant", "content": docstring})
    return [*messages, {"role": "user", "content": question}]


def chat(prefill: Daemon, decode: Daemon, body: dict[str, Any], show: bool) -> Answer:
    """Stream one answer, and look at the decode node from aside while it decodes."""
    answer = Answer(time.monotonic())
    look: Future[Any] | None = None
    with ThreadPoolExecutor(1) as aside, prefill.stream_chat(body) as chunks:
        for chunk in chunks:
            (choice,) = chunk["choices"]
            new_tokens = choice.get("token_ids", ())
            answer.token_times_s += [time.monotonic()] * len(new_tokens)
            if new_tokens and look is None:
                look = aside.submit(decode.status)
            if show:
                print(choice["delta"].get("content", ""), end="", flush=True)
        answer.decode_status = look.result() if look else decode.status()
    return answer


# --- what happened ---


@dataclass(frozen=True)
class LayerSpan:
    """One layer's times in ms since prefill began."""

    begins: float
    computed: float
    sent: float
    verified: float
    num_bytes: int

    def mark(self, begin: float, end: float) -> str:
        """The character for what happened between two times."""
        computes = self.begins < end and begin < self.computed
        travels = self.sent < end and begin < self.verified
        return "+" if computes and travels else "#" if computes else "-" if travels else " "


def layer_spans(timeline: Any) -> list[LayerSpan]:
    """A layer computes until the next one begins, the last until token 0 is sampled."""
    layers = [timeline["layers"][key] for key in sorted(timeline["layers"], key=int)]
    start_s = timeline["prefill_started_s"]
    ends_s = [*(layer["started_s"] for layer in layers[1:]), timeline["first_token_s"]]
    return [
        LayerSpan(
            begins=1e3 * (layer["started_s"] - start_s),
            computed=1e3 * (end_s - start_s),
            sent=1e3 * (layer["sent_s"] - start_s),
            verified=1e3 * (layer["verified_s"] - start_s),
            num_bytes=layer["wire_bytes"],
        )
        for layer, end_s in zip(layers, ends_s, strict=True)
    ]


def show_layers(spans: Sequence[LayerSpan]) -> None:
    """A table with a picture: time runs to the right, a row is a layer."""
    token_0 = spans[-1].computed
    end = max(token_0, *(span.verified for span in spans))
    step = end / PICTURE_CHARS
    print(f"  layer   compute      wire   KV bytes   0 ms{f'{end:.1f} ms':>{PICTURE_CHARS - 4}}")
    for number, span in enumerate(spans):
        picture = "".join(span.mark(i * step, (i + 1) * step) for i in range(PICTURE_CHARS))
        compute, wire = span.computed - span.begins, span.verified - span.sent
        print(f"  {number:5}  {compute:5.1f} ms  {wire:5.1f} ms  {span.num_bytes:9,}  |{picture}|")
    caret = " " * min(PICTURE_CHARS - 1, int(token_0 / step))
    print(f"{'':41}{caret}^ token 0 sampled at {token_0:.1f} ms")
    print("  # the layer computes   - its KV is on the wire   + both at once")
    print(f"  KV is sent at no more than {STREAM_RATE}iB/s for this demo (--stream-rate): loopback is too fast to see.")


def show_overlap(timeline: Any) -> None:
    wire, exposed, hidden = 1e3 * timeline["wire_s"], 1e3 * timeline["exposed_s"], 100 * timeline["hidden"]
    print(f"  hidden      {hidden:.1f} % of the {wire:.1f} ms from the first byte sent until the last one verified,")
    print(f"              behind compute: {exposed:.1f} ms exposed, after token 0")
    print(f"  handoff     {1e3 * timeline['handoff_s']:.1f} ms from token 0 until the decode node had committed")


def show_bytes(timeline: Any, decode_status: Any, geometry: KVGeometry) -> None:
    """The prompt's KV on the wire and in the arena, beside what it would take in bf16."""
    kv_format, bf16 = FORMATS[timeline["kv_format"]], FORMATS["bf16"]
    num_tokens = timeline["num_prompt_tokens"]
    wire_bytes = sum(layer["wire_bytes"] for layer in timeline["layers"].values())
    bf16_bytes = geometry.num_layers * geometry.block_bytes(bf16) * bf16.num_blocks(num_tokens)
    print(f"  wire        {wire_bytes:,} bytes of {kv_format.name}: {wire_bytes / num_tokens:,.0f} per prompt token")
    print(f"              (bf16: {bf16_bytes / num_tokens:,.0f})")
    arena = decode_status["arena"]
    answer_slots = bf16.num_blocks(MAX_TOKENS - 1)
    prompt_slots = arena["used_slots"] - answer_slots
    if prompt_slots <= 0:
        print("  arena       the answer was over before one could look")
        return
    slot_bytes = arena["slot_bytes"]  # of all layers
    per_token, bf16_per_token = (n * slot_bytes / num_tokens for n in (prompt_slots, bf16.num_blocks(num_tokens)))
    print(f"  arena       {prompt_slots} slots of {slot_bytes:,} bytes: {per_token:,.0f} per prompt token, raw as sent")
    print(f"              (bf16: {bf16_per_token:,.0f}); {answer_slots} more slots are kept for the answer, in bf16")


def show_latencies(answer: Answer, timeline: Any) -> None:
    prefill_ms = 1e3 * (timeline["first_token_s"] - timeline["prefill_started_s"])
    print(f"  TTFT        {1e3 * answer.ttft_s:.1f} ms, {prefill_ms:.1f} ms of it prefill")
    gaps = answer.gaps_s
    if gaps:
        median_ms, max_ms = 1e3 * statistics.median(gaps), 1e3 * max(gaps)
        print(f"  ITL         {median_ms:.1f} ms median, {max_ms:.1f} ms at most")
        print(f"  decode      {len(gaps) / math.fsum(gaps):.0f} tokens/s")


def model_geometry() -> KVGeometry:
    config = json.loads((ROOT / MODEL / "config.json").read_text())
    return KVGeometry(config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"])


# --- the story ---


def demo(arguments: argparse.Namespace, logs: Path) -> None:
    """Start, ask, show, stop."""
    decode, prefill = make_daemons(arguments, logs)
    print("1. Start a decode node and a prefill node:")
    print(f"   {decode.command}\n   {prefill.command}", flush=True)
    start_s = time.monotonic()
    with running(decode, prefill):
        print(f"   both are healthy after {time.monotonic() - start_s:.1f} s")
        picture = ask_and_show(arguments.prompt, decode, prefill)
        if picture and arguments.picture:
            save_picture(picture, arguments.picture)
        if arguments.keep:
            wait_for_interrupt(decode, prefill)
    print("\n4. Stop both:")
    for daemon in (prefill, decode):
        daemon.check_stopped_well()
        print(f"   {daemon.role} node: SIGTERM, exit code {daemon.exit_code}")


def save_picture(address: str, path: Path) -> None:
    """The timeline as a PNG, by Chromium."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1150,600"]
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", *options, f"--user-data-dir={profile}", f"--screenshot={path.absolute()}", address]
        subprocess.run(command, check=True, capture_output=True, timeout=ANSWER_S)
    print(f"   saved as {path}")


def wait_for_interrupt(decode: Daemon, prefill: Daemon) -> None:
    """Leave both running until the person has seen enough."""
    print(
        f"\n   Both stay up: http://{HOST}:{prefill.port}/ and http://{HOST}:{decode.port}/. Ctrl-C stops them.",
        flush=True,
    )
    with suppress(KeyboardInterrupt):
        while True:
            signal.pause()


def make_daemons(arguments: argparse.Namespace, logs: Path) -> tuple[Daemon, Daemon]:
    stream_port = pick_port(7700)
    landing = ["--stream-port", str(stream_port), "--precision", "bf16", "--arena-bytes", "256M"]
    sending = ["--peer", f"{HOST}:{stream_port}", "--kv-format", arguments.kv_format, "--stream-rate", STREAM_RATE]
    computing = ["--precision", arguments.precision]
    decode = Daemon("decode", pick_port(8001), logs, landing)
    return decode, Daemon("prefill", pick_port(8000), logs, computing + sending)


def ask_and_show(question: str, decode: Daemon, prefill: Daemon) -> str | None:
    """The address of the answer's timeline, where it was handed over."""
    messages = conversation(question)
    print("\n2. Ask, over REST, after a conversation about other modules:")
    print("   (once before to warm up: the first use of a kernel costs more; nothing is cached of it)")
    body = {"messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0, "return_token_ids": True}
    chat(prefill, decode, body | {"max_tokens": 2}, show=False)
    print(f"\nuser> {question}\nassistant> ", end="", flush=True)
    answer = chat(prefill, decode, body, show=True)
    timeline = prefill.status()["requests"][-1]
    print(f"\n\n   {timeline['num_prompt_tokens']} prompt tokens, {len(answer.token_times_s)} output tokens")
    if timeline["wire_s"] is None:
        print("\n3. What happened: the first token ended the answer, so nothing was handed to the decode node.")
        return None
    print(f"\n3. What happened to the prompt's KV, layer by layer, sent as {timeline['kv_format']}:\n")
    show_layers(layer_spans(timeline))
    print()
    show_overlap(timeline)
    show_bytes(timeline, answer.decode_status, model_geometry())
    show_latencies(answer, timeline)
    picture = f"http://{HOST}:{prefill.port}/timeline/{timeline['request_id']}"
    print(f"\n   As a picture: {picture} (--keep leaves the nodes up for you to look, --picture FILE saves it)")
    return picture


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--precision", choices=tuple(NATIVE_FORMAT), default="int8", help="of prefill (default: int8)")
    formats = ("auto", *FORMATS)
    parser.add_argument("--kv-format", choices=formats, default="auto", help="default: auto, the precision's own")
    parser.add_argument("--prompt", default=QUESTION, help=f"the question (default: {QUESTION})")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="save the timeline as a PNG; needs chromium")
    parser.add_argument("--keep", action="store_true", help="leave both nodes running, to look at their pages")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops us stops the daemons
    try:
        with tempfile.TemporaryDirectory(prefix="hmad-demo-") as logs:
            demo(arguments, Path(logs))
    except KeyboardInterrupt:
        print("\ndemo: interrupted, both daemons are stopped", file=sys.stderr)
        return 130
    except (DemoError, OSError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
