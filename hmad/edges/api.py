"""The HTTP application of both roles: routes, who may use them, and how errors look.

Start it with ``web.AppRunner(app, handler_cancellation=True, auto_decompress=False)``: the first makes a client that
disconnects cancel its generation, the second keeps a compressed body from being unpacked before it is refused.
"""

import asyncio
import hmac
import logging
import math
import re
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from aiohttp import ClientConnectionResetError, hdrs, web
from structlog.contextvars import bound_contextvars

from hmad.edges.answers import Answer, answer_for
from hmad.edges.completions import (
    Arrival,
    Piece,
    ServedModel,
    encode_chat,
    in_thread,
    joined,
    num_prompts,
    off_loop,
    prepare,
    started,
)
from hmad.edges.health import word_for
from hmad.edges.metrics import CONTENT_TYPE, Metrics, error_cause
from hmad.edges.openai_schema import (
    MAX_BODY_BYTES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
    check_generation,
    check_messages,
    check_vocabulary,
    error_object,
    model_object,
    parse,
    parse_json,
    refuse_unsupported,
    token_text,
)
from hmad.edges.rest_guard import GUARD, RestGuard
from hmad.edges.status_page import status_page
from hmad.edges.timeline_page import timeline_page
from hmad.edges.timeline_trace import chrome_trace
from hmad.facts.errors import HmadError, LocalProtocolError, RemoteError, RequestError
from hmad.facts.keys import key_digest
from hmad.facts.logs import get_logger
from hmad.facts.timeline import Timeline

log = get_logger(__name__)

BODY_TIMEOUT_S = 60.0
OPEN_PATHS = ("/livez", "/health")
PREFILL_PATHS = ("/v1/", "/tokenize", "/detokenize")
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
SSE_HEADERS = {hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8", hdrs.CACHE_CONTROL: "no-cache"}

# A page of ours runs no script and loads nothing, whatever a client may have talked into it.
HTML_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    hdrs.CACHE_CONTROL: "no-store",
}

OUR_ID = web.RequestKey("id", str)
CLIENT = web.RequestKey("client", str)  # whose turn a request takes
STREAM = web.RequestKey("stream", web.StreamResponse)  # set once its headers are out

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class RoleServices:
    """What a role gives its REST edge. ``served`` is None on a decode node: it has no OpenAI routes.

    ``health`` says whether the engine makes progress and, if not, why. ``api_key_digests`` (``key_digest`` of
    each key) is empty where no key is asked for.
    """

    role: str
    metrics: Metrics
    health: Callable[[], tuple[bool, str]]
    status: Callable[[], dict[str, Any]]
    served: ServedModel | None = None
    api_key_digests: frozenset[bytes] = frozenset()
    max_body_bytes: int = MAX_BODY_BYTES


def build_app(services: RoleServices) -> web.Application:
    """The application of one node."""
    guard = Guard(services)
    door = RestGuard()
    middlewares = [door.attend, guard.shape_errors, guard.ask_for_key]
    app = web.Application(middlewares=middlewares, client_max_size=services.max_body_bytes)
    app[GUARD] = door
    app.on_response_prepare.append(guard.sign)
    app.add_routes(NodeRoutes(services).routes())
    if services.served:
        app.add_routes(OpenAIRoutes(services.served, services.metrics).routes())
    return app


def json_response(status: int, body: dict[str, Any]) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")


def html_response(page: str) -> web.Response:
    return web.Response(text=page, content_type="text/html", headers=HTML_HEADERS)


