"""The whole path with real processes: every precision and KV format, the openai client, refusals, hang-ups."""

import base64
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from daemons import Answer, Daemon, DecodeDaemon, PrefillDaemon, needs_gpu, running, wait_for
from openai import OpenAI
from safetensors.torch import load_file, save_file

from hmad.facts.formats import FORMATS, KVGeometry

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 2, 2, 64
GEOMETRY = KVGeometry(NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM)
PROMPT = list(range(200))
# Relative error of the logits against fp32 KV of fp32 linears: what a precision costs, and what a format adds. Half
# again as much as measured; a wrong scale, or panels, heads, tokens or dims in the wrong place, make 0.35 to 1.6.
PRECISION_ERRORS = {"fp32": 1e-4, "bf16": 0.012, "int8": 0.03, "fp8": 0.1, "bfp8": 0.035}
FORMAT_ERRORS = {"fp32": 0.0, "bf16": 0.003, "int8": 0.01, "fp8_e4m3": 0.04, "mxfp8": 0.05, "bfp8": 0.012}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, max_positions=2048)
    return directory


@dataclass(frozen=True)
class Pair:
    """A prefill node and its decode node."""

    prefill: PrefillDaemon
    decode: DecodeDaemon
    client: OpenAI

    @property
    def model(self) -> str:
        return self.client.models.list().data[0].id


@pytest.fixture(scope="module")
def shared_pair(model: Path) -> Iterator[Pair]:
    decode = DecodeDaemon(model)
    prefill = PrefillDaemon(model, [decode])
    with (
        running(decode, prefill),
        OpenAI(base_url=f"{prefill.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield Pair(prefill, decode, client)


@pytest.fixture
def pair(shared_pair: Pair) -> Iterator[Pair]:
    """The pair with its defaults: int8 and bf16. Whatever a test does, the arena is empty afterwards."""
    yield shared_pair
    shared_pair.decode.wait_until_empty()


# --- every precision with every format ---


@pytest.fixture(scope="module")
def exact_decode(model: Path) -> Iterator[DecodeDaemon]:
    """One decode node for all prefill nodes. In fp32, so that every error is the prefill node's or the format's."""
    decode = DecodeDaemon(model, precision="fp32")
    with running(decode):
        yield decode


@pytest.fixture(scope="module")
def exact_logits(model: Path, exact_decode: DecodeDaemon) -> np.ndarray:
    prefill = PrefillDaemon(model, [exact_decode], precision="fp32", kv_format="fp32")
    with running(prefill):
        return forced_logits(prefill)


def forced_logits(prefill: PrefillDaemon) -> np.ndarray:
    """float32 [tokens of the decode node, vocab] after the same tokens, whoever computes them."""
    [choice] = prefill.complete(PROMPT, forced_token_ids=PROMPT[:12], return_logits=True).choices
    return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in choice["logits"][1:]])


# Blocks are encoded from float32 or from bfloat16, whatever the linears in between compute in.
@pytest.mark.parametrize(
    ("precision", "formats"),
    [("fp32", [*FORMATS]), ("bf16", [*FORMATS]), ("int8", ["int8"]), ("fp8", ["fp8_e4m3"]), ("bfp8", ["bfp8"])],
)
def test_logits_of_every_precision_and_format(
    model: Path, exact_decode: DecodeDaemon, exact_logits: np.ndarray, precision: str, formats: list[str]
) -> None:
    prefills = {
        name: PrefillDaemon(model, [exact_decode], precision=precision, kv_format=name, staging_bytes="16M")
        for name in formats
    }
    with running(*prefills.values()):
        errors = {
            name: np.linalg.norm(forced_logits(prefill) - exact_logits) / np.linalg.norm(exact_logits)
            for name, prefill in prefills.items()
        }
        spoken = {node["format"] for node in exact_decode.status["prefill_nodes"]}
    print(precision, errors)  # shown when the test fails
    assert spoken == set(formats)
    bounds = {name: PRECISION_ERRORS[precision] + FORMAT_ERRORS[name] for name in formats}
    assert {name: error for name, error in errors.items() if error > bounds[name]} == {}
    exact_decode.wait_until_empty()


