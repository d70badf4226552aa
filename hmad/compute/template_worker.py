"""The process that runs a model's chat template. A template is a program of strangers, fed by strangers.

Jinja's sandbox keeps it from files and internals, but not from looping for ever or filling the memory. So it runs
apart, under the kernel's limits: an alarm that no code can put off, and a bounded address space. The process dies of
them; its parent (hmad.compute.chat_template) sees the end of the pipe and starts another.

Run as a script, alone: it imports nothing of hmad. Standard input holds one JSON object per line: first the limits and
the template, then the variables of each rendering. Each is answered by one line, {"text": ...} or {"error": ...}.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = "chat"
MAX_ERROR_CHARS = 500


class OutputTooLongError(Exception):
    """The text outgrew its limit."""


def make_environment(source: str) -> ImmutableSandboxedEnvironment:
    """The environment that published chat templates are written for (that of the transformers library)."""
    environment = ImmutableSandboxedEnvironment(
        loader=jinja2.DictLoader({TEMPLATE: source}),
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def bounded(pieces: Iterable[str], max_chars: int) -> str:
    """The pieces joined, or OutputTooLongError as soon as they are too many."""
    kept, num_chars = [], 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > max_chars:
            raise OutputTooLongError(f"the text is longer than {max_chars:,} characters")
        kept.append(piece)
    return "".join(kept)


def attempt(action: Callable[[], str], time_s: float) -> bytes:
    """The answer line of an action under the alarm. Whatever it raises is an answer, save running out of memory."""
    # The default action of SIGALRM ends the process whatever it is doing, be it in the middle of C code.
    signal.setitimer(signal.ITIMER_REAL, time_s)
    try:
        reply = {"text": action()}
    except MemoryError:
        raise
    except Exception as error:
        reply = {"error": f"{error}"[:MAX_ERROR_CHARS] or type(error).__name__}
    line = json.dumps(reply).encode() + b"\n"
    signal.setitimer(signal.ITIMER_REAL, 0)
    return line


def serve() -> None:
    setup = json.loads(sys.stdin.buffer.readline())
    # Whoever started us may have ignored or blocked the alarm, and a process inherits that.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment = make_environment(setup["template"])

    def compile_template() -> str:
        environment.get_template(TEMPLATE)  # kept by the environment
        return ""

    def render(line: bytes) -> str:
        template = environment.get_template(TEMPLATE)
        return bounded(template.generate(json.loads(line)), setup["max_chars"])

    put(attempt(compile_template, setup["time_s"]))
    for line in sys.stdin.buffer:
        put(attempt(partial(render, line), setup["time_s"]))


def put(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        serve()
    except MemoryError:
        os._exit(1)  # quietly: the parent knows what it means
