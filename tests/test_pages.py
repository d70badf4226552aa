"""The pages for people: what they say, that they escape what comes from outside, and that a real browser draws them."""

import json
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from daemons import DecodeDaemon, PrefillDaemon, running

from hmad.edges.metrics import Metrics
from hmad.edges.status_page import percentile, status_page
from hmad.edges.timeline_page import timeline_page
from hmad.edges.timeline_trace import chrome_trace
from hmad.facts.timeline import FrameSpan, LayerTimes, Spans, Timeline

NUM_LAYERS = 4
PROMPT = [i % 250 for i in range(600)]
EVIL = "<script>alert('x')</script>&\""
CHROMIUM = shutil.which("chromium")
BROWSER_S = 60


class Tags(HTMLParser):
    """The tags of a document that opens and closes them in order."""

    VOID = ("meta", "rect", "line")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in self.VOID or tag == "rect":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def timeline(**changes: object) -> Timeline:
    """Two layers of 10 ms; the first is on the wire while the second computes, the second for 4 ms too long."""
    spans = Spans()
    spans.computed(range(1), 1.000, 1.002)
    spans.computed(range(1, 2), 1.010, 1.012)
    spans.compute_ended(1.020)
    spans.frames.append(FrameSpan(0, 1, 0, 3, 900, 1.003, 1.004, 1.005, 1.0085, 1.009))
    spans.frames.append(FrameSpan(1, 1, 0, 3, 900, 1.013, 1.014, 1.015, 1.0235, 1.024))
    spans.token(0, 1.021)
    layers = {
        0: LayerTimes(1.000, 1.002, 900, 1.004, 1.0085, 1.009),
        1: LayerTimes(1.010, 1.012, 900, 1.014, 1.0235, 1.024),
    }
    known = {
        **{"kv_format": "int8", "peer": "10.0.0.2:7700", "granted_s": 0.995, "prefill_started_s": 1.0},
        **{"first_token_s": 1.020, "committed_s": 1.025, "finished_s": 1.1, "num_output_tokens": 7},
    }
    return Timeline("ab12", 90, 0.980, 0.990, layers=layers, spans=spans, **{**known, **changes})


def test_timeline_page_tells_what_was_hidden_and_what_was_exposed() -> None:
    page = timeline_page(timeline())
    assert Tags(page).seen >= {"svg", "rect", "table"}
    for text in ("Request ab12", "40.0 ms", "5.0 ms", "80.0 %", "4.0 ms", "1.8 KiB", "int8 to 10.0.0.2:7700"):
        assert text in page
    assert page.count('fill="var(--compute') == 2
    assert page.count('fill="var(--wire') == 2
    assert page.count('fill="var(--exposed)"') == 1


def test_layers_in_one_frame_are_one_bar() -> None:
    """As a short prompt's leave a GPU."""
    told = timeline()
    frame = FrameSpan(0, 2, 0, 3, 1024, 1.013)
    told.spans.frames[:] = [frame]
    told.layers = {layer_id: LayerTimes(1.0, 1.002) for layer_id in range(2)}
    frame.sent_s = 1.014
    told.frame_sent(frame)
    told.frame_landed(frame.layers, 1.0235, 1.024)
    assert [layer.wire_bytes for layer in told.layers.values()] == [512, 512]
    page = timeline_page(told)
    assert page.count('fill="var(--wire') == 1
    assert page.count('fill="var(--exposed)"') == 1
    assert "layers 0..1: 1.0 KiB in 10.0 ms" in page
    assert ">0..1</text>" in page
    names = {event["name"] for event in chrome_trace(told)["traceEvents"] if event["ph"] == "X"}
    assert "layers 0..1, blocks 0..2" in names


def test_layers_that_are_computed_at_once_are_one_bar() -> None:
    """As a short prompt's are on a GPU."""
    told, run = timeline(), range(2, 8)
    told.spans.compute_ended(1.020)
    told.spans.computed(run, 1.020, 1.028)
    told.spans.compute_ended(1.030)
    page = timeline_page(told)
    assert page.count('fill="var(--compute') == 3
    assert "layers 2..7: 10.0 ms" in page
    assert ">2..7</text>" in page
    (span,) = (event for event in chrome_trace(told)["traceEvents"] if event["name"] == "layers 2..7")
    assert (span["ts"], span["dur"]) == (40_000, 10_000)
    assert span["args"] == {"layer": 2, "layers": 6, "kv_ready_ms": 8.0}


def test_timeline_page_of_a_request_that_broke_early() -> None:
    page = timeline_page(Timeline("ab12", 90, 0.98, 0.99))
    assert "ended before its prompt was computed" in page
    Tags(page)


def test_pages_escape_what_comes_from_outside() -> None:
    page = timeline_page(timeline(peer=EVIL, kv_format=EVIL))
    assert "script" not in Tags(page).seen
    row = {"address": EVIL, "usable": False, "format": EVIL, "free_slots": 0, "trouble": EVIL}
    status = {"node_id": EVIL, "role": EVIL, "version": EVIL, "precision": EVIL, "running": 1, "waiting": 0}
    metrics = Metrics("prefill")
    metrics.count_link_bytes(EVIL, "sent", 5)
    page = status_page({**status, "decode_nodes": [row]}, False, EVIL, metrics.registry)
    assert "script" not in Tags(page).seen
    assert "alert" in page


