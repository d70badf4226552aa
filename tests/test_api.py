"""The REST edge over a real socket, with the openai client and with raw HTTP; only the generator is scripted."""

import asyncio
import base64
import http.client
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import openai
import pytest
from fake_generator import (
    END_THINK,
    EOS,
    IM_END,
    NODE_LOST,
    THINK,
    VOCAB_SIZE,
    ScriptedGenerator,
    Step,
    events_of,
    extras_of,
    plain_services,
    serving,
    serving_in_thread,
    write_byte_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from hmad.compute.checkpoint import GenerationDefaults
from hmad.compute.tokenizer import Tokenizer
from hmad.edges import api
from hmad.edges.api import RoleServices, key_digest
from hmad.edges.completions import ServedModel, ThinkingCounter, choice_seeds
from hmad.edges.metrics import Metrics
from hmad.edges.openai_schema import HARMLESS, ChatRequest, CompletionRequest
from hmad.facts.errors import HmadError, LocalError, RequestError, TransferAborted
from hmad.facts.requests import TokenEvent
from hmad.facts.sampling import SampledToken

MAX_MODEL_LEN = 128
CHAT: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    folder = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(folder)
    tokenizer = Tokenizer(folder)
    yield tokenizer
    tokenizer.close()


def served_model(tokenizer: Tokenizer, generator: ScriptedGenerator) -> ServedModel:
    return ServedModel(
        names=("tiny", "org/alias"),
        generator=generator,
        tokenizer=tokenizer,
        defaults=GenerationDefaults(temperature=0.6, top_k=20, eos_token_ids=(IM_END, EOS)),
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        default_max_tokens=32,
    )


@dataclass
class Edge:
    """A served application and the two clients that talk to it."""

    address: str
    services: RoleServices
    generator: ScriptedGenerator
    metrics: Metrics
    http: aiohttp.ClientSession
    client: openai.AsyncOpenAI

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Status and parsed body of a POST; ``body`` is sent as JSON unless it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        async with self.http.post(self.address + path, data=data, headers=headers, **options) as response:
            return response.status, await response.json()

    async def complete(self, **fields: Any) -> Any:
        """The answer to a completions request that must succeed."""
        status, body = await self.post("/v1/completions", {"prompt": "p"} | fields)
        assert status == 200, body
        return body

    async def refused(self, path: str, body: Any, **options: Any) -> tuple[int, str | None, str | None]:
        """Status, param and code of a refusal in OpenAI's shape."""
        status, answer = await self.post(path, body, **options)
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["message"]
        return status, answer["error"]["param"], answer["error"]["code"]

    async def events(self, path: str, body: Any) -> list[str]:
        """The data of each server-sent event."""
        async with self.http.post(self.address + path, json=body) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            blocks = (await response.text()).split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") for block in blocks)
        return [block.removeprefix("data: ") for block in blocks]

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"hmad_{name}", labels) or 0.0


@asynccontextmanager
async def edge_of(**services: Any) -> AsyncIterator[Edge]:
    edge_services = plain_services(**services)
    async with (
        serving(edge_services) as address,
        aiohttp.ClientSession() as http_session,
        openai.DefaultAsyncHttpxClient(verify=False, timeout=10) as plain_http,
    ):
        # Without TLS the client need not load certificates, which takes longer than most tests.
        client = openai.AsyncOpenAI(base_url=address + "/v1", api_key="k", max_retries=0, http_client=plain_http)
        generator = services["served"].generator if services.get("served") else ScriptedGenerator()
        yield Edge(address, edge_services, generator, edge_services.metrics, http_session, client)


@pytest.fixture
async def edge(tokenizer: Tokenizer) -> AsyncIterator[Edge]:
    async with edge_of(role="prefill", served=served_model(tokenizer, ScriptedGenerator())) as edge:
        yield edge


# --- The openai client --------------------------------------------------------------------------------------------


async def test_completion(edge: Edge) -> None:
    answer = await edge.client.completions.create(model="tiny", prompt="abc", max_tokens=7)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello", "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 6, 9)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    assert edge.generator.requests[0].prompt_token_ids == tuple(b"abc")
    assert edge.generator.requests[0].params.max_tokens == 7


async def test_chat(edge: Edge) -> None:
    edge.generator.script = lambda request: events_of("hi there", finish="length")
    answer = await edge.client.chat.completions.create(model="org/alias", messages=CHAT, seed=5)
    assert (answer.object, answer.model) == ("chat.completion", "org/alias")
    assert answer.choices[0].message.role == "assistant"
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hi there", "length")
    assert edge.generator.requests[0].seeds == (5,)


