"""Between real daemons, every fault that a network or a mistaken peer can make (tests/fault_proxy.py).

After each: the answers were the fault-free ones or typed errors, and soon; the other prefill node of the same decode
node was not disturbed; the next requests work without anyone's help; and nothing is left behind.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from daemons import Answer, DecodeDaemon, PrefillDaemon, running, wait_for
from fault_proxy import Fault, FaultProxy, Frame, Often, Once, Plan, To, no_faults

from hmad.wire.messages import FrameType

HANG_S = 20.0  # silence is noticed after 1.5 s: an answer that takes so long would never have come
PROMPTS = [list(range(number, 120 + 20 * number)) for number in range(4)]
# Greedy. The penalty makes the tokens depend on the prompt's ids in RESERVE; logprobs are what TOKENS carries besides.
ASKED: dict[str, Any] = {"max_tokens": 24, "repetition_penalty": 1.2, "logprobs": 1}
# All nodes compute in float32, so that no answer depends on which requests happen to share a batch: rows of bfloat16
# round otherwise in another one, on CPUs without units for it.
EXACT: dict[str, Any] = {"precision": "fp32"}
BATCH_NOISE = 1e-3  # far above what float32 leaves
TYPED = {"decode_node_failed", "no_decode_node", "no_capacity"}


class Watch:
    """A plan around another: takes note of what was committed while it was in force."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.committed: set[tuple[bytes, int]] = set()

    def __call__(self, frame: Frame) -> Fault | None:
        if frame.type is FrameType.COMMITTED:
            self.committed.add(frame.placement)
        return self._plan(frame)


@dataclass
class Cluster:
    """A decode node, a prefill node that reaches it through the proxy, and one that reaches it directly."""

    decode: DecodeDaemon
    prefill: PrefillDaemon
    proxy: FaultProxy
    clients: ThreadPoolExecutor
    expected: tuple[Any, ...] = ()
    slowest_s: float = 0.0

    def ask(self, num_prompts: int = len(PROMPTS)) -> list[Future[Answer]]:
        """Several prompts at once."""
        return [self.clients.submit(self.prefill.complete, prompt, **ASKED) for prompt in PROMPTS[:num_prompts]]

    def check(self, answers: list[Future[Answer]]) -> int:
        """Each is right or a typed error. How many failed."""
        given = [answer.result(HANG_S) for answer in answers]
        failed = [answer for answer in given if answer.status != 200]
        assert {answer.json["error"]["code"] for answer in failed} <= TYPED, [answer.body for answer in failed]
        pairs = zip(given, self.expected, strict=False)  # maybe only the first prompts were asked
        assert [(a.body, choice) for a, choice in pairs if a.status == 200 and not same(essence(a), choice)] == []
        return len(failed)

    def suffer(self, plan: Plan) -> set[tuple[bytes, int]]:
        """A plan is in force until all answers are there. Returns the placements that were committed meanwhile."""
        watch = self.proxy.plan = Watch(plan)
        try:
            self.check(self.ask())
        finally:
            self.proxy.plan = no_faults
        if isinstance(plan, Once):
            self.slowest_s = max(self.slowest_s, time.monotonic() - plan.struck_s)
        self.works()
        return watch.committed

    def works(self) -> None:
        """Soon, and without anyone's help; and nothing is left of what was."""
        self.prefill.wait_until("/health")
        assert self.check(self.ask(2)) == 0
        self.decode.wait_until_empty()
        wait_for(lambda: self.staging["free_pages"] == self.staging["total_pages"], lambda: str(self.staging))

    @property
    def staging(self) -> dict[str, int]:
        staging: dict[str, int] = self.prefill.status["staging"]
        return staging

    @property
    def num_files(self) -> list[int]:
        """Open files of the two nodes."""
        return [len(os.listdir(f"/proc/{daemon.pid}/fd")) for daemon in (self.decode, self.prefill)]


Essence = tuple[list[int], list[float]]


def essence(answer: Answer) -> Essence:
    """What must not depend on any fault: tokens and their logprobs."""
    [choice] = answer.choices
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def same(one: Essence, other: Essence) -> bool:
    """The same tokens, and logprobs as far as the shape of a batch cannot change them."""
    return one[0] == other[0] and one[1] == pytest.approx(other[1], rel=0, abs=BATCH_NOISE)


class Neighbour:
    """Asks the other prefill node again and again; every answer must be the same."""

    def __init__(self, prefill: PrefillDaemon) -> None:
        self._ask = lambda: prefill.complete(PROMPTS[0], **ASKED).choices[0]["token_ids"]
        self._expected = self._ask()
        self._stop = threading.Event()
        self.num_right = 0
        self.wrong: list[object] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            try:
                tokens = self._ask()
            except (AssertionError, OSError) as error:
                self.wrong.append(error)
                continue
            self.num_right += tokens == self._expected
            self.wrong += [tokens] * (tokens != self._expected)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model: Path = tmp_path_factory.mktemp("model")
    write_checkpoint(model, head_dim=64)
    decode = DecodeDaemon(model, **EXACT)
    with FaultProxy(decode.stream_port) as proxy, ThreadPoolExecutor(len(PROMPTS)) as clients:
        prefill = PrefillDaemon(model, [proxy], frame_bytes="10K", staging_bytes="1M", **EXACT)
        other = PrefillDaemon(model, [decode], **EXACT)
        with running(decode, prefill, other):
            cluster = Cluster(decode, prefill, proxy, clients)
            cluster.expected = tuple(essence(answer.result()) for answer in cluster.ask())
            num_files = cluster.num_files
            neighbour = Neighbour(other)
            try:
                yield cluster
            finally:
                neighbour.stop()
            print(f"slowest answer after a fault: {cluster.slowest_s:.1f} s")
            assert neighbour.wrong == []
            assert neighbour.num_right > 0
            assert all(now <= before + 2 for now, before in zip(cluster.num_files, num_files, strict=True))


