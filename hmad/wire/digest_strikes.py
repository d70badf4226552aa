"""When wrong digests end a session."""

from collections import deque

from hmad.wire import limits as bounds


class DigestStrikes:
    """Wrong digests of one session: accidents happen, three within a minute are no accident."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=bounds.DIGEST_STRIKES)

    def add(self, now_s: float) -> bool:
        """Count one. Returns whether the session must end."""
        self._times_s.append(now_s)
        full = len(self._times_s) == bounds.DIGEST_STRIKES
        return full and now_s - self._times_s[0] <= bounds.DIGEST_STRIKES_WINDOW_S