async def test_a_chat_stream_is_what_openai_sends(edge: Edge) -> None:
    edge.generator.script = lambda request: events_of("ab")
    body = {"messages": CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = await edge.events("/v1/chat/completions", body)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert {(c["id"], c["object"], c["created"], c["model"]) for c in parsed} == {
        (parsed[0]["id"], "chat.completion.chunk", parsed[0]["created"], "tiny")
    }
    base = {"index": 0, "logprobs": None, "finish_reason": None}
    assert [c["choices"] for c in parsed] == [
        [{**base, "delta": {"role": "assistant", "content": ""}}],
        [{**base, "delta": {"content": "a"}}],
        [{**base, "delta": {"content": "b"}}],
        [{**base, "delta": {}, "finish_reason": "stop"}],
        [],
    ]
    assert [c["usage"] for c in parsed[:-1]] == [None] * 4
    assert parsed[-1]["usage"]["completion_tokens"] == 3


async def test_without_include_usage_no_chunk_speaks_of_it(edge: Edge) -> None:
    *chunks, _ = await edge.events("/v1/chat/completions", {"messages": CHAT, "stream": True})
    assert not any("usage" in chunk for chunk in chunks)


async def test_the_openai_client_reads_a_completion_stream(edge: Edge) -> None:
    stream = await edge.client.completions.create(
        model="tiny", prompt="p", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "hello"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 7


async def test_choices_interleave_and_stay_apart(edge: Edge) -> None:
    texts = ["one", "three", "seventeen"]

    def script(request: Any) -> list[TokenEvent]:
        events = [events_of(text, choice) for choice, text in enumerate(texts)]
        return [e for step in range(10) for of_choice in events for e in of_choice[step : step + 1]]

    edge.generator.script = script
    stream = await edge.client.chat.completions.create(model="tiny", messages=CHAT, n=3, seed=9, stream=True)
    told = {0: "", 1: "", 2: ""}
    order = []
    async for chunk in stream:
        told[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        order.append(chunk.choices[0].index)
    assert list(told.values()) == texts
    assert order != sorted(order)
    whole = await edge.client.chat.completions.create(model="tiny", messages=CHAT, n=3, seed=9)
    assert [choice.message.content for choice in whole.choices] == texts
    assert edge.generator.requests[0].seeds == edge.generator.requests[1].seeds == choice_seeds(9, 3)


def test_seeds_of_choices() -> None:
    assert choice_seeds(7, 3)[:1] == choice_seeds(7, 1) == (7,)
    assert len(set(choice_seeds(7, 8))) == 8
    assert choice_seeds(-1, 1) == (2**64 - 1,)
    assert choice_seeds(None, 1) != choice_seeds(None, 1)


async def test_several_prompts(edge: Edge) -> None:
    edge.generator.script = lambda request: [
        e for choice in (0, 1) for e in events_of(bytes(request.prompt_token_ids) + b"%d" % choice, choice)
    ]
    for prompts in (["ab", "c"], [[97, 98], [99]]):
        answer = await edge.complete(prompt=prompts, n=2)
        assert [c["text"] for c in answer["choices"]] == ["ab0", "ab1", "c0", "c1"]
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"]["prompt_tokens"] == 3
    echoed = await edge.complete(prompt=["ab", "c"], n=2, echo=True)
    assert [c["text"] for c in echoed["choices"]] == ["abab0", "abab1", "cc0", "cc1"]
    assert (await edge.complete(prompt=[97, 98]))["choices"][0]["text"] == "ab0"


async def test_echo_in_a_stream_comes_first(edge: Edge) -> None:
    *chunks, _ = await edge.events("/v1/completions", {"prompt": [104, 105], "echo": True, "stream": True})
    assert [json.loads(c)["choices"][0]["text"] for c in chunks] == ["hi", "h", "e", "l", "l", "o", ""]


# --- Text ---------------------------------------------------------------------------------------------------------


async def test_text_is_never_cut_inside_a_character(edge: Edge) -> None:
    text = "añ€😀\u200dz"
    edge.generator.script = lambda request: events_of(text)
    *chunks, _ = await edge.events("/v1/completions", {"prompt": "p", "stream": True})
    pieces = [json.loads(c)["choices"][0]["text"] for c in chunks]
    assert [p for p in pieces if p] == list(text)


async def test_an_unfinished_character_comes_out_as_a_replacement(edge: Edge) -> None:
    edge.generator.script = lambda request: events_of(b"a\xe2\x82", finish="length")
    assert (await edge.complete())["choices"][0]["text"] == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_choice(edge: Edge, stream: bool) -> None:
    edge.generator.script = lambda request: [*events_of("one END two", finish="length"), asyncio.Event()]
    body = {"prompt": "p", "stop": ["END", "never"], "stream": stream}
    if stream:
        *chunks, _ = await edge.events("/v1/completions", body)
        choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    else:
        choices = (await edge.complete(**body))["choices"]
    assert "".join(choice["text"] for choice in choices) == "one "
    assert choices[-1]["finish_reason"] == "stop"
    assert edge.generator.stopped == [0]


async def test_tokens_on_their_way_after_a_stop_string_are_dropped(edge: Edge) -> None:
    edge.generator.script = lambda request: [*events_of("aEND more", 0), *events_of("b", 1)]
    answer = await edge.complete(n=2, stop="END")
    assert [c["text"] for c in answer["choices"]] == ["a", "b"]
    assert answer["usage"]["completion_tokens"] == 4 + 2


async def test_the_end_token_is_counted_but_not_shown(edge: Edge) -> None:
    answer = await edge.complete(skip_special_tokens=False, return_token_ids=True)
    assert answer["choices"][0]["text"] == "hello"
    assert answer["choices"][0]["token_ids"] == [*b"hello", EOS]
    assert answer["usage"]["completion_tokens"] == 6


async def test_reasoning_is_counted(edge: Edge) -> None:
    edge.generator.script = lambda request: [
        *(TokenEvent(0, 0, SampledToken(token_id)) for token_id in (THINK, 97, 98, END_THINK)),
        *events_of("c"),
    ]
    _, answer = await edge.post("/v1/chat/completions", {"messages": CHAT})
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert answer["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("prompt_end", "num_tokens"),
    [([THINK, 10], 2), ([THINK, 10, END_THINK, 10], 0), ([THINK, 1, 2, 3, 4], 0), ([], 0)],
)
def test_a_template_may_open_the_reasoning(prompt_end: list[int], num_tokens: int) -> None:
    counter = ThinkingCounter((THINK, END_THINK), prompt_end)
    for token_id in (97, END_THINK, 98):
        counter.feed(token_id)
    assert counter.num_tokens == num_tokens


def test_a_model_without_marks_does_not_reason() -> None:
    counter = ThinkingCounter((None, None), [1, 2])
    counter.feed(97)
    assert counter.num_tokens == 0


# --- A decode node is lost -----------------------------------------------------------------------------------------


async def test_whole_answer_begins_anew_where_it_is_placed_again(edge: Edge) -> None:
    """What came from the lost node is forgotten, but for the choices that it had finished."""
    first = [*events_of("done", 0), *events_of("gone", 1)[:3]]
    edge.generator.script = lambda request: [*first, NODE_LOST, *events_of("hello", 1)]
    answer = await edge.complete(n=2, return_token_ids=True)
    assert [choice["text"] for choice in answer["choices"]] == ["done", "hello"]
    assert answer["choices"][1]["token_ids"] == [*b"hello", EOS]
    assert answer["usage"]["completion_tokens"] == 5 + 6
    assert [request.streamed for request in edge.generator.requests] == [False]
    # A client got 11 tokens: what it was never given, or is given once more, counts no second time.
    assert edge.counted("output_tokens_total") == 5 + 6
    names = ("time_to_first_token", "inter_token_latency", "time_per_output_token", "end_to_end")
    assert [edge.counted(f"{name}_seconds_count") for name in names] == [2, 4 + 5, 2, 2]


# --- What is asked for besides ------------------------------------------------------------------------------------


async def test_logprobs_of_a_completion(edge: Edge) -> None:
    skipped = TokenEvent(0, 0, SampledToken(IM_END, *extras_of(IM_END)))
    edge.generator.script = lambda request: [skipped, *events_of("a€b", finish="length")]
    logprobs = (await edge.complete(logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<|im_end|>", "a", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac", "b"]
    assert logprobs["token_logprobs"] == [-0.5] * 6
    assert logprobs["top_logprobs"][1] == {"a": -0.5, "x": -9999.0}
    assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 2]
    assert edge.generator.requests[0].params.num_logprobs == 2


async def test_logprobs_of_a_chat_stream(edge: Edge) -> None:
    edge.generator.script = lambda request: events_of("€", finish="length")
    stream = await edge.client.chat.completions.create(
        model="tiny", messages=CHAT, logprobs=True, top_logprobs=2, stream=True
    )
    entries = [
        entry
        async for chunk in stream
        for choice in chunk.choices
        if choice.logprobs and choice.logprobs.content
        for entry in choice.logprobs.content
    ]
    assert bytes(byte for entry in entries for byte in entry.bytes or []) == "€".encode()
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2, 2]


async def test_token_ids_and_logits(edge: Edge) -> None:
    fields = {"prompt": "p", "max_tokens": 3, "return_token_ids": True, "return_logits": True}
    edge.generator.script = lambda request: events_of("ab", finish="length")
    choice = (await edge.complete(**fields))["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([112], [97, 98])
    assert [base64.b64decode(row) for row in choice["logits"]] == [b"aaaa", b"bbbb"]
    *chunks, _ = await edge.events("/v1/completions", fields | {"stream": True})
    streamed = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert streamed[0]["prompt_token_ids"] == [112]
    assert [i for c in streamed for i in c.get("token_ids", [])] == [97, 98]
    assert [row for c in streamed for row in c.get("logits", [])] == choice["logits"]


async def test_chat_names_prompt_tokens_once(edge: Edge) -> None:
    body = {"messages": CHAT, "return_token_ids": True, "n": 2}
    edge.generator.script = lambda request: [*events_of("a", 0), *events_of("b", 1)]
    *chunks, _ = await edge.events("/v1/chat/completions", body | {"stream": True})
    assert [i for i, c in enumerate(chunks) if "prompt_token_ids" in json.loads(c)] == [0]
    _, whole = await edge.post("/v1/chat/completions", body)
    assert whole["prompt_token_ids"] == json.loads(chunks[0])["prompt_token_ids"]
    assert [c["token_ids"] for c in whole["choices"]] == [[97, EOS], [98, EOS]]


async def test_request_over_generation_config_over_neutral(edge: Edge) -> None:
    await edge.complete()
    await edge.complete(
        temperature=0, top_k=-1, top_p=0.5, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.5, stop_token_ids=[65], ignore_eos=True, forced_token_ids=[1, 2],
    )  # fmt: skip
    plain, full = (request.params for request in edge.generator.requests)
    assert (plain.temperature, plain.top_k, plain.top_p) == (0.6, 20, 1.0)
    assert (plain.stop_token_ids, plain.max_tokens) == ((IM_END, EOS), 32)
    assert (full.temperature, full.top_k, full.top_p, full.min_p) == (0.0, 0, 0.5, 0.1)
    assert (full.presence_penalty, full.frequency_penalty, full.repetition_penalty) == (1.0, -1.0, 1.5)
    assert (full.stop_token_ids, full.forced_token_ids, full.max_tokens) == ((65,), (1, 2), 2)


async def test_the_answer_fits_the_context_by_default(edge: Edge) -> None:
    await edge.complete(prompt="x" * (MAX_MODEL_LEN - 5))
    assert edge.generator.requests[0].params.max_tokens == 5


async def test_messages_reach_the_template(edge: Edge) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
    ]
    for thinking in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False, "other": 1}}):
        _, tokens = await edge.post("/tokenize", {"messages": messages} | thinking)
        _, text = await edge.post("/detokenize", {"tokens": tokens["tokens"]})
        assert text["prompt"] == (
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
            "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\nr<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        await edge.post("/v1/chat/completions", {"messages": messages} | thinking)
        assert edge.generator.requests[-1].prompt_token_ids == tuple(tokens["tokens"])


async def test_tokenize_and_detokenize(edge: Edge) -> None:
    _, answer = await edge.post("/tokenize", {"model": "tiny", "prompt": "aé", "return_token_strs": True})
    assert answer == {
        "count": 3,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [97, 0xC3, 0xA9],
        "token_strs": ["a", r"bytes:\xc3", r"bytes:\xa9"],
    }
    assert (await edge.post("/detokenize", {"tokens": [97, 0xC3, 0xA9]}))[1] == {"prompt": "aé"}
    assert await edge.refused("/detokenize", {"tokens": [VOCAB_SIZE]}) == (400, "tokens", None)
    assert await edge.refused("/tokenize", {}) == (400, "prompt", None)


async def test_models(edge: Edge) -> None:
    models = await edge.client.models.list()
    assert [(m.id, m.object, m.owned_by) for m in models.data] == [
        ("tiny", "model", "hmad"),
        ("org/alias", "model", "hmad"),
    ]
    assert (await edge.client.models.retrieve("org/alias")).id == "org/alias"
    with pytest.raises(openai.NotFoundError) as caught:
        await edge.client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


# --- Refusals -----------------------------------------------------------------------------------------------------

LONG = "x" * (MAX_MODEL_LEN + 1)
BOTH = "completions", "chat/completions"


@pytest.mark.parametrize("route", BOTH)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x", 3]}, "stop[1]"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"forced_token_ids": [VOCAB_SIZE]}, "forced_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"logprobs": -1}, "logprobs"),
        ({"return_logits": True, "max_tokens": 2, "n": 8, "model": 1}, "model"),
    ],
)
async def test_a_refusal_names_the_field(edge: Edge, route: str, fields: dict[str, Any], param: str) -> None:
    prompt = {"prompt": "p"} if route == "completions" else {"messages": CHAT}
    assert await edge.refused(f"/v1/{route}", prompt | fields) == (
        400,
        param,
        "unsupported_parameter" if param == "best_of" else None,
    )
    assert edge.generator.requests == []


