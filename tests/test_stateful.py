"""The two tables of a session, joined by a wire that loses, repeats, reorders and alters frames as it likes.

Frame numbers and checksums (tests/test_frames.py) keep all of this from a real session; here nothing does. Whatever
comes, either side takes it or raises RemoteProtocolError, which ends the session; what is committed is exactly what P
sent, bit for bit and each piece in its place; every slot that was granted is given back once.
"""

import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import xxhash
from daemons import ROOT
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace
from test_transfers import IDS, Session, size

from hmad.facts.errors import RemoteProtocolError
from hmad.wire import messages as m
from hmad.wire.decode_transfers import LayerPlace, Outcome, Verdict
from hmad.wire.transfers import LayerKey, layer_key

Placement = tuple[bytes, int]  # transfer id, epoch
UNKNOWN_ID = b"?" * 16
ALTERABLE = (
    *(
        "transfer_id",
        "epoch",
        "first_layer",
        "num_layers",
        "first_block",
        "num_blocks",
        "first_head",
        "num_heads",
        "digest",
    ),
    *("num_frames", "root_digest", "num_choices", "num_prompt_tokens", "num_cached_tokens", "choice", "index"),
)
AT_LEAST_ONE = {"num_blocks", "num_heads", "num_choices", "num_prompt_tokens"}


class FaultySession(Session):
    """Both ends, and a wire that keeps a LAYER's bytes apart from its header: one may be altered without the other."""

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.num_faults = 0
        self.bytes_of: dict[int, bytes] = {}  # what a LAYER on its way carries, named by its digest; by id()
        self.kept: list[m.Layer] = []  # so that no id() is used twice
        self.sent: dict[Placement, dict[LayerKey, bytes]] = {}  # what P sent, and where it belongs
        self.landed: dict[Placement, dict[LayerKey, bytes]] = {}

    @property
    def queues(self) -> list[deque[Any]]:
        return [queue for queue in (self.to_d, self.to_p, *self.bulk) if queue]

    def p_sends_a_layer(self, transfer_id: bytes) -> None:
        plain = self.unsent[transfer_id].pop()
        told = f"{plain.transfer_id!r} {plain.epoch} {layer_key(plain)}"
        message = replace(plain, digest=xxhash.xxh3_128_digest(told.encode()))
        self.p.layer_sent(message)
        self.sent.setdefault((transfer_id, message.epoch), {})[layer_key(message)] = message.digest
        self.travel(message, message.digest)
        self.random.choice(self.bulk).append(message)

    def travel(self, message: m.Layer, content: bytes) -> None:
        self.bytes_of[id(message)] = content
        self.kept.append(message)

    def bulk_moves(self, channel: int) -> None:
        place = self.arriving[channel]
        if place is not None:
            self.arriving[channel] = None
            content = self.bytes_of[id(place.layer)]
            self.note(place, content)
            self.d_takes(self.d.layer_landed(place, content, self.now_s, self.now_s))
        else:
            message = self.bulk[channel].popleft()
            self.arriving[channel] = self.d.layer_destination(message, size(message), self.now_s)

    def note(self, place: LayerPlace, content: bytes) -> None:
        if not place.discard:
            landed = self.landed.setdefault((place.layer.transfer_id, place.layer.epoch), {})
            landed[layer_key(place.layer)] = content

    def d_takes(self, outcome: Outcome) -> None:
        if outcome.verdict is Verdict.READY and outcome.transfer is not None:
            placement = (outcome.transfer.transfer_id, outcome.transfer.epoch)
            assert self.landed[placement] == self.sent[placement]
        super().d_takes(outcome)

    def d_sends_token(self, message: m.TokenEntry) -> None:
        self.d.token(message)
        self.to_p.append(m.Tokens((message,)))

    def check(self) -> None:
        self.terminals.clear()  # a RESERVE that is repeated after its transfer was forgotten is taken for a new one
        super().check()

    def duplicate_is_refused(self, message: m.AnyMessage) -> None:
        """Here duplicates are the wire's doing."""

    def break_off(self) -> None:
        """The session has ended: everything that was granted comes back, once."""
        self.p.close()
        for transfer in self.d.close():
            self.released[transfer.transfer_id, transfer.epoch] += 1
        assert self.released == self.granted


