"""The cap on the KV plane: what it promises in bytes per second, and that idle time buys no burst."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hmad.transport.rate import Pacer

RATE = 10_000_000
NUM_BYTES = 1_000_000  # 100 ms at that rate


def seconds_to_send(pacer: Pacer, num_bytes: int) -> float:
    start_s = time.monotonic()
    for piece in pacer.slices(memoryview(bytes(num_bytes))):
        time.sleep(max(0.0, pacer.seconds_until_turn(piece.nbytes)))
    return time.monotonic() - start_s


def test_the_last_byte_leaves_when_a_link_of_that_speed_would_have_sent_it() -> None:
    pacer = Pacer(RATE)
    pacer.skip_idle()
    assert seconds_to_send(pacer, NUM_BYTES) >= 0.999 * NUM_BYTES / RATE


def test_idle_time_is_not_saved_up_for_a_burst() -> None:
    pacer = Pacer(RATE)
    pacer.skip_idle()
    seconds_to_send(pacer, NUM_BYTES)
    time.sleep(0.05)
    pacer.skip_idle()
    assert seconds_to_send(pacer, NUM_BYTES) >= 0.999 * NUM_BYTES / RATE


def test_lateness_is_made_up_for() -> None:
    pacer = Pacer(RATE)
    pacer.skip_idle()
    pacer.seconds_until_turn(1)
    time.sleep(0.015)  # the sender was held up between two slices
    assert pacer.seconds_until_turn(RATE // 100) <= 0  # 10 ms


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Threads that take turns as often as Python lets them."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("restless_threads")
def test_connections_share_one_cap() -> None:
    """Their threads book turns of one queue: none is lost, none is given twice."""
    pacer = Pacer(RATE)
    start_s = time.monotonic()
    pacer.skip_idle()
    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(lambda: [pacer.seconds_until_turn(200) for _ in range(5000)])
    assert pacer.seconds_until_turn(0) >= 0.4 - (time.monotonic() - start_s)


def test_no_cap_means_no_wait() -> None:
    assert Pacer(None).seconds_until_turn(NUM_BYTES) <= 0