@pytest.mark.parametrize(
    ("route", "fields", "param", "code"),
    [
        ("completions", {}, "prompt", None),
        ("completions", {"prompt": 7}, "prompt", None),
        ("completions", {"prompt": ""}, "prompt", None),
        ("completions", {"prompt": []}, "prompt", None),
        ("completions", {"prompt": [[]]}, "prompt", None),
        ("completions", {"prompt": ["a", 1]}, "prompt", None),
        ("completions", {"prompt": [1, [2]]}, "prompt", None),
        ("completions", {"prompt": ["a"] * 129}, "prompt", None),
        ("completions", {"prompt": [1, VOCAB_SIZE]}, "prompt", None),
        ("completions", {"prompt": [1, -1]}, "prompt[1]", None),
        ("completions", {"prompt": "p", "logprobs": 21}, "logprobs", None),
        ("completions", {"prompt": "p", "logprobs": 1, "echo": True}, "echo", "unsupported_parameter"),
        ("completions", {"prompt": LONG}, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": "p", "max_tokens": MAX_MODEL_LEN}, "max_tokens", "context_length_exceeded"),
        ("completions", {"prompt": ["p", LONG]}, "prompt", "context_length_exceeded"),
        ("chat/completions", {}, "messages", None),
        ("chat/completions", {"messages": []}, "messages", None),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages[0].role", None),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", None),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", None),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            None,
        ),
        ("chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
        ("chat/completions", {"messages": CHAT, "top_logprobs": 2}, "top_logprobs", None),
        ("chat/completions", {"messages": CHAT, "echo": True}, "echo", "unsupported_parameter"),
        (
            "chat/completions",
            {"messages": CHAT, "max_completion_tokens": MAX_MODEL_LEN},
            "max_completion_tokens",
            "context_length_exceeded",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": LONG}]},
            "messages",
            "context_length_exceeded",
        ),
        ("chat/completions", {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": 3}},
         "chat_template_kwargs.enable_thinking", None),
    ],
)  # fmt: skip
async def test_refusals_of_one_route(
    edge: Edge, route: str, fields: dict[str, Any], param: str, code: str | None
) -> None:
    assert await edge.refused(f"/v1/{route}", fields) == (400, param, code)


@pytest.mark.parametrize("name", sorted(HARMLESS))
async def test_what_would_change_the_answer_is_refused_not_ignored(edge: Edge, name: str) -> None:
    answer = await edge.refused("/v1/completions", {"prompt": "p", name: [{"any": "thing"}]})
    assert answer == (400, name, "unsupported_parameter")
    for value in (None, *HARMLESS[name]):
        await edge.complete(**{name: value})


async def test_tools_may_be_named_and_not_used(edge: Edge) -> None:
    body = {"messages": CHAT, "tools": [{"type": "function"}]}
    assert (await edge.refused("/v1/chat/completions", body))[1] == "tools"
    assert (await edge.post("/v1/chat/completions", body | {"tool_choice": "none"}))[0] == 200


async def test_unknown_fields_are_ignored(edge: Edge) -> None:
    await edge.complete(user="me", store=True, metadata={"a": 1}, something_new=[[1]])


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"prompt": NaN}', b'{"prompt": "p", "temperature": Infinity}',
             b'{"prompt": "p", "temperature": 1e999}', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"{} x",
             b'{"x":' * 30_000, b'{"prompt":' + b"[" * 30_000]
)  # fmt: skip
async def test_what_is_not_json(edge: Edge, body: bytes) -> None:
    assert await edge.refused("/v1/completions", body) == (400, None, "invalid_json")


