"""The offset between a peer's monotonic clock and ours, from PING/PONG (the midpoint estimate of NTP, RFC 5905)."""

from collections import deque

from hmad.wire.messages import Pong

# The sample with the shortest round trip among the last few is the least disturbed by queueing.
NUM_SAMPLES = 16


class ClockOffset:
    """peer_time = our_time + offset_s."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=NUM_SAMPLES)

    def add(self, pong: Pong, now_s: float) -> None:
        round_trip = (now_s - pong.ping_sent_s) - (pong.sent_s - pong.received_s)
        offset = ((pong.received_s - pong.ping_sent_s) + (pong.sent_s - now_s)) / 2
        self._samples.append((round_trip, offset))

    @property
    def known(self) -> bool:
        return bool(self._samples)

    @property
    def offset_s(self) -> float:
        return min(self._samples)[1] if self._samples else 0.0

    def to_ours(self, peer_time_s: float) -> float:
        """A time of the peer's clock, in ours."""
        return peer_time_s - self.offset_s
