"""Whether a node can do its work, why not, and since when; the supervisor is told the same as clients."""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from hmad.edges.notify import Notifier
from hmad.facts.logs import get_logger

log = get_logger(__name__)

LOOK_S = 0.5  # so often somebody looks, asked or not


class Health:
    """A node's own verdict on itself. Calling it looks: (healthy, reason)."""

    def __init__(self, check: Callable[[], tuple[bool, str]]) -> None:
        self._check = check
        self._healthy: bool | None = None
        self._since_s = time.time()

    def __call__(self) -> tuple[bool, str]:
        healthy, reason = self._check()
        if healthy != self._healthy:
            self._healthy, self._since_s = healthy, time.time()
        return healthy, reason

    def describe(self) -> dict[str, str]:
        """For /status."""
        healthy, reason = self()
        since = datetime.fromtimestamp(self._since_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {"status": word_for(healthy), "reason": reason, "since": since}


def word_for(healthy: bool) -> str:
    return "ok" if healthy else "unhealthy"


async def keep_looking(
    health: Callable[[], tuple[bool, str]], engine_trouble: Callable[[], str | None], notifier: Notifier
) -> None:
    """Until cancelled: notice changes of health, tell them, and feed the watchdog while loop and engine get on.

    That this runs proves the loop. A missing peer or a drain is no reason to be restarted: only the engine is.
    """
    period_s = min(LOOK_S, notifier.watchdog_s / 3) if notifier.watchdog_s else LOOK_S
    told, was_healthy = "", None
    while True:
        healthy, reason = health()
        if healthy != was_healthy:
            was_healthy = healthy
            log.log(
                logging.INFO if healthy else logging.WARNING, "healthy" if healthy else "not healthy", reason=reason
            )
        if reason != told:
            told = reason
            notifier.tell(f"STATUS={'serving: ' if healthy else ''}{reason}")
        if notifier.watchdog_s and engine_trouble() is None:
            notifier.tell("WATCHDOG=1")
        await asyncio.sleep(period_s)