RESERVE, GRANT, LAYER = FrameType.RESERVE, FrameType.GRANT, FrameType.LAYER
COMMIT, COMMITTED, TOKENS = FrameType.COMMIT, FrameType.COMMITTED, FrameType.TOKENS
FAULTS_THAT_COST = [
    *(("flip_prefix", kind) for kind in (RESERVE, LAYER)),
    *(("flip_header", kind) for kind in (GRANT, LAYER, COMMIT, TOKENS)),
    *(("flip_payload", kind) for kind in (RESERVE, TOKENS)),
    *(("cut", kind) for kind in (RESERVE, LAYER, COMMIT, TOKENS)),
    *(("reset", kind) for kind in (LAYER, COMMITTED)),
    *(("stall", kind) for kind in (LAYER, TOKENS)),
    *(("drop", kind) for kind in (RESERVE, GRANT, LAYER, COMMIT, COMMITTED, TOKENS)),
    *(("duplicate", kind) for kind in (LAYER, COMMIT, TOKENS)),
    *(("reorder", kind) for kind in (LAYER, TOKENS)),
    *(("replay", kind) for kind in (COMMIT, TOKENS)),
    *(("lengthen", LAYER), ("shorten", RESERVE), ("lengthen", TOKENS), ("lie_drop", TOKENS)),
    *(("lie_duplicate", kind) for kind in (RESERVE, LAYER, COMMIT)),
    *(("lie_replay", kind) for kind in (LAYER, COMMITTED)),
    *((f"forge_{what}", LAYER) for what in ("layer", "more_layers", "block", "far_block", "heads", "epoch", "id")),
    *((f"forge_{what}", COMMIT) for what in ("fewer_frames", "epoch", "id")),
]


@pytest.mark.parametrize(("fault", "frame_type"), FAULTS_THAT_COST)
def test_fault(cluster: Cluster, fault: str, frame_type: FrameType) -> None:
    """One frame of many: some requests may pay with an error, none with a wrong token."""
    plan = Once(fault, frame_type, after=2)
    cluster.suffer(plan)
    assert plan.struck is not None


DAMAGE = [
    *((fault, LAYER) for fault in ("flip_payload", "swap", "swap_and_digest", "forge_digest", "lie_drop")),
    *(("forge_root", COMMIT), ("forge_more_frames", COMMIT)),
]


@pytest.mark.parametrize(("fault", "frame_type"), DAMAGE)
def test_damaged_kv_is_never_committed(cluster: Cluster, fault: str, frame_type: FrameType) -> None:
    plan = Once(fault, frame_type, after=2)
    committed = cluster.suffer(plan)
    assert plan.struck is not None
    assert plan.struck.placement not in committed


@pytest.mark.parametrize("frame_type", [RESERVE, LAYER, COMMIT, TOKENS])
def test_delay_costs_nobody_anything(cluster: Cluster, frame_type: FrameType) -> None:
    plan = cluster.proxy.plan = Once("delay", frame_type, after=2)
    assert cluster.check(cluster.ask()) == 0
    assert plan.struck is not None
    cluster.works()


def test_storm(cluster: Cluster) -> None:
    """Fault upon fault, of every kind that a network can make."""
    kinds = ("flip_prefix", "flip_header", "flip_payload", "cut", "reset", "drop", "duplicate", "reorder", "delay")
    storm = Often(seed=7, every=60, faults=kinds)
    for _ in range(5):
        cluster.suffer(storm)
    assert storm.num_struck > 3


@pytest.mark.parametrize("directions", [(), (To.DECODE,), (To.PREFILL,)], ids=["both", "to decode", "to prefill"])
def test_black_hole(cluster: Cluster, directions: tuple[To, ...]) -> None:
    """In the midst of decoding. Nobody closes anything, and still both ends let go and find each other again."""
    answers = cluster.ask()
    wait_for(lambda: cluster.decode.used_slots > 0)
    cluster.proxy.black_hole(*directions)
    try:
        cluster.decode.wait_until_empty()
    finally:
        cluster.proxy.heal()
    cluster.check(answers)
    cluster.works()


def test_short_black_hole_costs_nobody_anything(cluster: Cluster) -> None:
    answers = cluster.ask()
    cluster.proxy.black_hole()
    time.sleep(0.5)
    cluster.proxy.heal()
    assert cluster.check(answers) == 0
    cluster.works()
