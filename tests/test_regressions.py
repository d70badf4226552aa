"""Mistakes that were once made, each in the smallest scene that shows it."""

import asyncio
import signal
import socket
import time
from contextlib import nullcontext
from itertools import count
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from test_transport import (
    LIMITS,
    NUM_SLOTS,
    PATIENCE_S,
    Decode,
    linked,
    pair,
    random_kv,
    send,
    send_damaged,
    serving,
    until,
)

from hmad.compute.device import PrefillResult, PrefillSequence
from hmad.compute.staging import StagingPool
from hmad.edges import node
from hmad.edges.metrics import Metrics
from hmad.edges.notify import Notifier
from hmad.edges.prefill_node import max_prompt_tokens, record
from hmad.facts.errors import ConfigError, LocalError, NonFiniteLogitsError, RemoteProtocolError, TransferAborted
from hmad.facts.formats import FORMATS, KVGeometry
from hmad.facts.requests import GenerationRequest
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad.facts.timeline import LayerTimes, Timeline
from hmad.roles.decode_engine import StepOutput
from hmad.roles.placement import Placement
from hmad.roles.prefill import Denial
from hmad.roles.prefill_engine import PrefillDone, PrefillEngine, PrefillListener
from hmad.roles.scheduler import plan_prefill
from hmad.transport import liveness
from hmad.transport.lease import Denied
from hmad.wire import messages as m

# --- the decode node ---


async def test_answer_without_a_tail_is_refused() -> None:
    """Its one decode step would have written KV into the first block of the next sequence of the batch."""
    async with pair() as p:
        with pytest.raises(Denied) as denied:
            await p.lease(4, max_tokens=1)
        assert denied.value.reason is m.DenyReason.BAD_REQUEST
        await p.lease(4, max_tokens=2)


