"""Stopping real daemons: draining, its time limit, a second signal, and restarts under load."""

import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from daemons import DecodeDaemon, PrefillDaemon, running, wait_for

PROMPT = list(range(100))
LONG = 1800  # tokens: some seconds
ENDLESS = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": LONG, "return_token_ids": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, max_positions=2048)
    return directory


@contextmanager
def streaming(prefill: PrefillDaemon, decode: DecodeDaemon) -> Iterator[Iterator[bytes]]:
    """A long answer that has begun to come."""
    with prefill.stream(**ENDLESS) as lines:
        next(lines)
        wait_for(lambda: decode.status["running"] == 1)
        yield lines


def events_of(lines: Iterator[bytes]) -> list[dict]:
    """The events that are left, but for [DONE]."""
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


def num_tokens(events: list[dict]) -> int:
    return sum(len(event["choices"][0].get("token_ids", ())) for event in events if event.get("choices"))


def test_a_prefill_node_finishes_what_it_has(model: Path) -> None:
    decode = DecodeDaemon(model)
    prefill = PrefillDaemon(model, [decode])
    with running(decode):
        with running_until_told(prefill), streaming(prefill, decode) as lines:
            prefill.signal(signal.SIGTERM)
            prefill.wait_until("/health", 503)
            assert "drains" in prefill.get("/health").json["reason"]
            refused = prefill.complete(PROMPT, max_tokens=3)
            assert (refused.status, refused.json["error"]["code"]) == (503, "draining")
            assert int(refused.headers["Retry-After"]) >= 1
            assert num_tokens(events_of(lines)) == LONG
            prefill.wait_stopped()
        wait_for(lambda: "drains" in decode.log)
        decode.wait_until_empty()


def test_a_decode_node_finishes_what_it_has(model: Path) -> None:
    leaving, staying = DecodeDaemon(model, arena_bytes="32M"), DecodeDaemon(model)
    prefill = PrefillDaemon(model, [leaving, staying])
    with running(staying, prefill), running_until_told(leaving):
        wait_for(lambda: all(node["usable"] for node in prefill.status["decode_nodes"]))
        with streaming(prefill, leaving) as lines:
            leaving.signal(signal.SIGTERM)
            leaving.wait_until("/health", 503)
            wait_for(lambda: [node["usable"] for node in prefill.status["decode_nodes"]] == [False, True])
            assert prefill.complete(PROMPT, max_tokens=3).status == 200
            assert staying.status["output_tokens"] == 2
            assert num_tokens(events_of(lines)) == LONG
            leaving.wait_stopped()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(model: Path, second: signal.Signals) -> None:
    decode = DecodeDaemon(model)
    prefill = PrefillDaemon(model, [decode])
    with running(decode):
        with running_until_told(prefill), streaming(prefill, decode) as lines:
            prefill.signal(signal.SIGTERM)
            prefill.wait_until("/health", 503)
            prefill.signal(second)
            *events, last = events_of(lines)
            assert last["error"]["code"] == "shutting_down"
            assert num_tokens(events) < LONG
            prefill.wait_stopped()
        decode.wait_until_empty()


def test_draining_has_an_end(model: Path) -> None:
    """A decode node whose time is up tells the client why, through the prefill node."""
    decode = DecodeDaemon(model, drain_timeout=0.2)
    prefill = PrefillDaemon(model, [decode])
    with running(prefill, healthy=False), running_until_told(decode):
        prefill.wait_until("/health")
        with streaming(prefill, decode) as lines:
            decode.signal(signal.SIGTERM)
            *events, last = events_of(lines)
            assert "the decode node stops" in last["error"]["message"]
            assert num_tokens(events) < LONG
            decode.wait_stopped()
        assert prefill.metric('hmad_errors_total{cause="shutdown"}') == 1


def test_restarting_one_decode_node_after_the_other_loses_no_request(model: Path) -> None:
    decodes = [DecodeDaemon(model), DecodeDaemon(model)]
    prefill = PrefillDaemon(model, decodes)
    done = threading.Event()
    with running(*decodes, prefill), ThreadPoolExecutor(4) as clients:
        wait_for(lambda: all(node["usable"] for node in prefill.status["decode_nodes"]))
        expected = prefill.complete(PROMPT, max_tokens=50).choices[0]["token_ids"]

        def keep_asking(_: int) -> list[object]:
            answers = []
            while not done.is_set():
                answers.append(prefill.complete(PROMPT, max_tokens=50))
            return [a.status if a.status != 200 else a.choices[0]["token_ids"] for a in answers]

        asked = [clients.submit(keep_asking, i) for i in range(4)]
        try:
            for index, decode in enumerate(decodes):
                decode.stop()
                decode.start()
                wait_for(lambda i=index: prefill.status["decode_nodes"][i]["usable"])
        finally:
            done.set()
        answers = [answer for client in asked for answer in client.result()]
        assert len(answers) > 10
        assert all(answer == expected for answer in answers)


@contextmanager
def running_until_told(daemon: PrefillDaemon | DecodeDaemon) -> Iterator[None]:
    """A daemon that the test itself stops."""
    try:
        daemon.start()
        daemon.wait_until("/health")
        yield
    finally:
        daemon.kill()
