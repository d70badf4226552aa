"""From a parsed request to its answer: prompts to tokens, token events to text, text to OpenAI's objects.

A **job** is one HTTP request: some prompts, n choices each, numbered prompt * n + choice. Its events become
**pieces** of text, which either travel one by one (SSE) or are gathered into one whole piece per choice.
"""

import asyncio
import codecs
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

from hmad.compute.checkpoint import GenerationDefaults
from hmad.compute.detokenizer import IncrementalDetokenizer
from hmad.compute.tokenizer import Tokenizer
from hmad.edges.metrics import Metrics
from hmad.edges.openai_schema import (
    MAX_LOGITS_BYTES,
    ChatRequest,
    CompletionRequest,
    bad_request,
    check_vocabulary,
    split_prompts,
    usage_object,
)
from hmad.facts.errors import LocalError
from hmad.facts.requests import Generation, GenerationRequest, Generator, Place, TokenEvent
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad.facts.timeline import Timeline
from hmad.roles import queue

INLINE_BYTES = 8192  # tokenizing more than this leaves the event loop for a thread
PREPARED_AT_ONCE = 2  # in threads: one may tokenize while another waits for its chat template
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # by generation_config.json
QUEUED_EVENTS = 16  # of one HTTP request, between its generations and a slow client

T = TypeVar("T")


@dataclass(frozen=True)
class ServedModel:
    """The model behind the OpenAI routes of a prefill node."""

    names: tuple[str, ...]
    generator: Generator
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    vocab_size: int
    max_model_len: int
    default_max_tokens: int
    timeline_of: Callable[[str], Timeline | None] = lambda request_id: None
    request_timeout_s: float | None = None
    created_s: int = field(default_factory=lambda: int(time.time()))
    preparing: queue.Turns = field(default_factory=lambda: queue.Turns(PREPARED_AT_ONCE))

    @cached_property
    def thinking_marks(self) -> tuple[int | None, int | None]:
        """The tokens that enclose reasoning, where the model has them."""
        return self._single_token("<think>"), self._single_token("</think>")

    def _single_token(self, text: str) -> int | None:
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        return token_ids[0] if len(token_ids) == 1 else None


@dataclass(frozen=True)
class Prompt:
    """One prompt; ``echo`` is its text where the answer must begin with it."""

    token_ids: tuple[int, ...]
    echo: str = ""