async def test_every_prefill_node_hears_of_freed_slots_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the one whose transfer held them, and not only with the next heartbeat."""
    monkeypatch.setattr(liveness, "HEARTBEAT_S", 60.0)
    decode = Decode()
    async with serving(decode), linked(decode.port, formats=("bfp8",)) as one, linked(decode.port) as other:
        await until(lambda: one.usable and other.usable)
        message = m.Reserve(bytes(16), 0, "bfp8", 32, 1, m.Sampling(3, 0.0, 1.0, 0, 0.0, 0.0, 0.0, 1.0))
        lease = one.session.reserve(message, bytes(4 * 32), Timeline("r", 32, 0.0, 0.0))
        await asyncio.wait_for(lease.granted(), PATIENCE_S)
        await until(lambda: other.free_slots == decode.arena.free_slots < NUM_SLOTS)
        lease.close()
        await until(lambda: other.free_slots == NUM_SLOTS)


async def test_slots_that_the_engine_frees_late_are_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "HEARTBEAT_S", 60.0)
    async with pair() as p, linked(p.decode.port, formats=("bfp8",)) as other:
        await until(lambda: other.usable)
        lease = await p.lease(4)
        send(lease, random_kv(4))
        await p.commit(lease)
        await until(lambda: other.free_slots < NUM_SLOTS)
        p.link.session.close()  # the engine still has the sequence when the session ends
        await until(lambda: other.free_slots == NUM_SLOTS)


async def test_decode_node_counts_its_errors_by_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as p:
        lease = await p.lease(4)
        send_damaged(lease, monkeypatch)
        with pytest.raises(TransferAborted):
            await asyncio.wait_for(lease.next_token(), PATIENCE_S)
        p.link.session.send(m.Grant(bytes(16), 0, 1.0))  # not a prefill node's to send
        await until(lambda: p.decode.failures == ["digest_mismatch", "RemoteProtocolError"])


async def test_decode_node_tells_the_rate_of_a_transfer() -> None:
    async with pair(rate=2e6) as p:
        lease = await p.lease(8)
        send(lease, random_kv(8))
        await p.commit(lease)
        (rate,) = p.decode.rates
        assert 0 < rate < 3e6  # the cap bounds it from above; a busy machine makes it slower


async def test_one_choice_that_fails_costs_nobody_else_a_token() -> None:
    """A token of another choice used to be sent after the ABORT of both: an exception, and no token for anybody."""
    async with pair() as p:
        failing, other = await p.lease(4, num_choices=2), await p.lease(4)
        for lease in (failing, other):
            send(lease, random_kv(4, FORMATS[lease.format]))
        good, bad = await p.commit(failing, m.Choice(0, 1, 5), m.Choice(1, 2, 5))
        (neighbour,) = await p.commit(other)
        token = SampledToken(7)
        p.decode.role.deliver_from_engine(
            [
                StepOutput(good, 1, token, None),
                StepOutput(bad, 1, None, None, NonFiniteLogitsError("NaN")),
                StepOutput(neighbour, 1, token, None),
            ],
            [bad],
        )
        entry, _ = await asyncio.wait_for(other.next_token(), PATIENCE_S)
        assert entry.token_id == 7
        with pytest.raises(TransferAborted, match="NaN"):
            await asyncio.wait_for(failing.next_token(), PATIENCE_S)
        assert p.link.usable


def test_words_of_a_peer_are_no_command_to_the_supervisor() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind("")  # any abstract name
        supervisor.setblocking(False)
        notifier = Notifier({"NOTIFY_SOCKET": "@" + supervisor.getsockname()[1:].decode()})
        notifier.tell("STATUS=the decode node refuses: x\nWATCHDOG=trigger", "READY=1")
        notifier.close()
        assert supervisor.recv(1000).decode().split("\n") == [
            "STATUS=the decode node refuses: x WATCHDOG=trigger",
            "READY=1",
        ]


def test_denial_is_asked_about_again() -> None:
    """At once when slots came free, and after a while in any case: a LOAD does not tell all reasons."""
    denied = Denied(m.Deny(bytes(16), 0, m.DenyReason.FULL, "full", 1.0), free_slots=10)
    denial = Denial(denied, time.monotonic())
    assert denial.still_holds(10)
    assert not denial.still_holds(11)
    assert not Denial(denied, time.monotonic() - 2).still_holds(10)


# --- the prefill node ---


async def test_prompt_beyond_the_peers_limit_never_leaves() -> None:
    """Sent, it broke the session and every transfer on it, and again after each reconnection."""
    decode = Decode(limits=structs.replace(LIMITS, reserve_bytes=4 * 32))
    async with serving(decode), linked(decode.port) as link:
        await until(lambda: link.usable)
        for num_tokens, outcome in ((33, pytest.raises(Denied, match="33 tokens")), (32, nullcontext())):
            message = m.Reserve(bytes(16), 0, "fp32", num_tokens, 1, m.Sampling(3, 0.0, 1.0, 0, 0.0, 0.0, 0.0, 1.0))
            with outcome:
                lease = link.session.reserve(message, bytes(4 * num_tokens), Timeline("r", num_tokens, 0.0, 0.0))
                await asyncio.wait_for(lease.granted(), PATIENCE_S)
        assert decode.failures == []


def test_no_memory_for_a_history_costs_one_prompt_not_the_engine() -> None:
    long, short = (
        PrefillSequence(tuple(range(n)), SamplingParams(max_tokens=2), (0,), FORMATS["int8"]) for n in (96, 8)
    )
    done: SimpleQueue[PrefillDone] = SimpleQueue()
    engine = PrefillEngine(cast(Any, DeviceWithoutMemory()), 64, 1 << 20, PrefillListener(ignore, ignore, done.put))
    engine.submit(long)
    engine.submit(short)
    engine.start()
    assert [done.get(timeout=PATIENCE_S).sequence for _ in range(2)] == [long, short]
    engine.stop()
    assert isinstance(long.error, LocalError)
    assert short.error is None


class DeviceWithoutMemory:
    def new_history(self, num_tokens: int) -> None:
        raise MemoryError

    def prefill(self, chunks: Any, observer: Any) -> PrefillResult:
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
        return PrefillResult()


def ignore(*_: Any) -> None:
    pass


def placement(choices: tuple[int, ...] = (0,)) -> Placement:
    host = cast(Any, SimpleNamespace(vocab_size=100, transfer_after=False))
    request = GenerationRequest(
        "r", (1, 2), SamplingParams(max_tokens=3), (0, 1, 2), streamed=True, received_s=0.0, place=None
    )
    return Placement(host, request, choices, bytes(16), count(), Timeline("r", 2, 0.0, 0.0))


async def test_failed_prefill_has_no_first_token() -> None:
    failed = placement()
    failed.sequence.error = LocalError("broken")
    failed.prefilled(PrefillDone(failed.sequence, [], 5.0))
    assert failed.timeline.first_token_s is None


async def test_nobody_computes_on_for_a_transfer_that_has_ended() -> None:
    """A lease that ran out, or a decode node that died, while its prompt was computed."""
    abandoned = placement()
    submitted: list[Placement] = []
    cast(Any, abandoned._host).submit = submitted.append
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    abandoned.lease = cast(Any, SimpleNamespace(format="bf16", ended=ended))
    prefill = asyncio.create_task(abandoned._prefill())
    await asyncio.sleep(0)
    assert submitted == [abandoned]
    assert not abandoned.sequence.cancelled
    ended.set_exception(TransferAborted("lease_expired", "no KV came"))
    with pytest.raises(TransferAborted, match="no KV came"):
        await prefill
    assert abandoned.sequence.cancelled


async def test_choice_that_is_stopped_while_it_is_placed_again_never_decodes() -> None:
    """Its stop string came from the node that was lost, and was read late: it decoded to max_tokens, for nobody."""
    again = placement(choices=(1, 2))
    committed: list[m.Choice] = []
    again.lease = cast(Any, SimpleNamespace(commit=committed.extend))
    again.stop_choice(0)  # had finished before
    again.stop_choice(1)
    first_tokens = [SampledToken(7), SampledToken(8)]
    again.prefilled(PrefillDone(again.sequence, first_tokens, 5.0))
    assert committed == [m.Choice(1, seed=2, first_token=8)]
    assert [event.choice for event in again._first_events(first_tokens)] == [2]


async def test_token_outside_the_vocabulary_never_reaches_the_client() -> None:
    relay = placement()
    assert relay._token(m.TokenEntry(bytes(16), 0, 1, 99), b"").token_id == 99
    with pytest.raises(RemoteProtocolError, match="token 100"):
        relay._token(m.TokenEntry(bytes(16), 0, 1, 100), b"")


def test_bytes_of_a_transfer_cut_short_are_counted() -> None:
    layers = {0: LayerTimes(0.0, 1.0, 100, 1.0, 2.0, 2.0), 1: LayerTimes(1.0, 2.0, 50, 2.0)}
    timeline = Timeline("r", 4, 0.0, 0.0, peer="d:1", first_token_s=3.0, layers=layers)
    metrics = Metrics("prefill")
    record(timeline, metrics)
    sample = {"peer": "d:1", "direction": "sent"}
    assert metrics.registry.get_sample_value("hmad_link_bytes_total", sample) == 150
    assert metrics.registry.get_sample_value("hmad_kv_exposed_seconds_count") == 0


async def test_leases_of_a_lost_session_do_not_share_an_exception() -> None:
    """Every request that raises one adds its frames to the traceback of all."""
    async with pair() as p:
        leases = [await p.lease(2) for _ in range(2)]
        p.link.session.close()
        errors = await asyncio.gather(*(lease.next_token() for lease in leases), return_exceptions=True)
        assert errors[0] is not errors[1]
        assert str(errors[0]) == str(errors[1])


# --- both ---


async def test_signal_ends_a_node_that_still_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to load its weights to the end, open its ports and only then look."""
    handlers = []

    async def build(config: Any) -> Any:
        handlers.append(signal.getsignal(signal.SIGTERM))
        raise ConfigError("enough seen")

    monkeypatch.setattr(node, "build", build)
    with pytest.raises(ConfigError):
        await node.serve(cast(Any, None))
    assert handlers == [signal.SIG_DFL]


# --- transfer = after: a prompt that was let in found too few pages, and waited for one for ever ---


@settings(max_examples=300, deadline=None)
@given(batch=st.integers(1, 9), page=st.integers(1, 12), num_pages=st.integers(1, 90), history=st.integers(100, 1000))
def test_staging_holds_every_prompt_that_is_let_in(batch: int, page: int, num_pages: int, history: int) -> None:
    geometry = KVGeometry(3, 2, 64)
    fp32 = FORMATS["fp32"]
    pool = StagingPool(num_pages * page * geometry.block_bytes(fp32), page * geometry.block_bytes(fp32))
    config: Any = SimpleNamespace(
        precision="fp32", transfer="after", max_batch_tokens=32 * batch, history_bytes=3072 * history
    )
    sequence = PrefillSequence(
        range(max_prompt_tokens(config, geometry, pool)), SamplingParams(max_tokens=2), (0,), fp32
    )
    num_used = 0
    while sequence.num_remaining:
        [chunk] = plan_prefill([sequence], config.max_batch_tokens)
        num_used += geometry.num_layers * -(-fp32.num_blocks(chunk.num_tokens) // page)
        sequence.num_computed = chunk.end
    assert num_used <= num_pages