def sse_event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class Guard:
    """What every route has in common: ids, keys, and errors in OpenAI's shape."""

    def __init__(self, services: RoleServices) -> None:
        self._services = services

    @web.middleware
    async def shape_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every error as JSON; one that comes after a stream began as its last event."""
        request[OUR_ID] = uuid.uuid4().hex
        with bound_contextvars(request_id=request[OUR_ID]):
            try:
                return await self._answered(request, handler)
            except ClientConnectionResetError:  # the client is gone while we wrote, maybe an error: nobody to tell
                return request[STREAM] if STREAM in request else web.Response()

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ClientConnectionResetError:
            raise
        except Exception as error:
            return await self._report(request, error)

    async def _report(self, request: web.Request, error: Exception) -> web.StreamResponse:
        refusal = self._refusal(request, error)
        self._services.metrics.count_error(error_cause(error))
        if refusal.status >= 500 and refusal is not error:
            log_failure(error, request.path)
        body = error_object(refusal.status, str(refusal), refusal.param, refusal.code)
        if STREAM in request:
            stream = request[STREAM]
            await stream.write(sse_event(body))
            await stream.write_eof()
            return stream
        response = json_response(refusal.status, body)
        response.headers.update(_error_headers(refusal, error))
        return response

    def _refusal(self, request: web.Request, error: Exception) -> RequestError:
        if isinstance(error, RequestError):
            return error
        if isinstance(error, web.HTTPException):
            return RequestError(error.status, self._http_message(request, error))
        if isinstance(error, RemoteError):
            return RequestError(503, str(error), code="decode_node_failed", retry_after_s=1.0)
        if isinstance(error, HmadError):
            return RequestError(500, str(error), code="internal_error")
        return RequestError(500, f"internal error; the log has it as request {request[OUR_ID]}", code="internal_error")

    def _http_message(self, request: web.Request, error: web.HTTPException) -> str:
        if error.status == 413:
            return f"the body is larger than {self._services.max_body_bytes} bytes"
        if error.status == 404 and not self._services.served and request.path.startswith(PREFILL_PATHS):
            return f"this is a {self._services.role} node: ask a prefill node for {request.path[:100]}"
        return f"{error.reason}: {request.method} {request.path[:100]}"

    @web.middleware
    async def ask_for_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """401 unless the client named a key we know, where keys are asked for."""
        request[CLIENT] = request.remote or ""
        if self._services.api_key_digests and request.path not in OPEN_PATHS:
            request[CLIENT] = self._known_key(request).hex()
        return await handler(request)

    def _known_key(self, request: web.Request) -> bytes:
        """The digest of the client's key. Raises RequestError unless it is one of ours."""
        scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        digest = key_digest(key.strip().encode("utf-8", "surrogateescape"))
        matches = [hmac.compare_digest(digest, known) for known in self._services.api_key_digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise RequestError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return digest

    async def sign(self, request: web.Request, response: web.StreamResponse) -> None:
        """The client's X-Request-Id comes back if it is sane, else ours; ours alone is used inside."""
        named = request.headers.get("X-Request-Id", "")
        response.headers["X-Request-Id"] = named if SANE_REQUEST_ID.fullmatch(named) else request[OUR_ID]
        response.headers[hdrs.SERVER] = "hmad"


def log_failure(error: Exception, path: str) -> None:
    """One line with the cause for what peers and devices do to us; a traceback for bugs alone."""
    is_bug = isinstance(error, LocalProtocolError) or not isinstance(error, HmadError)
    level = logging.WARNING if isinstance(error, RemoteError) else logging.ERROR
    cause = f"{type(error).__name__}: {error}"
    log.log(level, "a request failed", path=path, cause=cause, exc_info=error if is_bug else None)


def _error_headers(refusal: RequestError, error: Exception) -> dict[str, str]:
    headers: dict[str, str] = {}
    if refusal.retry_after_s is not None:
        headers[hdrs.RETRY_AFTER] = str(max(1, math.ceil(refusal.retry_after_s)))
    if refusal.status == 401:
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    if isinstance(error, web.HTTPMethodNotAllowed):
        headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
    return headers


class NodeRoutes:
    """What both roles answer."""

    def __init__(self, services: RoleServices) -> None:
        self._services = services

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/livez", self.livez),
            web.get("/health", self.health),
            web.get("/metrics", self.metrics),
            web.get("/status", self.status),
            web.get("/", self.page),
        ]

    async def livez(self, request: web.Request) -> web.Response:
        """The process answers."""
        return json_response(200, {"status": "alive"})

    async def health(self, request: web.Request) -> web.Response:
        """200 while the node can do its work, else 503 and why not."""
        healthy, reason = self._services.health()
        return json_response(200 if healthy else 503, {"status": word_for(healthy), "reason": reason})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._services.metrics.render(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})

    async def status(self, request: web.Request) -> web.Response:
        return json_response(200, self._services.status())

    async def page(self, request: web.Request) -> web.Response:
        """/status, /health and /metrics for people."""
        services = self._services
        return html_response(status_page(services.status(), *services.health(), services.metrics.registry))