# --- the openai client ---


def test_chat_streams_what_it_answers_whole(pair: Pair) -> None:
    asked = {
        "model": pair.model,
        "messages": [{"role": "user", "content": "Grüß dich"}],
        "max_tokens": 40,
        "seed": 7,
        "temperature": 0.8,
    }
    whole = pair.client.chat.completions.create(**asked)
    chunks = list(pair.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_seeds_make_choices_reproducible(pair: Pair) -> None:
    asked = {"temperature": 1.0, "seed": 5, "max_tokens": 24}
    [first, second] = [token_ids_of(pair.prefill.complete(PROMPT, n=3, **asked)) for _ in range(2)]
    assert first == second
    assert len({tuple(answer) for answer in first}) == 3
    received = pair.decode.metric("hmad_link_bytes_total")
    pair.prefill.complete(PROMPT, n=3, **asked)
    assert pair.decode.metric("hmad_link_bytes_total") - received == wire_bytes("int8", len(PROMPT))


def token_ids_of(answer: Answer) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer.choices]


def wire_bytes(format_name: str, num_tokens: int) -> int:
    fmt = FORMATS[format_name]
    return NUM_LAYERS * fmt.num_blocks(num_tokens) * GEOMETRY.block_bytes(fmt)


def test_logprobs_of_both_nodes(pair: Pair) -> None:
    """The first token's come from the prefill node, the others' from the decode node."""
    messages = [{"role": "user", "content": "hello"}]
    answer = pair.client.chat.completions.create(
        model=pair.model, messages=messages, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == 6
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob  # greedy: the best of all
        logprobs = [top.logprob for top in token.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert sum(np.exp(logprobs)) <= 1 + 1e-6


def test_several_streams_at_once(pair: Pair) -> None:
    """Eight clients, eight prompts: each gets its own answer, whole."""

    def stream(number: int) -> tuple[int, int]:
        chunks = pair.client.completions.create(
            model=pair.model, prompt=PROMPT[number:], max_tokens=30, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        usage = [chunk.usage for chunk in chunks if chunk.usage]
        return usage[0].prompt_tokens, usage[0].completion_tokens

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(stream, range(8))) == [(len(PROMPT) - number, 30) for number in range(8)]


# --- answers that end early ---


def test_one_token_never_reaches_the_decode_node(pair: Pair) -> None:
    before = pair.decode.metric("hmad_link_bytes_total"), pair.decode.status["output_tokens"]
    [choice] = pair.prefill.complete(PROMPT, max_tokens=1).choices
    assert (len(choice["token_ids"]), choice["finish_reason"]) == (1, "length")
    assert (pair.decode.metric("hmad_link_bytes_total"), pair.decode.status["output_tokens"]) == before


def test_answer_that_ends_with_its_first_token_is_not_handed_off(pair: Pair) -> None:
    [[first]] = token_ids_of(pair.prefill.complete(PROMPT, max_tokens=1))
    before = pair.decode.status["output_tokens"]
    [choice] = pair.prefill.complete(PROMPT, max_tokens=50, stop_token_ids=[first]).choices
    assert (choice["token_ids"], choice["finish_reason"]) == ([first], "stop")
    assert pair.prefill.status["requests"][-1]["committed_s"] is None
    assert pair.decode.status["output_tokens"] == before


def test_stop_string_ends_the_text_and_the_decoding(pair: Pair) -> None:
    asked = {"temperature": 1.0, "seed": 3, "max_tokens": 60}
    [free] = pair.prefill.complete(PROMPT, **asked).choices
    stop = free["text"][8:10]
    [choice] = pair.prefill.complete(PROMPT, stop=stop, **asked).choices
    assert choice["text"] == free["text"][: free["text"].index(stop)]
    assert choice["finish_reason"] == "stop"
    assert len(choice["token_ids"]) < len(free["token_ids"])


def test_hang_up_frees_the_slots(pair: Pair) -> None:
    cancelled = pair.prefill.metric('hmad_requests_total{outcome="cancelled"}')
    with pair.prefill.stream(prompt=PROMPT, max_tokens=1800, ignore_eos=True) as lines:
        list(itertools.islice(lines, 8))
        assert pair.decode.used_slots == FORMATS["int8"].num_blocks(200) + FORMATS["bf16"].num_blocks(1799)
    pair.decode.wait_until_empty()
    wait_for(lambda: pair.decode.status["running"] == 0)
    assert pair.prefill.metric('hmad_requests_total{outcome="cancelled"}') == cancelled + 1


def test_metrics_tell_of_a_request(pair: Pair) -> None:
    expected = {
        "hmad_time_to_first_token_seconds_count": 1,
        "hmad_inter_token_latency_seconds_count": 4,
        "hmad_time_per_output_token_seconds_count": 1,
        "hmad_end_to_end_seconds_count": 1,
        "hmad_queue_seconds_count": 1,
        "hmad_kv_exposed_seconds_count": 1,
        "hmad_kv_hidden_ratio_count": 1,
        "hmad_prompt_tokens_total": len(PROMPT),
        "hmad_output_tokens_total": 5,
        "hmad_link_bytes_total": wire_bytes("int8", len(PROMPT)),
    }
    pair.prefill.complete(PROMPT, max_tokens=2)  # before the first transfer there are no samples of links
    before = {sample: pair.prefill.metric(sample) for sample in expected}
    pair.prefill.complete(PROMPT, max_tokens=5)
    assert {sample: pair.prefill.metric(sample) - value for sample, value in before.items()} == expected
    assert pair.decode.metric("hmad_arena_total_slots") == pair.decode.status["arena"]["total_slots"]
    assert pair.decode.metric("hmad_output_tokens_total") == pair.decode.status["output_tokens"]
    assert pair.decode.metric("hmad_link_bytes_per_second") > 0


# --- several nodes ---


def test_nodes_are_many_to_many(model: Path) -> None:
    """Two requests of one prefill node go to two decode nodes, by room; two prefill nodes share a decode node."""
    request = {"prompt": PROMPT, "max_tokens": 400}
    one_request_slots = FORMATS["int8"].num_blocks(200) + FORMATS["bf16"].num_blocks(399)
    slot_bytes = NUM_LAYERS * GEOMETRY.slot_bytes
    small = DecodeDaemon(model, arena_bytes=one_request_slots * slot_bytes)
    large = DecodeDaemon(model, arena_bytes=(one_request_slots + 5) * slot_bytes)
    both = PrefillDaemon(model, [small, large])
    other = PrefillDaemon(model, [large])
    with running(small, large, both, other), ThreadPoolExecutor(2) as clients:
        wait_for(lambda: all(node["usable"] for node in both.status["decode_nodes"]))  # one suffices for /health
        both.complete(PROMPT, max_tokens=2)
        assert [small.status["output_tokens"], large.status["output_tokens"]] == [0, 1]  # the emptier one
        answers = list(clients.map(lambda _: both.complete(**request), range(2)))
        assert [len(answer.choices[0]["token_ids"]) for answer in answers] == [400, 400]
        assert [small.status["output_tokens"], large.status["output_tokens"]] == [399, 1 + 399]
        assert other.complete(**request).status == 200
        assert large.status["output_tokens"] == 1 + 2 * 399
        assert len(large.status["prefill_nodes"]) == 2
        small.wait_until_empty()
        large.wait_until_empty()


def test_absent_peer(model: Path) -> None:
    """/health says who is missing, requests are refused soon; the peer comes and all is well."""
    decode = DecodeDaemon(model)
    prefill = PrefillDaemon(model, [decode])
    with running(prefill, healthy=False):
        assert f"nobody listens on {decode.peer}" in wait_for(lambda: reason_without_peer(prefill))
        refused = prefill.complete(PROMPT, max_tokens=3)
        assert (refused.status, refused.json["error"]["code"]) == (503, "no_decode_node")
        assert decode.peer in refused.json["error"]["message"]
        assert int(refused.headers["Retry-After"]) >= 1
        with running(decode):
            prefill.wait_until("/health", 200)
            assert len(prefill.complete(PROMPT, max_tokens=3).choices[0]["token_ids"]) == 3
        prefill.wait_until("/health", 503)


def test_full_peer_and_full_queue(model: Path) -> None:
    """While the arena is full one request waits, the next is refused at once; one that never fits is told so."""
    num_slots = FORMATS["int8"].num_blocks(200) + FORMATS["bf16"].num_blocks(699) + 5  # room for one answer
    decode = DecodeDaemon(model, arena_bytes=num_slots * NUM_LAYERS * GEOMETRY.slot_bytes)
    prefill = PrefillDaemon(model, [decode], max_queue=1)
    with running(decode, prefill), ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(prefill.complete, PROMPT, max_tokens=700)]
        wait_for(lambda: decode.used_slots > 0)
        answers.append(clients.submit(prefill.complete, PROMPT, max_tokens=650))
        wait_for(lambda: prefill.status["waiting"] == 1)
        refused = prefill.complete(PROMPT, max_tokens=3)
        assert (refused.status, refused.json["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["Retry-After"]) >= 1
        assert [len(answer.result().choices[0]["token_ids"]) for answer in answers] == [700, 650]
        never = prefill.complete(PROMPT, max_tokens=1800, n=8)
        assert (never.status, never.json["error"]["code"]) == (400, "never_fits")
        decode.wait_until_empty()


# --- refusals ---


@pytest.fixture(scope="module")
def strangers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Daemon]]:
    """Prefill nodes around a decode node with a cluster key: a friend, and those it must refuse."""
    directory = tmp_path_factory.mktemp("keys")
    keys = {name: write_key(directory / name) for name in ("right", "wrong")}
    write_checkpoint(directory / "other", head_dim=HEAD_DIM, seed=1)
    decode = DecodeDaemon(model, cluster_key_file=keys["right"])
    prefills = {
        "friend": PrefillDaemon(model, [decode], cluster_key_file=keys["right"]),
        "wrong_key": PrefillDaemon(model, [decode], cluster_key_file=keys["wrong"]),
        "no_key": PrefillDaemon(model, [decode]),
        "other_model": PrefillDaemon(directory / "other", [decode], cluster_key_file=keys["right"]),
    }
    with running(decode), running(*prefills.values(), healthy=False):
        yield {"decode": decode, **prefills}


def write_key(path: Path) -> Path:
    path.write_bytes(os.urandom(16).hex().encode())
    path.chmod(0o600)
    return path


def test_cluster_key_opens(strangers: dict[str, Daemon]) -> None:
    strangers["friend"].wait_until("/health")
    assert strangers["friend"].complete(PROMPT, max_tokens=2).status == 200


@pytest.mark.parametrize(
    ("name", "words"), [("wrong_key", "cluster key"), ("no_key", "cluster key"), ("other_model", "model")]
)
def test_stranger_is_told_why(strangers: dict[str, Daemon], name: str, words: str) -> None:
    reason = wait_for(lambda: reason_without_peer(strangers[name]))
    assert words in reason


def test_strangers_stand_in_the_decode_node_s_log(strangers: dict[str, Daemon]) -> None:
    decode, words = strangers["decode"], ("the models differ", "the prefill node refuses")
    wait_for(lambda: all(word in decode.log for word in words), lambda: decode.log)


def reason_without_peer(prefill: Daemon) -> str | None:
    """Why a prefill node is not healthy, once it has tried."""
    answer = prefill.get("/health")
    reason = str(answer.json["reason"])
    return reason if answer.status == 503 and "not connected yet" not in reason else None


def test_port_in_use_is_one_clear_line(pair: Pair, model: Path) -> None:
    seconds: dict[int, Daemon] = {
        pair.prefill.port: PrefillDaemon(model, [pair.decode], port=pair.prefill.port),
        pair.decode.stream_port: DecodeDaemon(model, stream_port=pair.decode.stream_port),
    }
    for daemon in seconds.values():
        daemon.start()
    for port, daemon in seconds.items():
        assert daemon.end() == 2, daemon.log
        complaints = [line for line in daemon.log.splitlines() if line.startswith("hmad: ")]
        assert len(complaints) == 1
        assert f"127.0.0.1:{port}" in complaints[0]
        assert "Traceback" not in daemon.log
        daemon.kill()


def test_dummy_weights_an_emulated_precision_and_a_restricted_decode_node(model: Path) -> None:
    """What each end may choose by itself: --load-format, --precision, --accept-formats."""
    decode = DecodeDaemon(model, load_format="dummy", accept_formats="bfp8,bf16")
    prefill = PrefillDaemon(model, [decode], load_format="dummy", precision="fp8")
    with running(decode, prefill):
        assert prefill.status["emulated"]
        assert not decode.status["emulated"]
        assert prefill.status["decode_nodes"][0]["format"] == "bf16"  # fp8_e4m3 is not taken, bf16 is the next best
        answer = prefill.complete(PROMPT, max_tokens=4, temperature=0, ignore_eos=True)
        assert answer.json["usage"]["completion_tokens"] == 4
        decode.wait_until_empty()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(model: Path) -> None:
    decode = DecodeDaemon(model, device="cuda:0")
    for daemon in (decode, PrefillDaemon(model, [decode], device="cuda:0")):
        daemon.start()
        assert daemon.end() == 2
        assert "--device cuda:0: torch" in daemon.log
        assert "finds no GPU here" in daemon.log
        daemon.kill()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=needs_gpu)])