async def test_millions_of_lists_are_not_built(edge: Edge) -> None:
    lists = b'{"prompt": [' + b"[1]," * 40_000 + b"[1]]}"
    assert await edge.refused("/v1/completions", lists) == (400, None, "too_many_containers")
    text = {"prompt": '\\"[' * 40_000}
    assert (await edge.refused("/v1/completions", text))[2] == "context_length_exceeded"


async def test_deep_but_valid_json_is_no_accident(edge: Edge) -> None:
    body = b'{"prompt": "p", "x": ' + b"[" * 500 + b"]" * 500 + b"}"
    assert (await edge.post("/v1/completions", body))[0] == 200


async def test_unknown_model(edge: Edge) -> None:
    for path, body in (("/v1/completions", {"prompt": "p"}), ("/tokenize", {"prompt": "p"})):
        assert await edge.refused(path, body | {"model": "gpt"}) == (404, "model", "model_not_found")


async def test_logits_are_bounded(edge: Edge, tokenizer: Tokenizer) -> None:
    huge = replace(served_model(tokenizer, edge.generator), vocab_size=150_000, max_model_len=4096)
    async with edge_of(role="prefill", served=huge) as other:
        body = {"prompt": "p", "return_logits": True, "n": 8, "max_tokens": 100}
        assert await other.refused("/v1/completions", body) == (400, "return_logits", None)


