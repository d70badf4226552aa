"""Health that tells the truth: engines that hang or die, what a supervisor hears of it, and what clients get."""

import asyncio
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from daemons import Daemon, DecodeDaemon, PrefillDaemon, running, wait_for

from hmad.compute.batch import DecodeBatch
from hmad.compute.device import (
    KVHistory,
    LayerClock,
    Outcomes,
    PrefillChunk,
    PrefillObserver,
    PrefillResult,
    PrefillSequence,
)
from hmad.compute.sequence import DecodeSequence
from hmad.compute.staging import StagingPool
from hmad.edges.health import Health, keep_looking
from hmad.edges.metrics import Metrics
from hmad.edges.node import report_unhandled
from hmad.edges.notify import Notifier
from hmad.facts.errors import LocalError
from hmad.facts.formats import FORMATS
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad.roles.decode_engine import DecodeEngine, StepOutput
from hmad.roles.engine import LONGEST_PATIENCE_S, SHORTEST_PATIENCE_S, Engine, Patience
from hmad.roles.prefill_engine import PrefillDone, PrefillEngine, PrefillListener

HANG_S = 10.0  # far above what anything here takes

# --- how long is too long ---


def test_patience_follows_what_the_work_has_taken() -> None:
    patience = Patience()
    assert patience.limit_s(1) == LONGEST_PATIENCE_S  # nothing is known: the first layer of a large model may take long
    patience.learn(0.001, num_units=1)
    assert patience.limit_s(1) == SHORTEST_PATIENCE_S < 2
    assert patience.limit_s(2048) == pytest.approx(4 * 2.048)  # so long may a batch of 2048 tokens take
    patience.learn(2.0, num_units=1)
    assert patience.limit_s(1) == pytest.approx(8)
    assert patience.limit_s(64) == LONGEST_PATIENCE_S
    for _ in range(300):
        patience.learn(0.001, num_units=1)
    assert patience.limit_s(1) == SHORTEST_PATIENCE_S


# --- engines, with devices that do as they are told ---


