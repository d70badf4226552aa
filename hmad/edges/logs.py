"""Where log lines go: one line per event on stderr, as JSON or as text, and never a flood of the same one.

Every record of the process takes this way, those of libraries too. Fields come from the call (``log.info("ready",
peer=...)``), and from the task it is made in: a request's id is bound once, in ``hmad.edges.api``.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import structlog
from aiohttp.http_exceptions import HttpProcessingError
from structlog.stdlib import ExtraAdder, ProcessorFormatter
from structlog.typing import EventDict, Processor

MAX_LINES_A_MINUTE = 30  # of the same event of the same logger
MINUTE_S = 60.0
MAX_EVENTS_KNOWN = 1000  # events are constants, unless a library writes its own; then the oldest is forgotten


def configure(log_format: Literal["json", "text"], level: str) -> None:
    """Take over logging for this process. Libraries speak from warnings on: some tell their life at debug."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(log_format))
    handler.addFilter(RateLimit())
    logging.basicConfig(handlers=[handler], level=max(logging.WARNING, logging.getLevelName(level.upper())), force=True)
    logging.getLogger("hmad").setLevel(level.upper())
    logging.getLogger("aiohttp.server").addFilter(without_the_clients_bytes)
    logging.captureWarnings(True)


def without_the_clients_bytes(record: logging.LogRecord) -> bool:
    """aiohttp tells of what is no HTTP with a traceback that quotes it, and it may hold a key or a prompt."""
    if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
        record.exc_info, record.levelno, record.levelname = None, logging.WARNING, "WARNING"
    return True


def formatter(log_format: Literal["json", "text"]) -> logging.Formatter:
    """Turns records of both kinds, structlog's and the standard library's, into one line each."""
    render: Processor = structlog.processors.JSONRenderer(default=plain) if log_format == "json" else as_text
    return ProcessorFormatter(
        processors=[
            ExtraAdder(),
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            in_order,
            render,
        ]
    )


def in_order(_logger: Any, _method: str, fields: EventDict) -> EventDict:
    """ts, level, event, logger, then what the event says of itself."""
    record: logging.LogRecord = fields.pop("_record")
    del fields["_from_structlog"]
    return {
        "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "event": fields.pop("event"),
        "logger": record.name,
        **fields,
    }


def plain(value: object) -> str:
    """What JSON has no word for; ids are bytes, and are told in hex."""
    return value.hex() if isinstance(value, bytes) else str(value)


def as_text(_logger: Any, _method: str, fields: Mapping[str, Any]) -> str:
    """For eyes. Whatever a peer or a client has put into it, it stays one line; only our own tracebacks take more."""
    rest = dict(fields)
    traceback = rest.pop("exception", None)
    ts, level, event, logger = (rest.pop(name) for name in ("ts", "level", "event", "logger"))
    words = [f"{ts} {level:<7} {logger}: {printable(event)}", *(f"{name}={quoted(rest[name])}" for name in rest)]
    return " ".join(words) + (f"\n{traceback}" if traceback else "")


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(value: object) -> str:
    text = printable(plain(value))
    return json.dumps(text, ensure_ascii=False) if " " in text or '"' in text or not text else text


@dataclass
class Window:
    """One event's last minute."""

    began_s: float
    passed: int = 0
    dropped: int = 0


class RateLimit(logging.Filter):
    """Lets the same event of the same logger pass so many times a minute; the next one says what was dropped."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[tuple[str, str], Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            key = record.name, str(record.msg)
            window = self._windows.get(key)
            if window is None or self._clock() - window.began_s >= MINUTE_S:
                if window is not None and window.dropped:
                    record.dropped = window.dropped
                window = self._open(key)
            window.passed += 1
            window.dropped += window.passed > MAX_LINES_A_MINUTE
            return window.passed <= MAX_LINES_A_MINUTE

    def _open(self, key: tuple[str, str]) -> Window:
        self._windows.pop(key, None)
        if len(self._windows) == MAX_EVENTS_KNOWN:
            del self._windows[next(iter(self._windows))]
        self._windows[key] = Window(self._clock())
        return self._windows[key]