async def test_transport_rules(edge: Edge) -> None:
    post = edge.refused
    body = {"prompt": "p"}
    assert (await post("/v1/completions", body, headers={"Content-Type": "text/plain"}))[0] == 415
    assert (await post("/v1/completions", b"\x1f\x8b", headers={"Content-Encoding": "gzip"}))[0] == 415
    assert (await post("/nowhere", body))[0] == 404
    async with edge.http.get(edge.address + "/v1/completions") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        assert "error" in await response.json()


async def test_null_means_not_said(edge: Edge) -> None:
    for path, body, request_type in (
        ("/v1/completions", {"prompt": "p"}, CompletionRequest),
        ("/v1/chat/completions", {"messages": CHAT}, ChatRequest),
    ):
        nothing = dict.fromkeys(request_type.__struct_fields__)
        assert (await edge.post(path, nothing | body))[0] == 200


async def test_the_stop_string_stays_where_asked_for(edge: Edge) -> None:
    answer = await edge.complete(stop="ll", include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "hell"
    answer = await edge.complete(include_stop_str_in_output=True, skip_special_tokens=False)
    assert answer["choices"][0]["text"] == "hello<|endoftext|>"


async def test_a_body_that_never_ends(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BODY_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection(*edge.address.removeprefix("http://").split(":"))
    writer.write(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
    assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


async def test_body_limit(tokenizer: Tokenizer) -> None:
    served = served_model(tokenizer, ScriptedGenerator())
    async with edge_of(role="prefill", served=served, max_body_bytes=100) as edge:
        assert (await edge.refused("/v1/completions", {"prompt": "p" * 100}))[0] == 413
        assert (await edge.post("/v1/completions", {"prompt": "p" * 50}))[0] == 200


# --- Failures -----------------------------------------------------------------------------------------------------


async def test_full_is_told_at_once_with_retry_after(edge: Edge) -> None:
    edge.generator.refusal = RequestError(429, "all peers and the queue are full", code="queue_full", retry_after_s=1.2)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            await edge.client.completions.create(model="tiny", prompt="p", stream=stream)
        assert caught.value.response.headers["Retry-After"] == "2"
        assert caught.value.code == "queue_full"
    assert edge.generator.requests == []
    assert edge.counted("requests_total", outcome="rejected") == 2
    assert edge.counted("errors_total", cause="queue_full") == 2


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError(503, "timed out in the queue", code="queue_timeout"), 503, "queue_timeout"),
        (TransferAborted("shutdown", "peer d1 is going"), 503, "decode_node_failed"),
        (LocalError("the device is lost"), 500, "internal_error"),
        (ZeroDivisionError("secret detail"), 500, "internal_error"),
    ],
)
async def test_a_failure_before_the_first_token_is_a_plain_error(
    edge: Edge, caplog: pytest.LogCaptureFixture, error: Exception, status: int, code: str
) -> None:
    edge.generator.script = lambda request: [error]
    for stream in (False, True):
        status_seen, answer = await edge.post("/v1/completions", {"prompt": "p", "stream": stream})
        assert (status_seen, answer["error"]["code"]) == (status, code)
        assert "secret" not in json.dumps(answer)
        assert "Traceback" not in json.dumps(answer)
    told_by_us = [record for record in caplog.records if record.name == "hmad.edges.api"]
    assert len(told_by_us) == (0 if isinstance(error, RequestError) else 2)
    # A peer's failure and a device's are told in one line; a traceback is for what nobody foresaw.
    assert all(bool(record.exc_info) == (not isinstance(error, HmadError)) for record in told_by_us)
    assert all(str(error) in record.__dict__["cause"] for record in told_by_us)
    assert edge.generator.running == 0