def test_a_nan_fails_its_request_alone_and_is_counted(tmp_path: Path, device: str) -> None:
    """The embedding of one token, the first that the model answers, is NaN: as a newest token, then in a prompt."""
    reference = write_checkpoint(tmp_path, num_layers=2, num_kv_heads=2, head_dim=64, tied=False, max_positions=256)
    prompt = list(range(40))
    with torch.inference_mode():
        answer = int(reference(torch.tensor([prompt])).logits[0, -1].argmax())
    assert answer not in prompt
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][answer] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    memory = {} if device == "cpu" else {"device_memory": "4G"}
    decode = DecodeDaemon(tmp_path, device=device, **memory)
    prefill = PrefillDaemon(tmp_path, [decode], device=device, **memory)

    def counted(daemon: Daemon, cause: str) -> bool:
        return f'hmad_errors_total{{cause="{cause}"}} 1.0' in daemon.get("/metrics").body.decode()

    with running(decode, prefill):
        failed = prefill.complete(prompt, max_tokens=4)
        assert (failed.status, failed.json["error"]["code"]) == (503, "decode_node_failed")
        assert "the weights or this precision are at fault" in failed.json["error"]["message"]
        assert counted(decode, "non_finite")
        failed = prefill.complete([*prompt, answer], max_tokens=4)
        assert (failed.status, failed.json["error"]["code"]) == (500, "internal_error")
        assert "K or V of layer 0 at position 40 is NaN" in failed.json["error"]["message"]
        assert counted(prefill, "NonFiniteKVError")
        assert prefill.complete(prompt, max_tokens=1).status == 200
        decode.wait_until_empty()
