"""Clients that leave, and requests whose time is over: at whatever moment, everything they held comes back."""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from daemons import ANSWER_S, DecodeDaemon, PrefillDaemon, running, wait_for
from fake_generator import ScriptedGenerator, plain_services, serving
from load import post

from hmad.compute.checkpoint import GenerationDefaults
from hmad.compute.tokenizer import Tokenizer
from hmad.edges.completions import ServedModel
from hmad.facts.formats import FORMATS, KVGeometry
from hmad.facts.requests import TokenEvent
from hmad.facts.sampling import SampledToken

GEOMETRY = KVGeometry(num_layers=4, num_kv_heads=2, head_dim=64)
LONG = [i % 250 for i in range(900)]
NUM_TOKENS = 50
PROMPT = FORMATS["int8"]
TAIL = FORMATS["bf16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(
        directory,
        num_layers=GEOMETRY.num_layers,
        num_kv_heads=GEOMETRY.num_kv_heads,
        head_dim=GEOMETRY.head_dim,
        max_positions=4096,
    )
    return directory


@pytest.fixture(scope="module")
def decode(model: Path) -> Iterator[DecodeDaemon]:
    decode = DecodeDaemon(model)
    with running(decode):
        yield decode


class Leaver:
    """A client that asks and leaves without having read a thing."""

    def __init__(self, prefill: PrefillDaemon, **body: object) -> None:
        self._connection = HTTPConnection("127.0.0.1", prefill.port, timeout=ANSWER_S)
        body = {"temperature": 0, "ignore_eos": True, "max_tokens": NUM_TOKENS} | body
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})

    def leave(self) -> None:
        self._connection.close()


def slots(num_prompt_tokens: int, num_choices: int = 1, num_tokens: int = NUM_TOKENS) -> int:
    return PROMPT.num_blocks(num_prompt_tokens) + num_choices * TAIL.num_blocks(num_tokens - 1)


def wire_bytes(num_prompt_tokens: int) -> int:
    return GEOMETRY.num_layers * PROMPT.num_blocks(num_prompt_tokens) * GEOMETRY.block_bytes(PROMPT)


def counts(prefill: PrefillDaemon) -> tuple[int, int]:
    status = prefill.status
    return status["waiting"], status["running"]


def wait_until_idle(prefill: PrefillDaemon, decode: DecodeDaemon) -> None:
    """Nothing is held on either side; how long that took is shown with -s."""
    start_s = time.monotonic()
    decode.wait_until_empty()
    print(f"slots were free after {time.monotonic() - start_s:.2f} s")
    wait_for(lambda: counts(prefill) == (0, 0), lambda: str(prefill.status))
    wait_for(lambda: decode.status["running"] == decode.status["waiting"] == 0)
    staging = prefill.status["staging"]
    assert staging["free_pages"] == staging["total_pages"]


def test_leaving_the_queue_the_reservation_and_the_middle_of_a_layer(model: Path, decode: DecodeDaemon) -> None:
    """The wire is so slow, and staging so small, that the first prompt stays in the middle of its layers."""
    prefill = PrefillDaemon(
        model, [decode], stream_rate="100K", frame_bytes="16K", staging_bytes="64K", max_batch_tokens=1024
    )
    with running(prefill):
        received = decode.metric("hmad_arena_used_slots"), link_bytes(decode)
        computing = Leaver(prefill, prompt=LONG)
        wait_for(lambda: link_bytes(decode) > received[1])
        reserved = Leaver(prefill, prompt=LONG)
        wait_for(lambda: decode.used_slots == 2 * slots(len(LONG)))
        head = Leaver(prefill, prompt=LONG, stream=True)
        wait_for(lambda: counts(prefill) == (1, 2))
        queued = Leaver(prefill, prompt=LONG, n=2)
        wait_for(lambda: counts(prefill) == (2, 2))
        queued.leave()
        wait_for(lambda: counts(prefill) == (1, 2))
        head.leave()
        wait_for(lambda: counts(prefill) == (0, 2))
        assert decode.used_slots == 2 * slots(len(LONG))
        reserved.leave()
        wait_for(lambda: decode.used_slots == slots(len(LONG)))
        assert link_bytes(decode) - received[1] < wire_bytes(len(LONG))
        computing.leave()
        wait_until_idle(prefill, decode)
        assert link_bytes(decode) - received[1] < wire_bytes(len(LONG))
        assert prefill.complete(LONG[:40], max_tokens=3).status == 200