async def collect(stream: openai.AsyncStream[ChatCompletionChunk], text: list[str | None]) -> None:
    """Append each delta's text, as far as the stream goes."""
    async for chunk in stream:
        text.append(chunk.choices[0].delta.content)


async def test_a_failure_in_a_stream_is_its_last_event(edge: Edge) -> None:
    edge.generator.script = lambda request: [*events_of("abc")[:2], TransferAborted("internal", "decode node d1 broke")]
    body = {"messages": CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = await edge.events("/v1/chat/completions", body)
    assert json.loads(last)["error"]["message"] == "decode node d1 broke"
    assert "[DONE]" not in chunks
    stream = await edge.client.chat.completions.create(model="tiny", messages=CHAT, stream=True)
    text: list[str | None] = []
    with pytest.raises(openai.APIError, match="decode node d1 broke"):
        await collect(stream, text)
    assert text == ["", "a", "b"]
    assert edge.counted("requests_total", outcome="failed") == 2
    assert edge.counted("errors_total", cause="internal") == 2


async def test_a_generation_that_just_ends_is_a_failure(edge: Edge) -> None:
    edge.generator.script = lambda request: events_of("abc")[:2]
    assert (await edge.refused("/v1/completions", {"prompt": "p"}))[0] == 500


async def asked(address: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a completion has been asked for."""
    reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(head.encode() + b"\r\n\r\n" + data)
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_generation(edge: Edge, stream: bool) -> None:
    edge.generator.script = lambda request: [*events_of("abc")[:2], asyncio.Event()]
    reader, writer = await asked(edge.address, {"prompt": "p", "stream": stream})
    if stream:
        await reader.readuntil(b"data: ")
    else:
        await asyncio.wait_for(edge.generator.entered.wait(), 5)
    writer.close()
    await asyncio.wait_for(edge.generator.left.wait(), 5)
    assert edge.generator.running == 0
    await asyncio.sleep(0)
    assert edge.counted("requests_total", outcome="cancelled") == 1


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        (events_of("a")[:1], events_of("b" * 2000), "cancelled"),
        ([], events_of("b"), "cancelled"),  # the headers wait for the first token, and find nobody
        (events_of("a")[:1], [LocalError("too late")], "failed"),  # the error event does
    ],
    ids=["tokens", "headers", "error"],
)
async def test_a_client_that_leaves_is_no_error(
    edge: Edge, caplog: pytest.LogCaptureFixture, before: list[Step], after: list[Step], outcome: str
) -> None:
    """Also where nobody cancels the handler: then a write finds the connection closed."""
    gate = asyncio.Event()
    edge.generator.script = lambda request: [*before, gate, *after]
    async with serving(edge.services, handler_cancellation=False) as address:
        reader, writer = await asked(address, {"prompt": "p", "stream": True})
        await (reader.readuntil(b"data: ") if before else asyncio.wait_for(edge.generator.entered.wait(), 5))
        writer.close()
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.wait_for(edge.generator.left.wait(), 5)
    assert edge.counted("requests_total", outcome=outcome) == 1
    assert [record.message for record in caplog.records if record.exc_info] == []


async def test_the_first_bytes_wait_for_the_first_token(edge: Edge) -> None:
    admitted = asyncio.Event()
    edge.generator.script = lambda request: [admitted, *events_of("a")]
    answer = asyncio.create_task(edge.http.post(edge.address + "/v1/completions", json={"prompt": "p", "stream": True}))
    done, _ = await asyncio.wait([answer], timeout=0.05)
    assert not done
    admitted.set()
    assert (await answer).status == 200


async def test_each_token_is_sent_as_it_comes(edge: Edge) -> None:
    gate = asyncio.Event()
    edge.generator.script = lambda request: [*events_of("ab")[:1], gate, *events_of("b")]
    stream = await edge.client.completions.create(model="tiny", prompt="p", stream=True)
    chunks = aiter(stream)
    assert (await asyncio.wait_for(anext(chunks), 5)).choices[0].text == "a"
    gate.set()
    assert [chunk.choices[0].text async for chunk in chunks] == ["b", ""]


# --- Every node ---------------------------------------------------------------------------------------------------


async def test_node_routes(tokenizer: Tokenizer) -> None:
    for services in ({}, {"role": "prefill", "served": served_model(tokenizer, ScriptedGenerator())}):
        async with edge_of(**services) as edge, aiohttp.ClientSession(edge.address) as http_session:
            assert await (await http_session.get("/livez")).json() == {"status": "alive"}
            assert (await http_session.get("/health")).status == 200
            assert (await (await http_session.get("/status")).json())["arena"]["total_slots"] == 10
            metrics = await http_session.get("/metrics")
            assert metrics.content_type == "text/plain"
            of_prefill, of_decode = "hmad_time_to_first_token_seconds_count 0.0", "hmad_arena_total_slots 0.0"
            text = await metrics.text()
            assert (of_prefill in text, of_decode in text) == (bool(services), not services)


async def test_health_says_why_not() -> None:
    async with edge_of(health=lambda: (False, "no peer yet")) as edge:
        response = await edge.http.get(edge.address + "/health")
        assert (response.status, (await response.json())["reason"]) == (503, "no peer yet")
        assert (await edge.http.get(edge.address + "/livez")).status == 200


async def test_a_decode_node_sends_clients_to_a_prefill_node() -> None:
    async with edge_of() as edge:
        with pytest.raises(openai.NotFoundError, match="ask a prefill node"):
            await edge.client.completions.create(model="tiny", prompt="p")
        assert (await edge.refused("/tokenize", {"prompt": "p"}))[0] == 404


async def test_api_keys(tokenizer: Tokenizer) -> None:
    digests = frozenset(map(key_digest, (b"k", b"other")))
    served = served_model(tokenizer, ScriptedGenerator())
    async with edge_of(role="prefill", served=served, api_key_digests=digests) as edge:
        assert (await edge.client.completions.create(model="tiny", prompt="p")).choices[0].text == "hello"
        for path in ("/livez", "/health"):
            assert (await edge.http.get(edge.address + path)).status == 200
        for path in ("/metrics", "/status", "/v1/models", "/nowhere"):
            response = await edge.http.get(edge.address + path)
            assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert (await response.json())["error"]["code"] == "invalid_api_key"
        for value in ("Bearer wrong", "Bearer", "k", "Basic k", "Bearer kk", "Bearer \xff"):
            assert (await edge.refused("/v1/completions", {}, headers={"Authorization": value}))[0] == 401
        assert (await edge.http.get(edge.address + "/status", headers={"Authorization": "bearer other"})).status == 200


async def test_request_ids(edge: Edge) -> None:
    async def id_of(path: str, **headers: str) -> str:
        async with edge.http.get(edge.address + path, headers=headers) as response:
            return response.headers["X-Request-Id"]

    assert await id_of("/livez", **{"X-Request-Id": "my-id:1"}) == "my-id:1"
    assert await id_of("/nowhere", **{"X-Request-Id": "my-id:1"}) == "my-id:1"
    for strange in ("", "a b", "x" * 129, "é"):
        assert await id_of("/livez", **{"X-Request-Id": strange}) != strange
    assert await id_of("/livez") != await id_of("/livez")
    async with edge.http.post(
        edge.address + "/v1/completions", json={"prompt": "p", "stream": True}, headers={"X-Request-Id": "s"}
    ) as response:
        assert response.headers["X-Request-Id"] == "s"
        assert '"s"' not in await response.text()


async def test_metrics_of_requests(edge: Edge) -> None:
    edge.generator.script = lambda request: [*events_of("abc", 0), *events_of("d", 1)]
    await edge.complete(n=2)
    assert edge.counted("requests_total", outcome="finished") == 1
    assert edge.counted("time_to_first_token_seconds_count") == 2
    assert edge.counted("end_to_end_seconds_count") == 2
    assert edge.counted("inter_token_latency_seconds_count") == 3 + 1
    assert edge.counted("time_per_output_token_seconds_count") == 2
    assert (edge.counted("prompt_tokens_total"), edge.counted("output_tokens_total")) == (1, 6)


def test_metrics_of_roles() -> None:
    metrics = Metrics("prefill")
    metrics.queue_length.set(3)
    metrics.count_link_bytes("d1", "sent", 100)
    metrics.set_link_rate("d1", "sent", 5e8)
    metrics.observe_overlap(0.01, 0.95)
    text = metrics.render().decode()
    for line in (
        "hmad_queue_requests 3.0",
        'hmad_link_bytes_total{direction="sent",peer="d1"} 100.0',
        'hmad_link_bytes_per_second{direction="sent",peer="d1"} 5e+08',
        'hmad_kv_hidden_ratio_bucket{le="0.95"} 1.0',
        "hmad_kv_exposed_seconds_count 1.0",
    ):
        assert line in text.splitlines()


# --- Anything at all ----------------------------------------------------------------------------------------------

NAMES = [
    "prompt", "messages", "n", "max_tokens", "temperature", "stop", "logprobs", "stream", "seed", "stream_options",
    "top_k", "echo", "model", "tokens", "tools", "response_format", "forced_token_ids", "return_logits",
    "chat_template_kwargs",
]  # fmt: skip
KEYS = ["role", "content", "type", "text", "include_usage", "enable_thinking"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["tiny", "user", "p"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage"]) | st.text(), inner, max_size=4
        )
    ),
    max_leaves=8,
)
BODIES = (
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
    | st.builds(lambda extra: {"prompt": "p"} | extra, st.dictionaries(st.sampled_from(NAMES[2:]), LEAVES, max_size=2))
    | VALUES
)


@pytest.fixture(scope="module")
def address(tokenizer: Tokenizer) -> Iterator[str]:
    def services() -> Any:
        return plain_services(role="prefill", served=served_model(tokenizer, AllChoices()))

    with serving_in_thread(services) as address:
        yield address


class AllChoices(ScriptedGenerator):
    """Says "hello" in each choice."""

    def __init__(self) -> None:
        super().__init__()
        self.script = lambda request: [e for i in range(len(request.seeds)) for e in events_of("hello", i)]


@settings(max_examples=200, deadline=None)
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    body=BODIES.map(lambda body: json.dumps(body).encode()) | st.binary(max_size=50),
)
def test_any_body_is_served_or_refused_in_shape(address: str, path: str, body: bytes) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    assert response.status == 200 or 400 <= response.status < 500, (response.status, answer)
    if response.status != 200:
        assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
