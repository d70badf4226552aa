"""A prefill role of which only the edge is real: the test writes down which token events come, and when."""

import asyncio
import json
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hmad.edges.api import RoleServices, build_app
from hmad.edges.metrics import Metrics
from hmad.facts.errors import RequestError
from hmad.facts.requests import GenerationRequest, Place, TokenEvent
from hmad.facts.sampling import SampledToken, TokenLogprobs

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
EOS, IM_START, IM_END, THINK, END_THINK = range(256, 261)
VOCAB_SIZE = 264  # like real models, more rows than tokens
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

NODE_LOST = "node lost"  # the request is placed again: every choice begins anew
Step = TokenEvent | Exception | asyncio.Event | str
Script = Callable[[GenerationRequest], Sequence[Step]]


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of one token per byte, so that every character beyond ASCII is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {character_of_byte(byte): byte for byte in range(256)}
    assert sorted(ids) == alphabet
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def character_of_byte(byte: int) -> str:
    """How byte-level BPE writes a byte: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


def events_of(text: str | bytes, choice: int = 0, finish: str = "stop") -> list[TokenEvent]:
    """One event per byte; ``stop`` ends with EOS, ``length`` with the last byte."""
    token_ids = list(text.encode() if isinstance(text, str) else text) + [EOS] * (finish == "stop")
    events = [TokenEvent(choice, 0, SampledToken(token_id, *extras_of(token_id))) for token_id in token_ids]
    return [*events[:-1], replace(events[-1], finish_reason=finish)]


def extras_of(token_id: int) -> tuple[TokenLogprobs, bytes]:
    """Made-up logprobs (the runner-up is always "x") and logits that name their token."""
    return TokenLogprobs(-0.5, ((token_id, -0.5), (ord("x"), float("-inf")))), bytes([token_id % 256]) * 4


class ScriptedGeneration:
    """Plays a script: events come, numbered, exceptions are raised, an asyncio.Event is waited for."""

    request_id = "scripted"

    def __init__(self, steps: Sequence[Step], stopped: list[int]) -> None:
        self._steps = steps
        self._stopped = stopped

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        indexes: defaultdict[int, int] = defaultdict(int)  # of each choice's next token
        for step in self._steps:
            await asyncio.sleep(0)
            if isinstance(step, Exception):
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, TokenEvent):
                yield replace(step, index=indexes[step.choice])
                indexes[step.choice] += 1
            else:
                indexes.clear()

    def stop_choice(self, choice: int) -> None:
        self._stopped.append(choice)


class ScriptedGenerator:
    """Answers every request with the script of the moment, and remembers what was asked of it."""

    def __init__(self) -> None:
        self.script: Script = lambda request: events_of("hello")
        self.refusal: RequestError | None = None
        self.requests: list[GenerationRequest] = []
        self.clients: list[str] = []
        self.stopped: list[int] = []
        self.running = 0
        self.entered = asyncio.Event()
        self.left = asyncio.Event()

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[ScriptedGeneration]:
        self.requests.append(request)
        self.running += 1
        self.entered.set()
        try:
            yield ScriptedGeneration(self.script(request), self.stopped)
        finally:
            self.running -= 1
            self.left.set()

    def check_room(self, client: str) -> None:
        if self.refusal:
            raise self.refusal

    def admit(self, client: str, num_prompts: int) -> AbstractContextManager[list[Place]]:
        self.clients.append(client)
        return nullcontext([None] * num_prompts)

    def check_fits(self, requests: Sequence[GenerationRequest]) -> None:
        """Everything fits."""


@asynccontextmanager
async def serving(services: RoleServices, handler_cancellation: bool = True) -> AsyncIterator[str]:
    """The real application on a real loopback socket; yields its address."""
    runner = web.AppRunner(
        build_app(services), handler_cancellation=handler_cancellation, auto_decompress=False, shutdown_timeout=1.0
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield "http://{}:{}".format(*runner.addresses[0][:2])
    finally:
        await runner.cleanup()


@contextmanager
def serving_in_thread(make_services: Callable[[], RoleServices]) -> Iterator[str]:
    """The same for tests that are not asynchronous."""
    started: list[Any] = []
    ready = threading.Event()

    async def serve() -> None:
        stop = asyncio.Event()
        async with serving(make_services()) as address:
            started.extend((address, asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    ready.wait(10)
    address, loop, stop = started
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def plain_services(**changes: Any) -> RoleServices:
    """Services of a healthy decode node, unless changed."""
    standard: dict[str, Any] = {
        "role": "decode",
        "metrics": Metrics(changes.get("role", "decode")),
        "health": lambda: (True, ""),
        "status": lambda: {"arena": {"used_slots": 3, "total_slots": 10}},
    }
    return RoleServices(**(standard | changes))