class ToldDevice:
    """Both kinds of device: computes nothing, and waits before every call while ``go`` is clear."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()

    def new_history(self, num_tokens: int) -> KVHistory:
        raise NotImplementedError

    def prefill(self, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> PrefillResult:
        observer.layers_computed(LayerClock(range(1), time.monotonic(), time.monotonic()))
        assert self.go.wait(HANG_S)
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
        return PrefillResult({c.sequence: [SampledToken(7)] for c in chunks})

    runs_ahead = False

    def launch(self, batch: DecodeBatch) -> Callable[[], Outcomes]:
        assert self.go.wait(HANG_S)
        return lambda: Outcomes.of([SampledToken(1) for _ in batch.sequences])


def prompt() -> PrefillSequence:
    return PrefillSequence(range(5), SamplingParams(max_tokens=4), (0,), None)


def choice(max_tokens: int) -> DecodeSequence:
    empty = np.zeros(64, np.int32)
    return DecodeSequence(empty, SamplingParams(max_tokens=max_tokens), 0, (), FORMATS["bf16"], empty, [0])


def prefill_engine(device: ToldDevice, done: Queue[PrefillDone], **options: Any) -> PrefillEngine:
    listener = PrefillListener(lambda blocks: None, lambda chunks, clock: None, done.put)
    return PrefillEngine(device, 64, 1 << 20, listener, **options)


def stop(engine: Engine) -> None:
    engine.stop()
    assert engine.join(HANG_S)


class BurstDevice(ToldDevice):
    """Tells of all layers at the end, when each took ``LAYER_S``."""

    LAYER_S = 0.01
    NUM_LAYERS = 36

    def prefill(self, chunks: Sequence[PrefillChunk], observer: PrefillObserver) -> PrefillResult:
        begin_s = time.monotonic()
        threading.Event().wait(self.NUM_LAYERS * self.LAYER_S)
        for layer_id in range(self.NUM_LAYERS):
            ready_s = begin_s + (layer_id + 1) * self.LAYER_S
            observer.layers_computed(LayerClock(range(layer_id, layer_id + 1), ready_s - self.LAYER_S, ready_s))
        return super().prefill(chunks, observer)


def test_signs_of_progress_in_a_burst_do_not_make_patient() -> None:
    """Four times 0.36 s for 5 tokens would be 18 s for 64."""
    device, done = BurstDevice(), Queue[PrefillDone]()
    engine = prefill_engine(device, done)
    engine.start()
    engine.submit(prompt())
    done.get(timeout=HANG_S)
    stop(engine)
    assert engine._patience.limit_s(64) < 9


def test_a_hung_prefill_engine_is_noticed_and_forgiven() -> None:
    device, done = ToldDevice(), Queue[PrefillDone]()
    engine = prefill_engine(device, done)
    engine.start()
    engine.submit(prompt())
    done.get(timeout=HANG_S)
    assert engine.trouble is None
    device.go.clear()
    engine.submit(prompt())
    trouble = wait_for(lambda: engine.trouble)
    assert re.fullmatch(
        r"the prefill engine has made no progress for 1\.\d s, longer than the 1\.5 s that its work may take", trouble
    )
    device.go.set()
    done.get(timeout=HANG_S)
    assert engine.trouble is None
    stop(engine)


def test_a_hung_decode_engine_is_noticed() -> None:
    device, steps = ToldDevice(), Queue[Iterable[StepOutput]]()
    engine = DecodeEngine(device, 8, lambda outputs, left: steps.put(outputs))
    engine.start()
    engine.join_batch([choice(3)])
    steps.get(timeout=HANG_S)
    device.go.clear()
    engine.join_batch([choice(3)])
    assert "the decode engine has made no progress" in wait_for(lambda: engine.trouble)
    device.go.set()
    wait_for(lambda: engine.num_running == engine.num_waiting == 0)
    assert engine.trouble is None
    stop(engine)


def test_waiting_for_the_wire_is_no_hang() -> None:
    staging = StagingPool(64, 64)
    page = staging.acquire()
    assert not staging.is_waited_for
    with ThreadPoolExecutor(1) as engine_thread:
        second = engine_thread.submit(staging.acquire)
        wait_for(lambda: staging.is_waited_for)
        staging.release(page)
        second.result(HANG_S)
    assert not staging.is_waited_for

    waits = threading.Event()
    device, done = ToldDevice(), Queue[PrefillDone]()
    engine = prefill_engine(device, done, waits_for_wire=waits.is_set)
    engine.start()
    engine.submit(prompt())
    done.get(timeout=HANG_S)
    waits.set()
    device.go.clear()
    engine.submit(prompt())
    time.sleep(SHORTEST_PATIENCE_S + 0.3)
    assert engine.trouble is None
    waits.clear()
    assert engine.trouble is not None
    device.go.set()
    done.get(timeout=HANG_S)
    stop(engine)


def test_a_dead_prefill_engine_fails_what_it_has_and_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    done, died = Queue[PrefillDone](), threading.Event()
    engine = prefill_engine(ToldDevice(), done)
    engine.on_death = died.set
    monkeypatch.setattr(engine, "_affordable", lambda chunks: chunks.nothing_of_the_kind)
    engine.submit(prompt())
    engine.start()
    assert died.wait(HANG_S)
    assert engine.trouble is not None
    assert engine.trouble.startswith("the prefill engine died: AttributeError: ")
    for submit in (lambda: None, lambda: engine.submit(prompt())):
        submit()
        failed = done.get(timeout=HANG_S)
        assert (failed.first_tokens, failed.sequence.error) == ([], engine.failure)
    assert engine.backlog_tokens == 0
    stop(engine)


def test_a_dead_decode_engine_fails_what_it_has_and_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, died = Queue[Iterable[StepOutput]](), threading.Event()
    engine = DecodeEngine(ToldDevice(), 1, lambda outputs, left: steps.put(outputs))
    engine.on_death = died.set
    running_, waiting = choice(1 << 20), choice(1 << 20)  # longer than it takes to break the engine
    engine.join_batch([running_, waiting])
    engine.start()
    steps.get(timeout=HANG_S)
    monkeypatch.setattr(engine, "_compose", lambda: {}["nothing"])
    assert died.wait(HANG_S)
    failed: list[DecodeSequence] = []
    while not failed:
        failed = [output.sequence for output in steps.get(timeout=HANG_S) if output.error is engine.failure]
    assert failed == [running_, waiting]
    late = choice(3)
    engine.join_batch([late])
    assert [output.sequence for output in steps.get(timeout=HANG_S)] == [late]
    assert isinstance(engine.failure, LocalError)
    stop(engine)


# --- the node's verdict, and who hears of it ---


async def test_health_says_since_when() -> None:
    verdict = [True, "fine"]
    health = Health(lambda: (bool(verdict[0]), str(verdict[1])))
    first = health.describe()
    assert (first["status"], first["reason"]) == ("ok", "fine")
    health._since_s = 0.0  # long ago
    verdict[1] = "still fine"
    assert health.describe()["since"] == "1970-01-01T00:00:00Z"
    verdict[:] = False, "no peer"
    now = health.describe()
    assert (now["status"], now["reason"]) == ("unhealthy", "no peer")
    assert now["since"] > first["since"][:4]


class Supervisor:
    """The other end of NOTIFY_SOCKET: collects what it is told."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.told: list[str] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while (message := self._socket.recv(4096)) != b"end":
            self.told += message.decode().splitlines()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other_end:
            other_end.sendto(b"end", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Supervisor]:
    path = tmp_path / "notify"
    supervisor = Supervisor(str(path) if request.param == "path" else f"@{path}")
    yield supervisor
    supervisor.close()


