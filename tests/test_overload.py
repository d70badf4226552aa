"""More than the nodes can do: what is served, what is refused and when, whose turn it is, and what is left behind."""

import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bench_common import Node
from checkpoints import write_checkpoint
from daemons import ANSWER_S, Daemon, DecodeDaemon, PrefillDaemon, running, wait_for
from load import Client, Plan, post, run_plan

from hmad.compute.device import PrefillChunk, PrefillObserver, PrefillResult, PrefillSequence
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad.roles.engine import ENGINE_NICE
from hmad.roles.prefill_engine import PrefillDone, PrefillEngine, PrefillListener

KEYS = ("key-a", "key-b", "key-c")
NUM_TOKENS = 8
PROMPT = list(range(8))
LONG = [i % 250 for i in range(900)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("\n".join(KEYS))
    return path


def usage(daemon: Daemon) -> dict[str, int]:
    return Node(daemon.url, daemon.port, daemon.pid).usage()


def ask(prefill: Daemon, prompt: object = PROMPT, key: str = KEYS[0], **fields: object) -> Any:
    """A completion with an API key."""
    return prefill.complete(prompt, headers={"Authorization": f"Bearer {key}"}, **{"max_tokens": 2} | fields)


def status(prefill: Daemon) -> Any:
    return prefill.get("/status", {"Authorization": f"Bearer {KEYS[0]}"}).json


def waiting(prefill: Daemon) -> int:
    return int(status(prefill)["waiting"])


# --- both nodes ---


def test_far_too_much_is_served_or_refused_and_leaves_nothing(model: Path, key_file: Path) -> None:
    """Three clients offer many times what two sequences at once can take."""
    decode = DecodeDaemon(model, max_batch_size=2)
    prefill = PrefillDaemon(model, [decode], max_queue=6, api_key_file=key_file)
    with running(decode, prefill):
        overload(prefill, seconds=1)  # opens what stays open
        before = [usage(daemon) for daemon in (prefill, decode)]
        outcomes = overload(prefill, seconds=2.5)
        after = [usage(daemon) for daemon in (prefill, decode)]
        decode.wait_until_empty()
        left = status(prefill)
    assert {(o.status, o.code) for o in outcomes} == {(200, None), (429, "queue_full")}
    assert {o.num_tokens for o in outcomes if o.status == 200} == {NUM_TOKENS}
    served = Counter(o.client for o in outcomes if o.status == 200)
    assert min(served[name] for name in "abc") > max(served.values()) / 2
    assert (left["waiting"], left["running"]) == (0, 0)
    assert left["staging"]["free_pages"] == left["staging"]["total_pages"]
    for then, now in zip(before, after, strict=True):
        assert (now["fds"], now["threads"]) == (then["fds"], then["threads"])
        assert now["rss_bytes"] < then["rss_bytes"] + (32 << 20)


def overload(prefill: PrefillDaemon, seconds: float) -> Sequence[Any]:
    clients = [Client(name, per_s=120, key=key) for name, key in zip("abc", KEYS, strict=True)]
    return run_plan(Plan(prefill.port, seconds, clients, prompt_chars=40, max_tokens=NUM_TOKENS)).requests


def test_one_client_with_many_requests_does_not_starve_another(model: Path, key_file: Path) -> None:
    decode = DecodeDaemon(model, max_batch_size=2)
    prefill = PrefillDaemon(model, [decode], max_queue=100, api_key_file=key_file)
    greedy = Client("greedy", at_once=60, num_requests=60, key=KEYS[0])
    with running(decode, prefill), ThreadPoolExecutor(1) as pool:
        flood = pool.submit(run_plan, Plan(prefill.port, ANSWER_S, [greedy], prompt_chars=40, max_tokens=24))
        wait_for(lambda: waiting(prefill) > 30)
        before = waiting(prefill)
        held = decode.status
        assert ask(prefill, key=KEYS[1]).status == 200
        assert before - waiting(prefill) < 12  # those that were placed already, and one turn each
        assert held["running"] + held["waiting"] <= 3  # whoever waits, waits where the queue is fair
        assert [o.num_tokens for o in flood.result().requests] == [24] * 60


# --- the queue at the edge ---


@pytest.fixture
def waiting_room(model: Path, key_file: Path) -> Iterator[PrefillDaemon]:
    """Two may wait. The wire is slow and staging small: a long prompt keeps the engine from taking another."""
    decode = DecodeDaemon(model)
    slow = {"stream_rate": "10K", "frame_bytes": "4K", "staging_bytes": "16K", "max_batch_tokens": 32}
    prefill = PrefillDaemon(model, [decode], max_queue=2, api_key_file=key_file, **slow)
    with running(decode, prefill):
        yield prefill
        decode.wait_until_empty()


def test_refusals_of_a_full_queue(waiting_room: PrefillDaemon) -> None:
    with ThreadPoolExecutor(3) as pool:
        with socket.create_connection(("127.0.0.1", waiting_room.port), ANSWER_S) as filler:
            filler.sendall(post("/v1/completions", {"prompt": LONG, "max_tokens": 2}, KEYS[2]))
            wait_for(lambda: status(waiting_room)["running"] == 1)
            first = pool.submit(ask, waiting_room)
            wait_for(lambda: waiting(waiting_room) == 1)
            assert refusal(ask(waiting_room, [PROMPT, PROMPT])) == (429, "queue_full")
            assert refusal(ask(waiting_room, [PROMPT] * 3)) == (400, "never_fits")
            assert waiting(waiting_room) == 1
            second = pool.submit(ask, waiting_room, n=3)
            wait_for(lambda: waiting(waiting_room) == 2)  # the choices of a prompt share its place
            assert refuses_without_the_body(waiting_room)
            other = pool.submit(ask, waiting_room, key=KEYS[1])  # below its share: the newest of the first gives way
            assert refusal(second.result()) == (429, "queue_full")
            assert waiting(waiting_room) == 2
        assert [first.result().status, other.result().status] == [200, 200]
    assert waiting(waiting_room) == 0


def refusal(answer: Any) -> tuple[int, str]:
    assert answer.status == 400 or int(answer.headers["Retry-After"]) >= 1
    return answer.status, answer.json["error"]["code"]


def refuses_without_the_body(prefill: Daemon) -> bool:
    """A head that announces a body which never comes."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEYS[0]}\r\nContent-Length: 100000\r\n"
    with socket.create_connection(("127.0.0.1", prefill.port), ANSWER_S) as client:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        return client.recv(12) == b"HTTP/1.1 429"


# --- the engine ---


def test_engines_yield_to_the_event_loop() -> None:
    """What computes is niced, so that what answers gets a core at once."""
    seen: list[int] = []
    done = threading.Event()

    class Noting:
        def prefill(self, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> PrefillResult:
            seen.append(os.getpriority(os.PRIO_PROCESS, 0))
            chunks[0].sequence.num_computed = chunks[0].end
            return PrefillResult({chunks[0].sequence: [SampledToken(1)]})

    def finished(_: PrefillDone) -> None:
        done.set()

    listener = PrefillListener(lambda blocks: None, lambda chunks, clock: None, finished)
    engine = PrefillEngine(Noting(), 64, 1 << 20, listener)  # type: ignore[arg-type]
    engine.submit(PrefillSequence(range(8), SamplingParams(max_tokens=1), (0,), None))
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    engine.start()
    assert done.wait(ANSWER_S)
    engine.stop()
    engine.join(ANSWER_S)
    assert seen == [ENGINE_NICE]
    assert os.getpriority(os.PRIO_PROCESS, 0) == ours
