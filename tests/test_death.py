"""A node dies, or falls silent, in each state of a request: SIGKILL, SIGSTOP, a network that swallows everything."""

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from checkpoints import write_checkpoint
from daemons import Daemon, DecodeDaemon, PrefillDaemon, running, wait_for
from fault_proxy import FaultProxy

PROMPT = list(range(240))
SHORT, LONG = 20, 1700  # tokens of an answer
NOTICED_S, FREED_S = 2.0, 3.0  # what is promised
SLACK_S = 3.0  # for a machine with other things to do; without detection it would take minutes
DEATHS = ["SIGKILL", "SIGSTOP", "silence"]


@dataclass(frozen=True)
class Wire:
    """What lies between two nodes."""

    prefill: PrefillDaemon
    decode: DecodeDaemon
    proxy: FaultProxy


@dataclass(frozen=True)
class Nodes:
    """``slow`` needs seconds for a prefill: its wire is slow, and it has little staging to run ahead."""

    decodes: list[DecodeDaemon]
    fast: PrefillDaemon
    slow: PrefillDaemon
    wires: list[Wire]

    def decode_of(self, peer: str) -> DecodeDaemon:
        """The decode node that a prefill node knows by this address."""
        return next(wire.decode for wire in self.wires if wire.proxy.peer == peer)

    def busy(self) -> DecodeDaemon | None:
        """The decode node that holds something."""
        return next((decode for decode in self.decodes if decode.used_slots > 0), None)


@pytest.fixture(scope="module")
def all_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    model = tmp_path_factory.mktemp("model")
    write_checkpoint(model, num_layers=4, head_dim=64, max_positions=2048)
    decodes = [DecodeDaemon(model), DecodeDaemon(model)]
    with ExitStack() as stack:
        proxies = [[stack.enter_context(FaultProxy(decode.stream_port)) for decode in decodes] for _ in range(2)]
        fast = PrefillDaemon(model, proxies[0])
        slow = PrefillDaemon(model, proxies[1], stream_rate="128K", frame_bytes="16K", staging_bytes="16K")
        wires = [
            Wire(prefill, decode, proxy)
            for prefill, own in zip((fast, slow), proxies, strict=True)
            for decode, proxy in zip(decodes, own, strict=True)
        ]
        stack.enter_context(running(*decodes, fast, slow))
        yield Nodes(decodes, fast, slow, wires)


@pytest.fixture
def nodes(all_nodes: Nodes) -> Iterator[Nodes]:
    """All of them well; and afterwards nothing is held, and all of them well again without anybody's help."""
    for prefill in (all_nodes.fast, all_nodes.slow):
        wait_for(lambda p=prefill: all(node["usable"] for node in p.status["decode_nodes"]))
    yield all_nodes
    for decode in all_nodes.decodes:
        decode.wait_until_empty()


@pytest.fixture(scope="module")
def expected(all_nodes: Nodes) -> list[int]:
    """The fault-free answer."""
    return list(all_nodes.fast.complete(PROMPT, max_tokens=LONG).choices[0]["token_ids"])


@contextmanager
def dead(nodes: Nodes, daemon: Daemon, death: str) -> Iterator[None]:
    """Kill, freeze or cut off a node; afterwards it is there again."""
    wires = [wire for wire in nodes.wires if daemon in (wire.prefill, wire.decode)]
    try:
        if death == "silence":
            for wire in wires:
                wire.proxy.black_hole()
        else:
            daemon.signal(signal.Signals[death])
        yield
    finally:
        daemon.signal(signal.SIGCONT)
        if death == "SIGKILL":
            daemon.die()
            daemon.start()
        for wire in wires:
            wire.proxy.heal()
        daemon.wait_until("/livez")


def last_event(lines: Iterator[bytes]) -> Any:
    *_, last = (line for line in lines if line.startswith(b"data: "))
    return json.loads(last[6:])


# --- a decode node ---


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_decode_node_dies_while_kv_lands(nodes: Nodes, expected: list[int], death: str, stream: bool) -> None:
    """Nothing was sent to the client yet: the request is placed again, and nobody notices."""
    with ThreadPoolExecutor(1) as clients:
        ask = streamed_tokens if stream else whole_tokens
        asked = clients.submit(ask, nodes.slow, SHORT)
        victim = wait_for(nodes.busy)
        with dead(nodes, victim, death):
            assert asked.result() == expected[:SHORT]
        assert nodes.decode_of(nodes.slow.status["requests"][-1]["peer"]) is not victim