def link_bytes(decode: DecodeDaemon) -> float:
    """KV bytes of all LAYERs that have begun to land."""
    lines = decode.get("/metrics").body.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("hmad_link_bytes_total{"))


def test_leaving_between_commit_and_committed(model: Path, decode: DecodeDaemon) -> None:
    """COMMIT leaves when the last LAYER begins to; here that one then takes a second."""
    prompt = LONG[:320]
    prefill = PrefillDaemon(model, [decode], stream_rate="90K", frame_bytes="128K")
    with running(prefill):
        received, num_tokens = link_bytes(decode), decode.status["output_tokens"]
        with prefill.stream(prompt=prompt, max_tokens=NUM_TOKENS, ignore_eos=True) as lines:
            assert b"text" in next(lines)  # token 0 does not wait for the handoff
            wait_for(lambda: link_bytes(decode) - received == wire_bytes(len(prompt)))
            assert decode.status["running"] + decode.status["waiting"] == 0
            assert decode.used_slots == slots(len(prompt))
        wait_until_idle(prefill, decode)
        assert decode.status["output_tokens"] == num_tokens


@pytest.fixture(scope="module")
def prefill(model: Path, decode: DecodeDaemon) -> Iterator[PrefillDaemon]:
    """Every request may live for two seconds."""
    prefill = PrefillDaemon(model, [decode], request_timeout=2)
    with running(prefill):
        yield prefill


@pytest.mark.parametrize("num_choices", [1, 3])
def test_leaving_while_decoding(prefill: PrefillDaemon, decode: DecodeDaemon, num_choices: int) -> None:
    num_tokens = 1500
    with prefill.stream(prompt=LONG, max_tokens=num_tokens, ignore_eos=True, n=num_choices, seed=1) as lines:
        list(itertools.islice(lines, 8 * num_choices))
        assert decode.used_slots == slots(len(LONG), num_choices, num_tokens)
        wait_for(lambda: decode.status["running"] == num_choices)
    wait_until_idle(prefill, decode)


def test_a_request_whose_time_is_over_ends_in_one_typed_error(prefill: PrefillDaemon, decode: DecodeDaemon) -> None:
    late = prefill.complete(LONG, max_tokens=3000)
    assert (late.status, late.json["error"]["code"]) == (504, "request_timeout")
    wait_until_idle(prefill, decode)
    with prefill.stream(prompt=LONG, max_tokens=3000, ignore_eos=True) as lines:
        events = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ")]
    assert len(events) > 2
    assert [event["error"]["code"] for event in events if "error" in event] == ["request_timeout"]
    assert "error" in events[-1]
    wait_until_idle(prefill, decode)


def test_time_passes_in_the_queue_too(prefill: PrefillDaemon, decode: DecodeDaemon) -> None:
    with ExitStack() as fillers:
        used = 0
        while decode.status["arena"]["total_slots"] - used >= slots(len(LONG), num_tokens=3000):
            lines = fillers.enter_context(prefill.stream(prompt=LONG, max_tokens=3000, ignore_eos=True))
            next(lines)
            used += slots(len(LONG), num_tokens=3000)
        late = prefill.complete(LONG, max_tokens=3000)
        assert (late.status, late.json["error"]["code"]) == (504, "request_timeout")
    wait_until_idle(prefill, decode)


async def test_a_client_that_does_not_read_cannot_hold_its_slots(model: Path) -> None:
    """Whoever writes to it is stuck; when the request's time is over, what it held comes back all the same."""
    generator = ScriptedGenerator()
    token = SampledToken(65, logits=bytes(1 << 20))
    generator.script = lambda request: [
        TokenEvent(0, index, token) for index in range(100)
    ]  # far more than sockets buffer
    with closing(Tokenizer(model)) as tokenizer:
        served = ServedModel(("m",), generator, tokenizer, GenerationDefaults(), 320, 1024, 100, request_timeout_s=0.3)
        async with serving(plain_services(role="prefill", served=served)) as address:
            _, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"), limit=1024)
            with closing(writer):
                body = {"prompt": "p", "max_tokens": 100, "stream": True, "return_logits": True}
                writer.write(post("/v1/completions", body))
                async with asyncio.timeout(ANSWER_S):
                    await generator.left.wait()
                assert generator.running == 0
