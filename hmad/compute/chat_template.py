"""Renders a chat template under limits on its time, memory and output, in a process of its own."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from hmad.facts.errors import ModelError, RequestError

TIME_LIMIT_S = 2.0
MEMORY_LIMIT_BYTES = 256 * 2**20  # address space of the whole worker, of which its start takes some 30 MiB
OUTPUT_LIMIT_CHARS = 4 * 2**20
WORKER = Path(__file__).with_name("template_worker.py")


class ChatTemplate:
    """One chat template. ``render`` blocks for up to the time limit: call it from a thread, any thread.

    One rendering runs at a time; an honest template takes well under a millisecond. A rendering that overruns a limit
    costs the worker process its life, and the next one starts another.
    """

    def __init__(
        self,
        source: str,
        origin: str,
        *,
        time_limit_s: float = TIME_LIMIT_S,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        output_limit_chars: int = OUTPUT_LIMIT_CHARS,
    ) -> None:
        self._setup = {
            "template": source,
            "time_s": time_limit_s,
            "memory_bytes": memory_limit_bytes,
            "max_chars": output_limit_chars,
        }
        self._lock = threading.Lock()
        reply = self._start()
        if "error" in reply:
            self.close()
            raise ModelError(f"{origin}: the chat template does not compile: {reply['error']}")

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt text; RequestError 400 when the template refuses, fails or overruns a limit."""
        line = json_line(variables)
        with self._lock:
            reply = self._render(line)
        if "error" in reply:
            message = f"the chat template cannot render these messages: {reply['error']}"
            raise RequestError(400, message, param="messages")
        return reply["text"]

    def close(self) -> None:
        """End the worker process. Garbage collection and the end of this process do so too."""
        with self._lock:
            self._end_worker()

    def _render(self, line: bytes) -> dict[str, str]:
        if self._worker.poll() is not None:
            self._end_worker()
            reply = self._start()
            if "error" in reply:
                return reply
        return self._ask(line)

    def _start(self) -> dict[str, str]:
        # -P: the folder of the script is not for imports. A session of its own: a terminal's Ctrl-C is not for it.
        self._worker = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._end_worker = weakref.finalize(self, end, self._worker)
        return self._ask(json_line(self._setup))

    def _ask(self, line: bytes) -> dict[str, str]:
        to_worker, from_worker = cast(IO[bytes], self._worker.stdin), cast(IO[bytes], self._worker.stdout)
        with contextlib.suppress(BrokenPipeError):  # it died while it read: the missing answer says so
            to_worker.write(line)
            to_worker.flush()
        answer = from_worker.readline()
        if not answer.endswith(b"\n"):
            return {"error": self._cause_of_death()}
        reply: dict[str, str] = json.loads(answer)
        return reply

    def _cause_of_death(self) -> str:
        if self._worker.wait() == -signal.SIGALRM:
            return f"it ran for more than {self._setup['time_s']:g} s"
        return f"it needed more than {self._setup['memory_bytes']:,} bytes of memory, or too deep a recursion"


def end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def json_line(value: Mapping[str, Any]) -> bytes:
    """One line of JSON. Values nested too deep for JSON are the client's mistake."""
    try:
        return json.dumps(value).encode() + b"\n"
    except RecursionError as error:
        raise RequestError(400, "messages are nested too deep", param="messages") from error
