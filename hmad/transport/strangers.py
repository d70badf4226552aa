"""Connections that have yet to show what they want: few of them, and none for long."""

import asyncio
from typing import Protocol


class Stranger(Protocol):
    """A connection that somebody opened."""

    def show_out(self, reason: str) -> None:
        """Close at once. The strangers have forgotten it already."""


class Strangers:
    """Those who wait, bounded in all, per address, and each in time.

    One too many costs the oldest of its address its place, or, where it is their sum, the oldest of the most crowded
    address. So a flood pushes out itself: who comes from elsewhere keeps its place, and who comes from the same
    address has as long as it takes to open as many connections again, where a peer's handshake takes milliseconds.
    """

    def __init__(self, most: int, most_per_address: int) -> None:
        self._most = most
        self._most_per_address = most_per_address
        self._timers: dict[Stranger, asyncio.TimerHandle] = {}
        self._address_of: dict[Stranger, str] = {}
        self._by_address: dict[str, dict[Stranger, None]] = {}  # each in the order of arrival

    def __len__(self) -> int:
        return len(self._timers)

    def add(self, stranger: Stranger, address: str, patience_s: float) -> None:
        """Somebody waits from now on, for ``patience_s`` at most."""
        timer = asyncio.get_running_loop().call_later(patience_s, self._out_of_patience, stranger, patience_s)
        self._timers[stranger] = timer
        self._address_of[stranger] = address
        neighbours = self._by_address.setdefault(address, {})
        neighbours[stranger] = None
        if len(neighbours) > self._most_per_address:
            self._make_room(neighbours, f"more than {self._most_per_address} connections from {address}")
        elif len(self) > self._most:
            self._make_room(max(self._by_address.values(), key=len), f"more than {self._most} connections")

    def discard(self, stranger: Stranger) -> None:
        """It is known now, or gone."""
        timer = self._timers.pop(stranger, None)
        if timer is None:
            return
        timer.cancel()
        address = self._address_of.pop(stranger)
        del self._by_address[address][stranger]
        if not self._by_address[address]:
            del self._by_address[address]

    def _make_room(self, neighbours: dict[Stranger, None], why: str) -> None:
        oldest = next(iter(neighbours))
        self.discard(oldest)
        oldest.show_out(f"{why} wait unknown: the oldest makes room")

    def _out_of_patience(self, stranger: Stranger, patience_s: float) -> None:
        self.discard(stranger)
        stranger.show_out(f"nothing of use came within {patience_s:g} s")
