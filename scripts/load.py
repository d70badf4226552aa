"""Load on a prefill node, from a process of its own: `python scripts/load.py < plan.json > outcomes.json`.

Each client of the plan has an API key (or none) and comes either closed-loop (``at_once`` requests, each followed by
the next) or open-loop (``per_s`` requests at random moments, whatever becomes of them). A request is a line of bytes
made beforehand and an answer is searched, not parsed, so that the generator costs little beside what it measures.
"""

import asyncio
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop

PATIENCE_S = 120.0  # for answers that are still on their way when the plan's time is over
NUM_PROMPTS = 64
CONNECTING_AT_ONCE = 16  # a node shows out those who connect in hundreds and have not said anything yet
WORDS = ("the", "module", "returns", "a", "list", "of", "names", "and", "raises", "an", "error", "when", "no", "file")


@dataclass
class Client:
    """One client of a plan; ``num_requests`` ends it early."""

    name: str
    at_once: int = 0
    per_s: float = 0.0
    key: str | None = None
    num_requests: int | None = None


@dataclass
class Plan:
    port: int
    seconds: float
    clients: list[Client]
    prompt_chars: int = 400
    max_tokens: int = 64


@dataclass
class Outcome:
    """One request: when it was due, sent, first answered and finished (CLOCK_MONOTONIC), and how it ended."""

    client: str
    due_s: float
    sent_s: float
    answered_s: float = 0.0  # status line; of a stream that goes well, the first token
    ended_s: float = 0.0
    status: int = 0  # 0: the connection broke
    num_tokens: int = 0  # of an answer that is complete
    code: str | None = None  # of an error, also of one after the stream began


@dataclass
class Outcomes:
    """What a plan gave, and what the generator itself took."""

    requests: list[Outcome] = field(default_factory=list)
    began_s: float = 0.0
    cpu_share: float = 0.0  # of one core


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answered_s = 0.0
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._answered_s = self._answered_s or time.monotonic()
        self._received += data
        if is_whole(self._received) and not self._answered.done():
            self._answered.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if not self._answered.done():
            self._answered.set_result(None)

    async def ask(self, request: bytes, outcome: Outcome) -> None:
        """Send, wait for the whole answer, note it."""
        self._received.clear()
        self._answered_s = 0.0
        self._answered = asyncio.get_running_loop().create_future()
        outcome.sent_s = time.monotonic()
        if not self.is_open:
            return
        self._transport.write(request)
        await self._answered
        outcome.answered_s, outcome.ended_s = self._answered_s, time.monotonic()
        note(outcome, bytes(self._received))

    def close(self) -> None:
        self._transport.abort()


def is_whole(answer: bytearray) -> bool:
    head_bytes = answer.find(b"\r\n\r\n") + 4
    if head_bytes < 4:
        return False
    length = re.search(rb"Content-Length: (\d+)", answer[:head_bytes])
    return len(answer) >= head_bytes + int(length[1]) if length else answer.endswith(b"\r\n0\r\n\r\n")


def note(outcome: Outcome, answer: bytes) -> None:
    """Status, tokens and error code of a whole answer."""
    if not is_whole(bytearray(answer)):
        return
    outcome.status = int(answer[9:12])
    code = re.search(rb'"error":.*"code":"(\w+)"', answer)
    tokens = re.findall(rb'"completion_tokens":(\d+)', answer)
    outcome.code = code[1].decode() if code else None
    outcome.num_tokens = int(tokens[-1]) if tokens and not code else 0


class Generator:
    """Runs one client."""

    def __init__(self, plan: Plan, client: Client, outcomes: list[Outcome]) -> None:
        self._plan, self._client, self._outcomes = plan, client, outcomes
        self._random = random.Random(client.name)
        self._requests = [self._make_request() for _ in range(NUM_PROMPTS)]
        self._idle: list[Connection] = []
        self._connecting = asyncio.Semaphore(CONNECTING_AT_ONCE)
        self._num_left = client.num_requests if client.num_requests is not None else sys.maxsize
        self._end_s = time.monotonic() + plan.seconds

    async def run(self) -> None:
        running = [self._closed() for _ in range(self._client.at_once)]
        if self._client.per_s:
            running.append(self._open())
        await asyncio.gather(*running)
        for connection in self._idle:
            connection.close()

    async def _closed(self) -> None:
        while self._num_left and time.monotonic() < self._end_s:
            self._num_left -= 1
            await self._ask(time.monotonic())

    async def _open(self) -> None:
        due_s, asked = time.monotonic(), set()
        while self._num_left and due_s < self._end_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            self._num_left -= 1
            task = asyncio.create_task(self._ask(due_s))
            asked.add(task)
            task.add_done_callback(asked.discard)
            due_s += self._random.expovariate(self._client.per_s)
        await asyncio.gather(*asked)

    async def _ask(self, due_s: float) -> None:
        outcome = Outcome(self._client.name, due_s, time.monotonic())
        self._outcomes.append(outcome)
        connection = self._reuse() or await self._connect()
        if connection is None:
            return
        try:
            async with asyncio.timeout(self._plan.seconds + PATIENCE_S):
                await connection.ask(self._random.choice(self._requests), outcome)
        except TimeoutError:
            connection.close()
        if connection.is_open:
            self._idle.append(connection)

    def _reuse(self) -> Connection | None:
        """A connection that is idle and that the node has not closed meanwhile."""
        self._idle = [connection for connection in self._idle if connection.is_open]
        return self._idle.pop() if self._idle else None

    async def _connect(self) -> Connection | None:
        loop = asyncio.get_running_loop()
        try:
            async with self._connecting:
                _, connection = await loop.create_connection(Connection, "127.0.0.1", self._plan.port)
        except OSError:
            return None
        return connection

    def _make_request(self) -> bytes:
        text = ""
        while len(text) < self._plan.prompt_chars:
            text += self._random.choice(WORDS) + " "
        body = {"prompt": text, "max_tokens": self._plan.max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        return post("/v1/completions", body, self._client.key)


def post(path: str, body: dict[str, Any], key: str | None = None) -> bytes:
    """The bytes of a POST on a keep-alive connection."""
    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: hmad", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    head += [f"Authorization: Bearer {key}"] if key else []
    return "\r\n".join([*head, "", ""]).encode() + data


async def generate(plan: Plan) -> Outcomes:
    outcomes = Outcomes(began_s=time.monotonic())
    await asyncio.gather(*(Generator(plan, client, outcomes.requests).run() for client in plan.clients))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    outcomes.cpu_share = (usage.ru_utime + usage.ru_stime) / (time.monotonic() - outcomes.began_s)
    return outcomes


def run_plan(plan: Plan) -> Outcomes:
    """Put a plan's load on a node from a process of its own, and wait for what became of it."""
    done = subprocess.run(
        # Clients have machines of their own: here they give way to what is measured, and tell how late they were.
        ["nice", "-n", "10", sys.executable, Path(__file__)],
        input=json.dumps(asdict(plan)).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    answer = json.loads(done.stdout)
    return Outcomes([Outcome(**request) for request in answer.pop("requests")], **answer)


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank; nan of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


def main() -> None:
    plan = json.load(sys.stdin)
    plan["clients"] = [Client(**client) for client in plan["clients"]]
    json.dump(asdict(uvloop.run(generate(Plan(**plan)))), sys.stdout)


if __name__ == "__main__":
    main()
