"""The OpenAI dialect of HTTP: what a client may send, within which bounds, and the objects it gets back.

The annotated types below are the one table of bounds of the REST edge. A body is parsed once into a frozen struct;
whatever it breaks becomes a RequestError that names the field.
"""

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec
from msgspec import Meta

from hmad.facts.errors import RequestError
from hmad.facts.sampling import SampledToken

# --- The table of bounds ------------------------------------------------------------------------------------------

MAX_BODY_BYTES = 4 * 2**20  # parsing it holds the event loop
MAX_CONTAINERS = 32_768  # arrays and objects of one body: building millions of small ones takes seconds
MAX_LOGITS_BYTES = 256 * 2**20  # of one response, before base64
MAX_MESSAGE_CHARS = 1000  # a parser's message may quote the client's own value, however long

ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
NumChoices = Annotated[int, Meta(ge=1, le=8)]
NumTokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # the vocabulary bounds it further
TokenIds = Annotated[list[TokenId], Meta(max_length=4096)]
NumLogprobs = Annotated[int, Meta(ge=0, le=20)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]  # -1 and 0: off
MinP = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=100)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=16)]
Prompts = Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1, max_length=2**20)]
MAX_PROMPTS = 128  # a list of token ids may be longer than a list of prompts

# What would change the answer if we ignored it, and we cannot do: any value but these (and null) is refused.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}

# --- What a client sends ------------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True):
    """What both ways to ask for text share. None means: not said."""

    model: ModelName | None = None
    max_tokens: NumTokens | None = None
    n: NumChoices | None = None
    best_of: NumChoices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    forced_token_ids: TokenIds | None = None
    return_logits: bool | None = None
    echo: bool | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Prompts
    logprobs: NumLogprobs | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that bounds the answer, and its value."""
        return "max_tokens", self.max_tokens


class TextPart(msgspec.Struct, frozen=True):
    type: Literal["text"]
    text: str


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn. Fields that no template reads are dropped."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None

    def as_template_input(self) -> dict[str, Any]:
        """For the chat template: content as one text; ``developer`` is OpenAI's newer word for ``system``."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        content = self.content or ""
        fields["content"] = content if isinstance(content, str) else "\n".join(part.text for part in content)
        fields["role"] = "system" if self.role == "developer" else self.role
        return fields


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=4096)]


