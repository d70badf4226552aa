"""What a supervisor hears of us: systemd's notification protocol, one datagram per message. Without one, nothing."""

import os
import socket
from collections.abc import MutableMapping

from hmad.facts.logs import get_logger

log = get_logger(__name__)

USEC_PER_S = 1_000_000
FULL_QUEUE_S = 0.2  # how long a message may wait for a supervisor that is busy: READY must not be lost


class Notifier:
    """Tells the supervisor that the environment names; a child process is not to inherit the name."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        watchdog_usec = environ.pop("WATCHDOG_USEC", "")
        is_for_us = environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        if self._socket is not None:
            self._socket.settimeout(FULL_QUEUE_S)
        self.watchdog_s = int(watchdog_usec) / USEC_PER_S if watchdog_usec and is_for_us else None

    def tell(self, *messages: str) -> None:
        """``READY=1``, ``STATUS=words``, ... A supervisor that does not listen is its own trouble, not ours.

        A line is a command to it, and words may be a peer's: each message stays one line.
        """
        if self._socket is not None:
            try:
                self._socket.sendto(
                    "\n".join(" ".join(message.splitlines()) for message in messages).encode(), self._address
                )
            except OSError as error:
                log.warning("the supervisor cannot be told", cause=str(error))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