def test_trace_is_what_perfetto_reads() -> None:
    trace = json.loads(json.dumps(chrome_trace(timeline())))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    named = {event["name"]: (event["ts"], event["dur"]) for event in spans}
    assert named["tokenize"] == (0, 10_000)
    assert named["prefill"] == (20_000, 20_000)
    assert named["layer 1"] == (30_000, 10_000)
    assert named["handoff"] == (40_000, 5_000)
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X", "i"}


def test_spans_are_bounded() -> None:
    spans = Spans(limit=2)
    for i in range(5):
        spans.computed(range(i, i + 1), i, i + 0.5)
        spans.frame(FrameSpan(i, 1, 0, 1, 1, i))
        spans.token(0, i)
    assert [len(spans.compute), len(spans.frames), len(spans.tokens)] == [2, 2, 2]
    assert [span.ended_s for span in spans.compute] == [1, 2]


def test_percentile_is_linear_within_a_bucket() -> None:
    buckets = [(1.0, 10.0), (2.0, 20.0), (float("inf"), 20.0)]
    assert percentile(buckets, 0.25) == 0.5
    assert percentile(buckets, 0.75) == 1.5
    assert percentile([(1.0, 0.0), (float("inf"), 3.0)], 0.5) == 1.0  # beyond the last bound: at least that


# --- real nodes, a real browser ---


@dataclass(frozen=True)
class Nodes:
    decode: DecodeDaemon
    prefill: PrefillDaemon
    answer_id: str

    @property
    def request_id(self) -> str:
        return str(self.prefill.status["requests"][-1]["request_id"])


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    model = tmp_path_factory.mktemp("model")
    write_checkpoint(model, num_layers=NUM_LAYERS, head_dim=64)
    decode = DecodeDaemon(model)
    prefill = PrefillDaemon(model, [decode], max_batch_tokens=256)
    with running(decode, prefill):
        answer = prefill.complete(PROMPT, max_tokens=20)
        yield Nodes(decode, prefill, answer.json["id"])


def test_every_chunk_and_frame_and_token_of_a_real_request_is_in_its_trace(nodes: Nodes) -> None:
    answer = nodes.prefill.get(f"/v1/timeline/{nodes.answer_id}")
    assert answer.status == 200
    events = answer.json["traceEvents"]
    of_track = {
        (pid, tid): [e for e in events if (e["pid"], e.get("tid")) == (pid, tid)] for pid, tid in ((1, 2), (2, 5))
    }
    computed = [e["name"] for e in of_track[1, 2] if e["ph"] == "X"]
    assert computed == [f"layer {i}" for i in range(NUM_LAYERS)] * 3  # 600 tokens in chunks of 256
    landed = [e for e in of_track[2, 5] if e["ph"] == "X"]
    assert len(landed) == 3 * NUM_LAYERS
    assert sum(e["args"]["bytes"] for e in landed) == sum(
        layer["wire_bytes"] for layer in nodes.prefill.status["requests"][-1]["layers"].values()
    )
    assert len([e for e in events if e["name"] == "token"]) == 20


def test_unknown_request_is_told_so(nodes: Nodes) -> None:
    for path in ("/v1/timeline/nobody", "/timeline/nobody"):
        answer = nodes.prefill.get(path)
        assert (answer.status, answer.json["error"]["code"]) == (404, "unknown_request")


def test_pages_run_no_script_and_load_nothing(nodes: Nodes) -> None:
    for daemon, path in ((nodes.decode, "/"), (nodes.prefill, "/"), (nodes.prefill, f"/timeline/{nodes.request_id}")):
        answer = daemon.get(path)
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/html")
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "script" not in Tags(answer.body.decode()).seen


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium, and it could not be installed")
@pytest.mark.parametrize(
    ("page", "texts"),
    [
        ("timeline", ("TTFT", "handoff", "hidden behind compute", "first token", "committed")),
        ("prefill", ("Decode nodes", "Links", "Latencies", "TTFT", "Last requests")),
        ("decode", ("Arena", "landing slots", "Prefill nodes", "Errors since the start")),
    ],
)
def test_a_browser_draws_the_pages(nodes: Nodes, tmp_path: Path, page: str, texts: tuple[str, ...]) -> None:
    daemon = nodes.decode if page == "decode" else nodes.prefill
    url = f"{daemon.url}/timeline/{nodes.request_id}" if page == "timeline" else f"{daemon.url}/"
    picture = tmp_path / "page.png"
    browse(url, tmp_path, f"--screenshot={picture}", "--window-size=1200,900")
    assert len(set(pixels(picture))) > 20  # drawn, not blank
    shown = browse(url, tmp_path, "--dump-dom")
    for text in texts:
        assert text in shown


def browse(url: str, profile: Path, *options: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}/profile"]
    done = subprocess.run([*command, *options, url], capture_output=True, timeout=BROWSER_S, check=True)
    return done.stdout.decode()


def pixels(picture: Path) -> Iterator[bytes]:
    """The raw pixel bytes of a PNG's rows, still filtered: enough to tell a drawing from a blank page."""
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    position, packed = 8, b""
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            packed += data[position + 8 : position + 8 + length]
        position += 12 + length
    raw = zlib.decompress(packed)
    return (raw[i : i + 4] for i in range(0, len(raw), 4))