@pytest.mark.parametrize("death", DEATHS)
def test_decode_node_dies_while_it_answers_whole(nodes: Nodes, expected: list[int], death: str) -> None:
    """Of an answer that is given whole the client has seen nothing: it comes from the other node."""
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(whole_tokens, nodes.fast, LONG)
        victim = wait_for(lambda: next((d for d in nodes.decodes if d.status["running"]), None))
        with dead(nodes, victim, death):
            assert asked.result() == expected


@pytest.mark.parametrize("death", DEATHS)
def test_decode_node_dies_while_it_streams(nodes: Nodes, death: str) -> None:
    """One typed error event, soon; the next request is served."""
    body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": LONG}
    with nodes.fast.stream(**body) as lines:
        next(lines)
        victim = wait_for(lambda: next((d for d in nodes.decodes if d.status["running"]), None))
        begun_s = time.monotonic()
        with dead(nodes, victim, death):
            error = last_event(lines)["error"]
            assert time.monotonic() - begun_s < NOTICED_S + SLACK_S
            assert error["code"] == "decode_node_failed"
            assert any(wire.proxy.peer in error["message"] for wire in nodes.wires if wire.decode is victim)
            assert nodes.fast.complete(PROMPT, max_tokens=SHORT).status == 200


@pytest.mark.parametrize("death", DEATHS)
def test_all_decode_nodes_die(nodes: Nodes, death: str) -> None:
    """A request that cannot be placed again is refused soon, with the reason; so are those that come meanwhile."""
    first, second = nodes.decodes
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(nodes.slow.complete, PROMPT, max_tokens=SHORT) for _ in range(4)]
        wait_for(nodes.busy)
        begun_s = time.monotonic()
        with dead(nodes, first, death), dead(nodes, second, death):
            refusals = [future.result() for future in asked]
            assert time.monotonic() - begun_s < 2 * NOTICED_S + SLACK_S
            assert {(r.status, r.json["error"]["code"]) for r in refusals} == {(503, "no_decode_node")}
            nodes.slow.wait_until("/health", 503)
            assert nodes.slow.complete(PROMPT, max_tokens=SHORT).json["error"]["code"] == "no_decode_node"


# --- a prefill node ---


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("state", ["kv lands", "decodes"])
def test_prefill_node_dies(nodes: Nodes, death: str, state: str) -> None:
    """The decode node frees what it held for it, ends its sequences, and serves the others."""
    prefill, field = (nodes.slow, "used_slots") if state == "kv lands" else (nodes.fast, "running")
    body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": LONG}

    def busy() -> DecodeDaemon | None:
        return next((d for d in nodes.decodes if (d.status | d.status["arena"])[field]), None)

    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(hang_on, prefill, body)
        victim_of = wait_for(busy)
        begun_s = time.monotonic()
        with dead(nodes, prefill, death):
            wait_for(lambda: victim_of.used_slots == 0 and not victim_of.status["running"])
            assert time.monotonic() - begun_s < FREED_S + SLACK_S
            other = nodes.fast if prefill is nodes.slow else nodes.slow
            assert other.complete(PROMPT, max_tokens=2).status == 200
        asked.result()


# --- helpers ---


def whole_tokens(prefill: PrefillDaemon, max_tokens: int) -> list[int]:
    return list(prefill.complete(PROMPT, max_tokens=max_tokens).choices[0]["token_ids"])


def streamed_tokens(prefill: PrefillDaemon, max_tokens: int) -> list[int]:
    body = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": max_tokens}
    with prefill.stream(prompt=PROMPT, **body) as lines:
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert "error" not in events[-1], events[-1]
    return [token for event in events for token in event["choices"][0].get("token_ids", ())]


def hang_on(prefill: PrefillDaemon, body: dict[str, Any]) -> None:
    """A client that waits, whatever comes."""
    try:
        with prefill.stream(**body) as lines:
            for _ in lines:
                pass
    except (OSError, EOFError):
        pass