class ChatRequest(GenerationFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    add_generation_prompt: bool | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that bounds the answer, and its value: the newer name wins."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def thinking(self) -> bool | None:
        """``enable_thinking`` of either spelling; None leaves it to the template."""
        nested = (self.chat_template_kwargs or {}).get("enable_thinking")
        return self.enable_thinking if nested is None else bool(nested)


class TokenizeTextRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize with a text."""

    prompt: str
    model: ModelName | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatRequest, frozen=True, kw_only=True):
    """POST /tokenize with a conversation: any chat request."""

    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Meta(max_length=2**20)]
    model: ModelName | None = None


T = TypeVar("T")


def bad_request(message: str, param: str | None, code: str | None = None) -> RequestError:
    """A 400 that names the field."""
    return RequestError(400, message, param=param, code=code)


JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


def _has_too_many_containers(body: bytes) -> bool:
    if body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return False
    structure = JSON_STRING.sub(b"", body)  # brackets within texts are just text
    return structure.count(b"[") + structure.count(b"{") > MAX_CONTAINERS


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object, whatever came."""
    if _has_too_many_containers(body):
        raise bad_request(f"the body has more than {MAX_CONTAINERS} arrays and objects", None, "too_many_containers")
    try:
        fields = msgspec.json.decode(body)
    except RecursionError:
        raise bad_request("the body is nested too deeply", None, "invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error}", None, "invalid_json") from None
    if not isinstance(fields, dict):
        raise bad_request("the body must be a JSON object", None, "invalid_json")
    return fields


def parse(fields: Mapping[str, Any], request_type: type[T]) -> T:
    """The typed request: every field of the right type and within its bounds; unknown fields are ignored."""
    try:
        return msgspec.convert(fields, request_type)
    except msgspec.ValidationError as error:
        message = str(error)
        raise bad_request(message[:MAX_MESSAGE_CHARS], _field_of(message)) from None


def _field_of(message: str) -> str | None:
    """The field in the parser's message: ``... - at `$.a[0].b```, or ``... missing required field `a```."""
    path = re.search(r"at `\$\.?([^`]*)`$", message)
    missing = re.search(r"required field `([^`]*)`", message)
    parts = [found.group(1) for found in (path, missing) if found]
    return ".".join(parts) or None


def refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """400 for what we know and cannot do, where ignoring it would give another answer than was asked for."""
    for name, harmless in HARMLESS.items():
        value = fields.get(name)
        tools_are_off = name == "tools" and fields.get("tool_choice") == "none"
        if value is not None and value not in harmless and not tools_are_off:
            raise bad_request(f"{name} is not supported here; leave it out", name, "unsupported_parameter")


def check_generation(request: CompletionRequest | ChatRequest) -> None:
    """The rules that span several fields."""
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is only allowed with stream", "stream_options")
    if request.best_of is not None and request.best_of != request.num_choices:
        raise bad_request("best_of is only supported equal to n", "best_of", "unsupported_parameter")
    if isinstance(request, ChatRequest):
        _check_chat(request)
    elif request.echo and request.logprobs is not None:
        raise bad_request("echo together with logprobs is not supported", "echo", "unsupported_parameter")


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if request.echo:
        raise bad_request("echo is only supported on /v1/completions", "echo", "unsupported_parameter")
    check_messages(request)


def check_messages(request: ChatRequest) -> None:
    """Only an assistant's turn may be without content (it may consist of tool calls)."""
    if not isinstance((request.chat_template_kwargs or {}).get("enable_thinking"), bool | None):
        raise bad_request("enable_thinking is true or false", "chat_template_kwargs.enable_thinking")
    for i, message in enumerate(request.messages):
        if message.content is None and message.role != "assistant":
            raise bad_request(f"a message of role {message.role} needs content", f"messages[{i}].content")


def check_vocabulary(token_ids: Iterable[int], vocab_size: int, param: str) -> None:
    """400 for a token id that the model does not have."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise bad_request(f"token id {largest} is not below the vocabulary's size {vocab_size}", param)


def split_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """One entry per prompt: a text, texts, token ids or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise bad_request("prompt must not mix texts, token ids and lists of token ids", "prompt")
    prompts = [prompt] if kinds == {int} else prompt
    if len(prompts) > MAX_PROMPTS:
        raise bad_request(f"at most {MAX_PROMPTS} prompts in one request, got {len(prompts)}", "prompt")
    return prompts


# --- What a client gets back --------------------------------------------------------------------------------------

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_object(
    prompt_tokens: int, cached_tokens: int, completion_tokens: int, reasoning_tokens: int
) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def model_object(name: str, created: int, max_model_len: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "hmad", "max_model_len": max_model_len}


def logits_rows(tokens: Sequence[SampledToken]) -> list[str]:
    """One base64 text per token: vocab_size float32 values, little-endian."""
    return [base64.b64encode(token.logits or b"").decode("ascii") for token in tokens]


def finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI writes -9999.0 for what cannot happen."""
    return max(logprob, -9999.0) if not math.isnan(logprob) else -9999.0


class TokenTexts(Protocol):
    """How a token is shown."""

    def token_bytes(self, token_id: int) -> bytes: ...


def token_text(token: bytes) -> str:
    """A token alone: its text, or ``bytes:\\x..`` where it is a part of a character."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def chat_logprobs(tokens: Sequence[SampledToken], texts: TokenTexts) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = texts.token_bytes(token_id)
        return {"token": token_text(raw), "logprob": finite(logprob), "bytes": list(raw)}

    content = [
        entry(token.token_id, token.logprobs.logprob) | {"top_logprobs": [entry(*top) for top in token.logprobs.top]}
        for token in tokens
        if token.logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[SampledToken], offsets: Sequence[int], texts: TokenTexts) -> dict[str, Any]:
    """The ``logprobs`` object of a completions choice; the sampled token is always among its own top."""
    known = [(token.token_id, token.logprobs) for token in tokens if token.logprobs]
    shown = [token_text(texts.token_bytes(token_id)) for token_id, _ in known]
    return {
        "tokens": shown,
        "token_logprobs": [finite(logprobs.logprob) for _, logprobs in known],
        "top_logprobs": [
            {token_text(texts.token_bytes(top_id)): finite(value) for top_id, value in logprobs.top}
            | {text: finite(logprobs.logprob)}
            for text, (_, logprobs) in zip(shown, known, strict=True)
        ],
        "text_offset": list(offsets),
    }
