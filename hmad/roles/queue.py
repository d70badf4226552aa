"""The queue before a prefill node: bounded, and fair to its clients.

Clients take turns, and each client's requests come in their order. When the queue is full, a client that waits with
no more than its share (an equal part of all places) is still let in: the newest request of whoever waits with the most
gives way. Nobody within a share is ever refused or put out.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from hmad.facts.errors import RequestError

RETRY_AFTER_S = 1.0


class Place:
    """One request of a client, waiting for its turn."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.had_turn = False


class Turns:
    """A fair lock for a few at once: clients take turns, first come first served within a client."""

    def __init__(self, at_once: int = 1) -> None:
        self._num_free = at_once
        self._lines: OrderedDict[str, OrderedDict[Place, None]] = OrderedDict()  # the first client is next

    @asynccontextmanager
    async def turn(self, place: Place) -> AsyncIterator[None]:
        """Wait for this place's turn, then hold it. Who comes again, having lost what a turn brought, goes first."""
        self._line_up(place)
        self._grant()
        try:
            await place.turn
            yield
        finally:
            self._leave(place)
            self._grant()

    def _line_up(self, place: Place) -> None:
        if place.had_turn:
            place.turn = asyncio.get_running_loop().create_future()
        line = self._lines.setdefault(place.client, OrderedDict())
        line[place] = None
        if place.had_turn:
            place.had_turn = False
            line.move_to_end(place, last=False)
            self._lines.move_to_end(place.client, last=False)

    def _grant(self) -> None:
        while self._num_free and self._lines:
            client, line = self._lines.popitem(last=False)
            place, _ = line.popitem(last=False)
            if line:
                self._lines[client] = line  # behind all other clients
            if not place.turn.done():  # else it was cancelled or put out, and is about to leave
                place.turn.set_result(None)
                place.had_turn = True
                self._num_free -= 1

    def _leave(self, place: Place) -> None:
        self._num_free += place.had_turn
        line = self._lines.get(place.client, OrderedDict())
        if place in line:
            del line[place]
            if not line:
                del self._lines[place.client]


class FairQueue:
    """Places, from before a prompt is tokenized until its request has had its turn."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._places: dict[str, dict[Place, None]] = {}  # by client, the oldest first
        self._turns = Turns()

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._places.values()))

    def check_room(self, client: str, num_places: int = 1) -> None:
        """Raise RequestError unless ``admit`` would let the client in now."""
        if num_places > self._max_waiting:
            raise RequestError(
                400,
                f"{num_places} prompts in one request, but only {self._max_waiting} may wait: send fewer at a time",
                param="prompt",
                code="never_fits",
            )
        num_waiting = self.num_waiting
        if num_waiting + num_places > self._max_waiting and self._num_of(client) + num_places > self._share(client):
            raise queue_full(f"{num_waiting} requests wait, {self._max_waiting} may")

    @contextmanager
    def admit(self, client: str, num_places: int) -> Iterator[list[Place]]:
        """Take places, or raise RequestError; what has not had its turn by the end gives them back."""
        self.check_room(client, num_places)
        while self.num_waiting + num_places > self._max_waiting:
            self._put_out_newest_of_largest()
        places = [Place(client) for _ in range(num_places)]
        self._places.setdefault(client, {}).update(dict.fromkeys(places))
        try:
            yield places
        finally:
            for place in places:
                self._leave(place)

    @asynccontextmanager
    async def turn(self, place: Place) -> AsyncIterator[None]:
        """Wait for this place's turn, then hold it; others wait until it is left. Raises RequestError when put out."""
        try:
            async with self._turns.turn(place):
                yield
        finally:
            self._leave(place)

    def _num_of(self, client: str) -> int:
        return len(self._places.get(client, ()))

    def _share(self, client: str) -> int:
        """The places that a client may count on, whoever else comes."""
        return self._max_waiting // len(self._places.keys() | {client})

    def _put_out_newest_of_largest(self) -> None:
        # It has more than a share, so at least two places, of which one at most has its turn.
        largest = max(self._places.values(), key=len)
        newest = next(place for place in reversed(largest) if not place.had_turn)
        self._leave(newest)
        if not newest.turn.done():
            newest.turn.set_exception(queue_full("a client with fewer requests took the place of this one"))
            newest.turn.exception()  # it may be gone before it asks

    def _leave(self, place: Place) -> None:
        of_client = self._places.get(place.client, {})
        if place in of_client:
            del of_client[place]
            if not of_client:
                del self._places[place.client]


def queue_full(why: str) -> RequestError:
    return RequestError(429, f"the queue is full: {why}", code="queue_full", retry_after_s=RETRY_AFTER_S)
