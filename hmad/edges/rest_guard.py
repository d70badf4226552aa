"""The REST port against those who connect and send nothing, or send it slowly: they make room, clients do not.

A connection *waits* until its first request has come, between two requests, and while a request's body is still on its
way. Those that wait are bounded in number and time; those whose requests are being served are not: the queue and its
limits bound them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from hmad.transport.connection import host_of
from hmad.transport.strangers import Strangers

MAX_WAITING = 512
MAX_WAITING_PER_ADDRESS = 384  # a reverse proxy is one address
FIRST_REQUEST_S = 10.0  # from connecting to the end of the request's head
IDLE_S = 300.0  # between two requests; aiohttp closes sooner what is quite silent

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RestGuard:
    """Knows who waits. Its middleware, ``attend``, has to be an application's outermost."""

    def __init__(self) -> None:
        self._strangers = Strangers(MAX_WAITING, MAX_WAITING_PER_ADDRESS)
        self._connections: dict[asyncio.BaseProtocol, RestConnection] = {}  # by what aiohttp calls a protocol

    @web.middleware
    async def attend(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A connection does not wait while its request is served."""
        connection = self._connections.get(request.protocol)
        if connection is None:  # a server without a GuardedSite
            return await handler(request)
        self._strangers.discard(connection)
        try:
            return await handler(request)
        finally:
            self._waits(request, IDLE_S)

    @contextmanager
    def body_comes(self, request: web.Request, patience_s: float) -> Iterator[None]:
        """While the client sends a body it is the one who is waited for."""
        self._waits(request, patience_s)
        try:
            yield
        finally:
            if connection := self._connections.get(request.protocol):
                self._strangers.discard(connection)

    def _waits(self, request: web.Request, patience_s: float) -> None:
        if connection := self._connections.get(request.protocol):
            self._strangers.add(connection, connection.host, patience_s)

    def opened(self, connection: "RestConnection") -> None:
        self._connections[connection.served_by] = connection
        self._strangers.add(connection, connection.host, FIRST_REQUEST_S)

    def closed(self, connection: "RestConnection") -> None:
        self._strangers.discard(connection)
        del self._connections[connection.served_by]


GUARD = web.AppKey("guard", RestGuard)


class RestConnection(asyncio.Protocol):
    """Stands between a socket and aiohttp's protocol, only to know when it opens and closes."""

    def __init__(self, guard: RestGuard, served_by: asyncio.Protocol) -> None:
        self._guard = guard
        self.served_by = served_by
        self.host = "?"
        self._transport: asyncio.Transport | None = None
        self.data_received = served_by.data_received  # type: ignore[method-assign]
        self.eof_received = served_by.eof_received  # type: ignore[method-assign]
        self.pause_writing = served_by.pause_writing  # type: ignore[method-assign]
        self.resume_writing = served_by.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.host = host_of(transport.get_extra_info("peername"))
        self.served_by.connection_made(transport)
        self._guard.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.closed(self)
        self.served_by.connection_lost(exc)

    def show_out(self, reason: str) -> None:
        if self._transport is not None:
            self._transport.abort()


class GuardedSite(web.BaseSite):
    """Like aiohttp's TCPSite, with the application's guard at the door."""

    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        super().__init__(runner)
        self._app_runner = runner
        self._host = host
        self._port = port

    @property
    def name(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen. Raises OSError when the port cannot be had."""
        await super().start()
        self._server = await asyncio.get_running_loop().create_server(self._accept, self._host, self._port)

    def _accept(self) -> RestConnection:
        serve = self._app_runner.server
        if serve is None:
            raise RuntimeError("the runner is not set up")
        return RestConnection(self._app_runner.app[GUARD], serve())