@dataclass(frozen=True)
class Job:
    """One HTTP request, ready to run: ``generation_requests`` has one entry per prompt."""

    request: CompletionRequest | ChatRequest
    model: ServedModel
    model_name: str
    prompts: tuple[Prompt, ...]
    generation_requests: tuple[GenerationRequest, ...]

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.request.num_choices

    def prompt_of(self, choice: int) -> Prompt:
        return self.prompts[choice // self.request.num_choices]


# --- Prompts to tokens --------------------------------------------------------------------------------------------


async def in_thread(model: ServedModel, client: str, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread when it is its turn: clients take turns here as they do in the queue."""
    async with model.preparing.turn(queue.Place(client)):
        return await asyncio.to_thread(work)


async def off_loop(size_bytes: int, model: ServedModel, client: str, work: Callable[[], T]) -> T:
    """Run ``work`` here when its input is small, in a thread when it would hold up the event loop."""
    return work() if size_bytes <= INLINE_BYTES else await in_thread(model, client, work)


def encode_chat(request: ChatRequest, tokenizer: Tokenizer, add_special_tokens: bool) -> list[int]:
    """Render the conversation with the model's own template, and tokenize it."""
    text = tokenizer.render_chat(
        [message.as_template_input() for message in request.messages],
        add_generation_prompt=request.add_generation_prompt is not False,
        enable_thinking=request.thinking,
        template_kwargs=request.chat_template_kwargs,
    )
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


async def encode_prompts(
    request: CompletionRequest | ChatRequest, model: ServedModel, client: str, body_bytes: int
) -> list[Prompt]:
    """The request's prompts as token ids. A chat template runs apart and may take its time: never on the event loop."""
    if isinstance(request, ChatRequest):
        add_special_tokens = bool(request.add_special_tokens)
        encode = partial(encode_chat, request, model.tokenizer, add_special_tokens)
        return [Prompt(tuple(await in_thread(model, client, encode)))]
    prompts = split_prompts(request.prompt)
    return await off_loop(
        body_bytes, model, client, lambda: [_encode_prompt(prompt, request, model) for prompt in prompts]
    )


def _encode_prompt(prompt: str | list[int], request: CompletionRequest, model: ServedModel) -> Prompt:
    if isinstance(prompt, str):
        token_ids = model.tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens is not False)
        return Prompt(tuple(token_ids), prompt if request.echo else "")
    check_vocabulary(prompt, model.vocab_size, "prompt")
    return Prompt(tuple(prompt), model.tokenizer.decode(prompt, skip_special_tokens=False) if request.echo else "")


def num_prompts(request: CompletionRequest | ChatRequest) -> int:
    """What a request counts in the queue: the choices of a prompt share its prefill."""
    return 1 if isinstance(request, ChatRequest) else len(split_prompts(request.prompt))


@dataclass(frozen=True)
class Arrival:
    """An HTTP request: the id that we gave it, whose it is, and when it came."""

    request_id: str
    client: str
    received_s: float

    def id_of_prompt(self, number: int) -> str:
        """The first prompt of a list goes by the request's own id."""
        return f"{self.request_id}.{number}" if number else self.request_id


async def prepare(
    request: CompletionRequest | ChatRequest,
    model: ServedModel,
    arrival: Arrival,
    places: Sequence[Place],
    body_bytes: int,
) -> Job:
    """Tokenize, fill in the defaults and check everything that can be checked before the queue."""
    prompts = await encode_prompts(request, model, arrival.client, body_bytes)
    seeds = choice_seeds(request.seed, request.num_choices)
    generation_requests = tuple(
        GenerationRequest(
            arrival.id_of_prompt(number),
            prompt.token_ids,
            sampling_params(request, model, len(prompt.token_ids)),
            seeds,
            bool(request.stream),
            arrival.received_s,
            place,
        )
        for number, (prompt, place) in enumerate(zip(prompts, places, strict=True))
    )
    _check_logits(generation_requests, model.vocab_size)
    model.generator.check_fits(generation_requests)
    return Job(request, model, request.model or model.names[0], tuple(prompts), generation_requests)


def choice_seeds(seed: int | None, num_choices: int) -> tuple[int, ...]:
    """One seed per choice: choice 0 has the request's own, so n does not change it; the others hash (seed, index).

    A negative seed counts as its 64-bit two's complement.
    """
    base = secrets.randbits(64) if seed is None else seed % 2**64
    return (base, *(_derived_seed(base, choice) for choice in range(1, num_choices)))


def _derived_seed(seed: int, choice: int) -> int:
    digest = hashlib.sha256(seed.to_bytes(8, "little") + choice.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little")


def first_known(*values: T | None) -> T | None:
    """The first value that someone named."""
    return next((value for value in values if value is not None), None)


def sampling_params(
    request: CompletionRequest | ChatRequest, model: ServedModel, num_prompt_tokens: int
) -> SamplingParams:
    """What the request says, over the model's generation_config.json, over neutral."""
    chosen = {name: first_known(getattr(request, name), getattr(model.defaults, name)) for name in DEFAULTED} | {
        name: getattr(request, name) for name in ("presence_penalty", "frequency_penalty")
    }
    if chosen["top_k"] == -1:
        chosen["top_k"] = 0
    forced = tuple(request.forced_token_ids or ())
    check_vocabulary(forced, model.vocab_size, "forced_token_ids")
    return SamplingParams(
        max_tokens=token_budget(request, model, num_prompt_tokens),
        stop_token_ids=_stop_token_ids(request, model),
        num_logprobs=request.num_logprobs,
        forced_token_ids=forced,
        want_logits=bool(request.return_logits),
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _stop_token_ids(request: CompletionRequest | ChatRequest, model: ServedModel) -> tuple[int, ...]:
    named = request.stop_token_ids or ()
    check_vocabulary(named, model.vocab_size, "stop_token_ids")
    ends = () if request.ignore_eos else model.defaults.eos_token_ids
    return tuple(dict.fromkeys((*ends, *named)))


def token_budget(request: CompletionRequest | ChatRequest, model: ServedModel, num_prompt_tokens: int) -> int:
    """max_tokens: as asked, else the forced tokens' number, else what the context leaves, within the node's default."""
    prompt_field = "prompt" if isinstance(request, CompletionRequest) else "messages"
    if num_prompt_tokens == 0:
        raise bad_request("the prompt has no tokens", prompt_field)
    room = model.max_model_len - num_prompt_tokens
    param, asked = request.token_limit
    if room < 1 or (asked or len(request.forced_token_ids or ())) > room:
        raise bad_request(
            f"this model's context is {model.max_model_len} tokens, but the prompt has {num_prompt_tokens} "
            f"and {asked or 'at least 1'} are to follow",
            prompt_field if room < 1 else param,
            "context_length_exceeded",
        )
    return asked or len(request.forced_token_ids or ()) or min(room, model.default_max_tokens)


def _check_logits(requests: Sequence[GenerationRequest], vocab_size: int) -> None:
    rows = sum(r.params.max_tokens * len(r.seeds) for r in requests if r.params.want_logits)
    if 4 * rows * vocab_size > MAX_LOGITS_BYTES:
        raise bad_request(
            f"logits of up to {rows} tokens exceed {MAX_LOGITS_BYTES} bytes: lower max_tokens", "return_logits"
        )


# --- Token events to pieces of text -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Some consecutive tokens of one choice, and the text that became certain with them.

    ``offsets`` says for each token at which character of the choice's text it begins. ``is_first`` means that the
    choice begins (anew) with this piece.
    """

    index: int
    text: str
    tokens: tuple[SampledToken, ...]
    offsets: tuple[int, ...]
    finish_reason: str | None
    is_first: bool


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    return Piece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(offset for piece in pieces for offset in piece.offsets),
        pieces[-1].finish_reason,
        pieces[0].is_first,
    )


class ChoiceStream:
    """One choice on its way from tokens to text: detokenizing, stop strings, counts and times."""

    def __init__(self, index: int, job: Job, clock: "ChoiceClock") -> None:
        request, tokenizer = job.request, job.model.tokenizer
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._include_stop = bool(request.include_stop_str_in_output)
        self._skip_special = request.skip_special_tokens is not False
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            stop=request.stop_strings,
            include_stop=self._include_stop,
            skip_special_tokens=self._skip_special,
        )
        self._offsets = TextOffsets(len(job.prompt_of(index).echo))
        self.thinking = ThinkingCounter(job.model.thinking_marks, job.prompt_of(index).token_ids)
        self._clock = clock

    def feed(self, event: TokenEvent) -> Piece:
        """The text that this event makes certain."""
        self.num_tokens += 1
        self._clock.tick(event.index)
        token_id = event.token.token_id
        self.thinking.feed(token_id)
        offset = self._offsets.feed(self._shown_bytes(token_id))
        text = self._text_of(event)
        self.finish_reason = event.finish_reason if self._detokenizer.stopped is None else "stop"
        if self.finish_reason:
            self._clock.finish(self.num_tokens)
        return Piece(self.index, text, (event.token,), (offset,), self.finish_reason, event.index == 0)

    def _shown_bytes(self, token_id: int) -> bytes:
        is_skipped = self._skip_special and self._tokenizer.is_special(token_id)
        return b"" if is_skipped else self._tokenizer.token_bytes(token_id)

    def _text_of(self, event: TokenEvent) -> str:
        # A stop token ends the text and, unless it is asked for, is not part of it.
        is_shown = event.finish_reason != "stop" or self._include_stop
        text = self._detokenizer.feed(event.token.token_id) if is_shown else ""
        return text + self._detokenizer.flush() if event.finish_reason else text


class TextOffsets:
    """Where each token begins in the text; a character of several tokens begins at its first."""

    def __init__(self, start: int) -> None:
        self._chars = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: bytes) -> int:
        offset = self._chars
        self._chars += len(self._decoder.decode(token))
        return offset


class ThinkingCounter:
    """Counts the tokens of the model's reasoning, its marks included; a template may have opened it already."""

    def __init__(self, marks: tuple[int | None, int | None], prompt_token_ids: Sequence[int]) -> None:
        self._begin, self._end = marks
        prompt_end = prompt_token_ids[-4:]
        self._inside = self._begin in prompt_end and self._end not in prompt_end
        self.num_tokens = 0

    def feed(self, token_id: int) -> None:
        self._inside = self._inside or token_id == self._begin
        self.num_tokens += self._inside
        if token_id == self._end:
            self._inside = False


class ChoiceClock:
    """TTFT, ITL, TPOT and E2E of one choice, as the edge sees them. Where the choice begins anew, a token that came
    before counts no second time."""

    def __init__(self, received_s: float, metrics: Metrics) -> None:
        self._received_s = received_s
        self._first_s: float | None = None
        self._last_s = received_s
        self._num_tokens = 0
        self._metrics = metrics

    def tick(self, index: int) -> None:
        """The choice's token of this index came."""
        now_s = time.monotonic()
        if index == self._num_tokens:
            self._num_tokens += 1
            self._count(now_s)
        self._last_s = now_s

    def _count(self, now_s: float) -> None:
        self._metrics.output_tokens.inc()
        if self._first_s is None:
            self._first_s = now_s
            self._metrics.ttft_s.observe(now_s - self._received_s)
        else:
            self._metrics.itl_s.observe(now_s - self._last_s)

    def finish(self, num_tokens: int) -> None:
        """That was the last one."""
        self._metrics.e2e_s.observe(self._last_s - self._received_s)
        if self._first_s is not None and num_tokens > 1:
            self._metrics.tpot_s.observe((self._last_s - self._first_s) / (num_tokens - 1))


class Run:
    """A job under way."""

    def __init__(self, job: Job, generations: Sequence[Generation], received_s: float, metrics: Metrics) -> None:
        self.job = job
        self.generations = generations
        self._clocks = [ChoiceClock(received_s, metrics) for _ in range(job.num_choices)]
        self.choices = [self._choice(index) for index in range(job.num_choices)]

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices as they come, until every choice has finished."""
        unfinished = len(self.choices)
        async with merged(self.generations) as events:
            async for prompt, event in events:
                index = prompt * self.job.request.num_choices + event.choice
                if self.choices[index].finish_reason:  # was on its way when a stop string ended the choice
                    continue
                if event.index == 0:
                    self.choices[index] = self._choice(index)
                choice = self.choices[index]
                piece = choice.feed(event)
                if piece.finish_reason and not event.finish_reason:
                    self.generations[prompt].stop_choice(event.choice)
                yield piece
                unfinished -= piece.finish_reason is not None
                if unfinished == 0:
                    return
        raise LocalError("the generation ended before all of its choices had finished")

    def _choice(self, index: int) -> ChoiceStream:
        return ChoiceStream(index, self.job, self._clocks[index])

    def usage(self) -> dict[str, Any]:
        return usage_object(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.job.prompts),
            cached_tokens=0,
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            reasoning_tokens=sum(choice.thinking.num_tokens for choice in self.choices),
        )


@asynccontextmanager
async def started(job: Job, received_s: float, metrics: Metrics) -> AsyncIterator[Run]:
    """Queue all generations of a job; leaving cancels whatever is not finished."""
    async with AsyncExitStack() as stack:
        generations = [
            await stack.enter_async_context(job.model.generator.generate(request))
            for request in job.generation_requests
        ]
        metrics.prompt_tokens.inc(sum(len(prompt.token_ids) for prompt in job.prompts))
        yield Run(job, generations, received_s, metrics)


Item = tuple[int, TokenEvent] | Exception | None  # (prompt, event), how a generation broke, or its end


@asynccontextmanager
async def merged(generations: Sequence[Generation]) -> AsyncIterator[AsyncIterator[tuple[int, TokenEvent]]]:
    """The events of several generations as they come, each with its generation's number."""
    queue: asyncio.Queue[Item] = asyncio.Queue(QUEUED_EVENTS)
    pumps = [asyncio.create_task(_pump(i, generation, queue)) for i, generation in enumerate(generations)]
    try:
        yield _drain(queue, len(pumps))
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(number: int, generation: Generation, queue: asyncio.Queue[Item]) -> None:
    try:
        async for event in generation:
            await queue.put((number, event))
        await queue.put(None)
    except Exception as error:
        await queue.put(error)


async def _drain(queue: asyncio.Queue[Item], unfinished: int) -> AsyncIterator[tuple[int, TokenEvent]]:
    while unfinished:
        item = await queue.get()
        if isinstance(item, Exception):
            raise item
        if item is None:
            unfinished -= 1
        else:
            yield item