async def test_the_watchdog_starves_with_the_engine(supervisor: Supervisor) -> None:
    environment = {"NOTIFY_SOCKET": supervisor.address, "WATCHDOG_USEC": "60000"}
    notifier = Notifier(environment)
    assert (environment, notifier.watchdog_s) == ({}, 0.06)
    trouble: list[str | None] = [None]
    task = asyncio.create_task(keep_looking(lambda: (False, "no decode node"), lambda: trouble[0], notifier))
    await asyncio.sleep(0.2)
    assert supervisor.told.count("WATCHDOG=1") >= 2  # a missing peer is no reason to be restarted
    assert supervisor.told.count("STATUS=no decode node") == 1
    trouble[0] = "hangs"
    await asyncio.sleep(0.05)
    supervisor.told.clear()
    await asyncio.sleep(0.2)
    assert supervisor.told == []
    task.cancel()
    notifier.close()


def test_nobody_listens(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    silent = Notifier({})
    silent.tell("READY=1")
    silent.close()
    assert caplog.records == []
    forsaken = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"})
    assert forsaken.watchdog_s is None  # that of another process
    forsaken.tell("READY=1")
    forsaken.close()
    assert [record.getMessage() for record in caplog.records] == ["the supervisor cannot be told"]


async def test_what_nobody_handles_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics("decode")
    loop = asyncio.get_running_loop()
    report_unhandled(loop, metrics)
    loop.call_soon(lambda: 1 // 0)
    await asyncio.sleep(0.01)
    assert metrics.registry.get_sample_value("hmad_errors_total", {"cause": "unhandled"}) == 1
    assert [bool(record.exc_info) for record in caplog.records if record.name == "hmad.edges.node"] == [True]


# --- real nodes ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, num_kv_heads=2, head_dim=64, max_positions=2048)
    return directory


class FaultyDecode(DecodeDaemon):
    program = (str(Path(__file__).parent / "faulty_node.py"),)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)


def watched(monkeypatch: pytest.MonkeyPatch, supervisor: Supervisor, daemon: Daemon) -> None:
    """Start a daemon as a supervisor does."""
    monkeypatch.setenv("NOTIFY_SOCKET", supervisor.address)
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    daemon.start()
    monkeypatch.delenv("NOTIFY_SOCKET")
    monkeypatch.delenv("WATCHDOG_USEC")


def last_event(daemon: Daemon, max_tokens: int) -> bytes:
    with daemon.stream(prompt=[1, 2, 3], max_tokens=max_tokens, ignore_eos=True) as lines:
        return [line for line in lines if line.strip()][-1]


def test_a_pair_under_supervision(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As systemd sees it: ready, pings, words; then the decode node hangs: silence, a reason, stacks at the abort."""
    of_prefill, of_decode = Supervisor(str(tmp_path / "notify")), Supervisor(f"@{tmp_path}/notify")
    decode = FaultyDecode(model)
    prefill = PrefillDaemon(model, [decode])
    try:
        watched(monkeypatch, of_prefill, prefill)
        wait_for(lambda: "READY=1" in of_prefill.told, lambda: prefill.log)  # or two machines would wait for each other
        wait_for(lambda: any(decode.peer in status for status in statuses(of_prefill)))
        assert prefill.status["health"]["status"] == "unhealthy"
        watched(monkeypatch, of_decode, decode)
        wait_for(lambda: "READY=1" in of_decode.told, lambda: decode.log)
        assert decode.get("/health").status == 200  # at once: ready means that it serves
        assert statuses(of_decode)[0] == "loading the model"
        prefill.wait_until("/health")
        assert last_event(prefill, 20) == b"data: [DONE]\n"
        wait_for(lambda: "WATCHDOG=1" in of_decode.told)
        hang(decode, prefill, of_decode)
        prefill.wait_until("/health", 503)
        prefill.stop()
        assert of_prefill.told.count("STOPPING=1") == 1
        assert "serving: the prefill engine makes progress, a decode node is connected" in statuses(of_prefill)
        assert "WATCHDOG=1" in of_prefill.told
    finally:
        prefill.kill()
        decode.kill()
        of_prefill.close()
        of_decode.close()


def statuses(supervisor: Supervisor) -> list[str]:
    return [line.removeprefix("STATUS=") for line in supervisor.told if line.startswith("STATUS=")]


def hang(decode: FaultyDecode, prefill: PrefillDaemon, supervisor: Supervisor) -> None:
    assert decode.status["health"]["status"] == "ok"
    decode.send(signal.SIGUSR1)
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(last_event, prefill, 1000)
        reason = decode.wait_until("/health", 503).json["reason"]
        noticed = re.fullmatch(
            r"the decode engine has made no progress for (\S+) s, longer than the (\S+) s .*", reason
        )
        assert noticed is not None
        assert float(noticed[2]) < 2
        assert decode.status["health"]["reason"].startswith("the decode engine has made no progress for")
        wait_for(lambda: statuses(supervisor)[-1].startswith("the decode engine"))
        supervisor.told.clear()
        time.sleep(0.7)  # more than two pings
        assert "WATCHDOG=1" not in supervisor.told
        decode.send(signal.SIGABRT)  # as a watchdog does
        assert decode.end() == -signal.SIGABRT
        assert b"decode_node_failed" in answer.result(HANG_S)
    assert "faulty_node.py" in decode.log  # where each thread was


def test_a_node_whose_engine_dies(model: Path) -> None:
    """It fails its requests, says why, and ends with a code that makes a supervisor start it again."""
    decode = FaultyDecode(model)
    prefill = PrefillDaemon(model, [decode])
    try:
        decode.start()
        with running(prefill, healthy=False):
            prefill.wait_until("/health")
            assert last_event(prefill, 20) == b"data: [DONE]\n"
            decode.send(signal.SIGUSR2)
            assert b'"error"' in last_event(prefill, 1000)
            assert decode.end() == 1
            assert '"event": "the engine died"' in decode.log
            assert 'KeyError: \\"a bug in the engine\'s books\\"' in decode.log
            prefill.wait_until("/health", 503)
            assert prefill.status["health"]["status"] == "unhealthy"
    finally:
        decode.kill()