class Wire(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 1 << 32))
    def opens(self, seed: int) -> None:
        self.random = Random(seed)
        self.session = FaultySession(self.random)

    @rule(num_moves=st.integers(1, 50))
    def goes_on(self, num_moves: int) -> None:
        """Anything that may happen next at either end, several times."""
        with self.faults_may_be_noticed():
            for _ in range(num_moves):
                self.random.choice(self.session.moves())()
                self.session.check()

    @precondition(lambda self: self.session.queues)
    @rule(which=st.integers(0, 3), at=st.integers(0, 1 << 16), fault=st.sampled_from(["lose", "repeat", "reorder"]))
    def frame_goes_astray(self, which: int, at: int, fault: str) -> None:
        queue = self.session.queues[which % len(self.session.queues)]
        self.session.num_faults += 1
        frame = queue[at % len(queue)]
        if fault != "repeat":
            queue.remove(frame)
        if fault != "lose":
            queue.append(frame)

    @precondition(lambda self: self.session.queues)
    @rule(
        which=st.integers(0, 3),
        field=st.integers(0, 1 << 16),
        up=st.booleans(),
        id_=st.sampled_from((*IDS, UNKNOWN_ID)),
    )
    def frame_is_altered(self, which: int, field: int, up: bool, id_: bytes) -> None:
        queue = self.session.queues[which % len(self.session.queues)]
        self.session.num_faults += 1
        frame = queue.popleft()
        altered = alter(frame, field, up, id_)
        if isinstance(frame, m.Layer):
            self.session.travel(altered, self.session.bytes_of[id(frame)])
        queue.appendleft(altered)

    @precondition(lambda self: self.session.queues)
    @rule(which=st.integers(0, 3))
    def bytes_are_damaged(self, which: int) -> None:
        """Of a LAYER; its header is as it was."""
        queue = self.session.queues[which % len(self.session.queues)]
        if isinstance(queue[0], m.Layer):
            self.session.num_faults += 1
            altered = replace(queue.popleft())
            self.session.travel(altered, b"damaged.damaged.")
            queue.appendleft(altered)

    @precondition(lambda self: any(len(queue) > 1 for queue in self.session.bulk))
    @rule(with_digests=st.booleans())
    def bytes_change_places(self, with_digests: bool) -> None:
        """Of two LAYERs; with their digests, only the root digest can tell."""
        queue = max(self.session.bulk, key=len)
        first, second = queue[0], queue[-1]
        self.session.num_faults += 1
        for at, frame, other in ((0, first, second), (-1, second, first)):
            queue[at] = replace(frame, digest=other.digest if with_digests else frame.digest)
            self.session.travel(queue[at], self.session.bytes_of[id(other)])

    @invariant()
    def both_tables_are_sound(self) -> None:
        if hasattr(self, "session"):
            self.session.check()

    def teardown(self) -> None:
        if hasattr(self, "session"):
            self.session.break_off()

    @contextmanager
    def faults_may_be_noticed(self) -> Iterator[None]:
        """A refusal ends the session, and only a fault may be refused."""
        try:
            yield
        except RemoteProtocolError:
            assert self.session.num_faults
            self.session.break_off()
            self.session = FaultySession(self.random)


def alter(message: Any, field: int, up: bool, id_: bytes) -> Any:
    """One field says something else."""
    if isinstance(message, m.Tokens):
        return m.Tokens((alter(message.entries[0], field, up, id_), *message.entries[1:]))
    names = [name for name in ALTERABLE if hasattr(message, name)]
    name = names[field % len(names)]
    value = getattr(message, name)
    if isinstance(value, bytes):
        return replace(message, **{name: id_ if name == "transfer_id" else bytes(16)})
    return replace(message, **{name: max(name in AT_LEAST_ONE, value + (1 if up else -1))})


TestWire = Wire.TestCase
TestWire.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("target", ["frames", "transfers", "session"])
def test_a_short_run_of_the_fuzzer(target: str, tmp_path: Path) -> None:
    """``scripts/fuzz`` runs, and finds nothing at once; to look for longer is for a person or a nightly job."""
    pytest.importorskip("atheris")  # has no wheels for some machines
    command = [sys.executable, str(ROOT / "scripts" / "fuzz"), "--target", target, "--seconds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Done" in done.stderr
