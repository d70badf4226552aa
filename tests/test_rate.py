"""The cap on the KV plane: what it promises in bytes per second, and that idle time buys no burst."""

import asyncio
import time

from hmad.transport.rate import Pacer

RATE = 10_000_000
NUM_BYTES = 1_000_000  # 100 ms at that rate


async def seconds_to_send(pacer: Pacer, num_bytes: int) -> float:
    start_s = time.monotonic()
    for piece in pacer.slices(memoryview(bytes(num_bytes))):
        await pacer.wait_turn(piece.nbytes)
    return time.monotonic() - start_s


def returns_at_once(pacer: Pacer, num_bytes: int) -> bool:
    turn = pacer.wait_turn(num_bytes)
    try:
        turn.send(None)
    except StopIteration:
        return True
    turn.close()
    return False


async def test_the_last_byte_leaves_when_a_link_of_that_speed_would_have_sent_it() -> None:
    pacer = Pacer(RATE)
    pacer.skip_idle()
    assert await seconds_to_send(pacer, NUM_BYTES) >= 0.999 * NUM_BYTES / RATE


async def test_idle_time_is_not_saved_up_for_a_burst() -> None:
    pacer = Pacer(RATE)
    pacer.skip_idle()
    await seconds_to_send(pacer, NUM_BYTES)
    await asyncio.sleep(0.05)
    pacer.skip_idle()
    assert await seconds_to_send(pacer, NUM_BYTES) >= 0.999 * NUM_BYTES / RATE


async def test_lateness_is_made_up_for() -> None:
    pacer = Pacer(RATE)
    pacer.skip_idle()
    await pacer.wait_turn(1)
    await asyncio.sleep(0.015)  # the loop was held up between two slices
    assert returns_at_once(pacer, RATE // 100)  # 10 ms


def test_no_cap_means_no_wait() -> None:
    assert returns_at_once(Pacer(None), NUM_BYTES)
