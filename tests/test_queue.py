"""The queue of a prefill node: whose turn it is, who gives way when it is full, and who leaves at once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmad.facts.errors import RequestError
from hmad.roles.queue import FairQueue, Place, Turns


class Crowd:
    """Requests in a queue whose first turn is held: nobody moves until ``serve``."""

    def __init__(self, max_waiting: int) -> None:
        self.queue = FairQueue(max_waiting)
        self.served: list[str] = []
        self.refused: list[str] = []
        self.gate = asyncio.Event()
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str) -> None:
        """Each name is a client and a number: ``a1``. They line up in this order."""
        for name in names:
            self.tasks[name] = asyncio.create_task(self._request(name))
            await asyncio.sleep(0)

    async def _request(self, name: str) -> None:
        try:
            with self.queue.admit(name[0], 1) as (place,):
                async with self.queue.turn(place):
                    await self.gate.wait()
                    self.served.append(name)
        except RequestError as error:
            self.refused.append(f"{name} {error.status}")

    async def serve(self) -> None:
        self.gate.set()
        await asyncio.wait_for(asyncio.gather(*self.tasks.values(), return_exceptions=True), 10)
        assert self.queue.num_waiting == 0


@asynccontextmanager
async def crowd(max_waiting: int) -> AsyncIterator[Crowd]:
    crowd = Crowd(max_waiting)
    yield crowd
    await crowd.serve()


async def test_clients_take_turns() -> None:
    async with crowd(100) as c:
        await c.come("a1", "a2", "a3", "a4", "b1", "c1", "b2")
    assert c.served == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
    assert c.refused == []


async def test_a_thousand_requests_do_not_starve_another_client() -> None:
    async with crowd(2000) as c:
        await c.come(*(f"a{i}" for i in range(1000)), "b1")
    assert c.served.index("b1") == 2  # after the one that had its turn, and the next


async def test_a_full_queue_refuses_who_has_its_share() -> None:
    async with crowd(3) as c:
        await c.come("a1", "a2", "a3", "a4")
        assert c.refused == ["a4 429"]
    assert c.served == ["a1", "a2", "a3"]


async def test_the_newest_of_the_largest_gives_way_to_a_client_below_its_share() -> None:
    async with crowd(4) as c:
        await c.come("a1", "a2", "a3", "a4", "b1", "b2", "b3", "a5")
        await asyncio.sleep(0)
        assert c.queue.num_waiting == 4
        assert sorted(c.refused) == ["a3 429", "a4 429", "a5 429", "b3 429"]
    assert c.served == ["a1", "a2", "b1", "b2"]


async def test_whoever_has_the_turn_never_gives_way() -> None:
    async with crowd(2) as c:
        await c.come("a1", "a2", "b1", "c1")  # c's share of two places among three is none
    assert c.served == ["a1", "b1"]
    assert sorted(c.refused) == ["a2 429", "c1 429"]


async def test_a_cancelled_request_leaves_at_once() -> None:
    async with crowd(3) as c:
        await c.come("a1", "a2", "b1")
        c.tasks["a2"].cancel()
        await asyncio.sleep(0)
        await c.come("a3")
        c.tasks["a1"].cancel()  # the one that has the turn
        await asyncio.sleep(0)
        assert c.queue.num_waiting == 2
    assert c.served == ["b1", "a3"]


async def test_a_turn_that_comes_with_the_cancellation_goes_to_the_next() -> None:
    async with crowd(3) as c:
        await c.come("a1", "a2", "a3")
        c.gate.set()
        c.tasks["a2"].cancel()  # its future is cancelled before it can leave the line
    assert c.served == ["a1", "a3"]


async def test_a_list_of_prompts_takes_all_its_places_or_none() -> None:
    queue = FairQueue(3)
    with queue.admit("a", 2):
        for num_places, status in ((2, 429), (4, 400)):
            with pytest.raises(RequestError) as error, queue.admit("a", num_places):
                pass
            assert error.value.status == status
        assert queue.num_waiting == 2
        queue.check_room("a")
    assert queue.num_waiting == 0


async def test_a_request_put_out_while_it_is_prepared_learns_of_it_when_it_lines_up() -> None:
    queue = FairQueue(2)
    with queue.admit("a", 2) as (first, second), queue.admit("b", 1):
        with pytest.raises(RequestError, match="fewer requests"):
            async with queue.turn(second):
                pass
        async with queue.turn(first):
            pass


async def test_who_comes_again_goes_first_and_cannot_be_put_out() -> None:
    """A request whose decode node died is placed again: it has waited before, and nobody may notice."""
    async with crowd(2) as c:
        with c.queue.admit("a", 1) as (place,):
            async with c.queue.turn(place):
                pass
        await c.come("b1", "b2")
        again = asyncio.create_task(take(c.queue, place, c.served))
        await asyncio.sleep(0)
        await c.come("a2")
        await asyncio.sleep(0)
        assert c.refused == ["b2 429"]
        c.gate.set()
        await again
    assert c.served == ["b1", "again", "a2"]


async def take(queue: FairQueue, place: Place, served: list[str]) -> None:
    async with queue.turn(place):
        served.append("again")


async def test_several_turns_at_once() -> None:
    turns, inside, most = Turns(at_once=2), 0, 0

    async def enter(client: str) -> None:
        nonlocal inside, most
        async with turns.turn(Place(client)):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(enter(client) for client in "aabbc"))
    assert (inside, most) == (0, 2)


@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 3)), max_size=40))
def test_nobody_within_a_share_is_refused_or_put_out(max_waiting: int, comers: list[tuple[str, int]]) -> None:
    """Whatever comes, in requests of one to three prompts; nobody is served meanwhile."""
    asyncio.run(check_shares(max_waiting, comers))


async def check_shares(max_waiting: int, comers: list[tuple[str, int]]) -> None:
    queue = FairQueue(max_waiting)
    waiting: list[Place] = []
    with ExitStack() as admissions:
        for client, num_prompts in comers:
            before = Counter(place.client for place in waiting)
            share = max_waiting // len(before.keys() | {client})
            admitted: list[Place] = []
            with suppress(RequestError):
                admitted = admissions.enter_context(queue.admit(client, num_prompts))
            put_out = Counter(place.client for place in waiting if place.turn.done())
            waiting = [place for place in [*waiting, *admitted] if not place.turn.done()]
            assert admitted or before[client] + num_prompts > share
            assert all(before[other] - num_gone >= share for other, num_gone in put_out.items())
            assert queue.num_waiting == len(waiting) <= max_waiting
    assert queue.num_waiting == 0