class OpenAIRoutes:
    """What a prefill node answers besides."""

    def __init__(self, served: ServedModel, metrics: Metrics) -> None:
        self._served = served
        self._metrics = metrics

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat_completions),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name:.+}", self.model),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
            web.get("/v1/timeline/{id}", self.timeline_trace),
            web.get("/timeline/{id}", self.timeline_page),
        ]

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, CompletionRequest)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, ChatRequest)

    async def _generate(
        self, request: web.Request, request_type: type[CompletionRequest | ChatRequest]
    ) -> web.StreamResponse:
        arrival = Arrival(request[OUR_ID], request[CLIENT], time.monotonic())
        generator = self._served.generator
        with self._metrics.outcome():
            async with time_limit(self._served.request_timeout_s):
                generator.check_room(arrival.client)  # first of all: to refuse costs least before the body is read
                body = await read_body(request)
                parsed = self._parse(body, request_type)
                with generator.admit(arrival.client, num_prompts(parsed)) as places:
                    job = await prepare(parsed, self._served, arrival, places, len(body))
                    async with started(job, arrival.received_s, self._metrics) as run:
                        answer = answer_for(run)
                        return await (send_stream(request, answer) if parsed.stream else send_whole(answer))

    def _parse(
        self, body: bytes, request_type: type[CompletionRequest | ChatRequest]
    ) -> CompletionRequest | ChatRequest:
        fields = parse_json(body)
        refuse_unsupported(fields)
        parsed = parse(fields, request_type)
        check_generation(parsed)
        self._check_model(parsed.model)
        return parsed

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._served.names:
            known = ", ".join(self._served.names)
            raise RequestError(
                404, f"the model {name!r} is not served here; there is {known}", param="model", code="model_not_found"
            )

    async def models(self, request: web.Request) -> web.Response:
        return json_response(200, {"object": "list", "data": [self._model_object(n) for n in self._served.names]})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self._check_model(name)
        return json_response(200, self._model_object(name))

    def _model_object(self, name: str) -> dict[str, Any]:
        return model_object(name, self._served.created_s, self._served.max_model_len)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        fields = parse_json(body)
        parsed = parse(fields, TokenizeChatRequest) if "messages" in fields else parse(fields, TokenizeTextRequest)
        self._check_model(parsed.model)
        tokens = await in_thread(self._served, request[CLIENT], lambda: self._encode(parsed))
        strings = [token_text(self._served.tokenizer.token_bytes(t)) for t in tokens]
        return json_response(
            200,
            {
                "count": len(tokens),
                "max_model_len": self._served.max_model_len,
                "tokens": tokens,
                "token_strs": strings if parsed.return_token_strs else None,
            },
        )

    def _encode(self, parsed: TokenizeChatRequest | TokenizeTextRequest) -> list[int]:
        if isinstance(parsed, TokenizeTextRequest):
            return self._served.tokenizer.encode(
                parsed.prompt, add_special_tokens=parsed.add_special_tokens is not False
            )
        check_messages(parsed)
        return encode_chat(parsed, self._served.tokenizer, bool(parsed.add_special_tokens))

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        parsed = parse(parse_json(body), DetokenizeRequest)
        self._check_model(parsed.model)
        check_vocabulary(parsed.tokens, self._served.vocab_size, "tokens")
        tokenizer = self._served.tokenizer
        decode = partial(tokenizer.decode, parsed.tokens, skip_special_tokens=False)
        text = await off_loop(len(body), self._served, request[CLIENT], decode)
        return json_response(200, {"prompt": text})

    async def timeline_trace(self, request: web.Request) -> web.Response:
        """One of the last requests as a Chrome trace, for Perfetto."""
        return json_response(200, chrome_trace(self._timeline(request)))

    async def timeline_page(self, request: web.Request) -> web.Response:
        """The same as a picture."""
        return html_response(timeline_page(self._timeline(request)))

    def _timeline(self, request: web.Request) -> Timeline:
        request_id = request.match_info["id"].rpartition("-")[2]  # an answer's id, cmpl-..., does as well
        timeline = self._served.timeline_of(request_id)
        if timeline is None:
            raise RequestError(404, f"no timeline of request {request_id[:64]!r} is kept here", code="unknown_request")
        return timeline


async def read_body(request: web.Request) -> bytes:
    """The whole body: JSON, not compressed, within the limit, and not slower than BODY_TIMEOUT_S."""
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise RequestError(415, "compressed bodies are not accepted", param="Content-Encoding")
    # Besides clarity: a web page may post other types to a local daemon without asking the browser first.
    if request.content_type != "application/json":
        raise RequestError(415, "the body must be sent as Content-Type: application/json", param="Content-Type")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            with request.app[GUARD].body_comes(request, 2 * BODY_TIMEOUT_S):
                return await request.read()
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None


@asynccontextmanager
async def time_limit(limit_s: float | None) -> AsyncIterator[None]:
    """End what runs in it when the operator's limit has passed."""
    try:
        async with asyncio.timeout(limit_s) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        message = f"the request was not finished within {limit_s:g} s, the limit of this server"
        raise RequestError(504, message, code="request_timeout") from None


async def send_whole(answer: Answer) -> web.Response:
    """All choices at once."""
    pieces: dict[int, list[Piece]] = defaultdict(list)
    async with aclosing(answer.run.pieces()) as arriving:
        async for piece in arriving:
            if piece.is_first:  # maybe for the second time: a decode node was lost
                pieces[piece.index].clear()
            pieces[piece.index].append(piece)
    return json_response(200, answer.whole([joined(of_choice) for of_choice in pieces.values()]))


async def send_stream(request: web.Request, answer: Answer) -> web.StreamResponse:
    """Server-sent events. Headers wait for the first piece, so that a refusal until then is a plain HTTP error."""
    async with aclosing(answer.run.pieces()) as pieces:
        piece = await anext(pieces)
        stream = await _open_stream(request)
        await stream.write(_sse_of(answer, piece))
        async for piece in pieces:
            await stream.write(_sse_of(answer, piece))
    if answer.request.include_usage:
        await stream.write(sse_event(answer.usage_chunk()))
    await stream.write(b"data: [DONE]\n\n")
    await stream.write_eof()
    return stream


async def _open_stream(request: web.Request) -> web.StreamResponse:
    stream = web.StreamResponse(headers=SSE_HEADERS)
    await stream.prepare(request)
    request[STREAM] = stream  # from here on an error is an event
    return stream


def _sse_of(answer: Answer, piece: Piece) -> bytes:
    return b"".join(sse_event(chunk) for chunk in answer.chunks(piece))
