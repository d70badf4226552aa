"""A request's timeline as a Chrome trace: what Perfetto (ui.perfetto.dev) and chrome://tracing open.

The format is Google's "Trace Event Format": complete events (``ph`` X) with a start and a duration in microseconds on a
track (``pid``, ``tid``), instants (``i``), and metadata (``M``) that names the tracks. Times are the prefill node's;
what the decode node saw is shifted by the estimated offset of its clock.
"""

from collections.abc import Iterator
from typing import Any

from hmad.facts.timeline import Timeline, name_of

PREFILL, DECODE = 1, 2  # pid
REQUEST, COMPUTE, ENCODE, WIRE, LANDING, TOKENS = range(1, 7)  # tid
TRACKS = {
    (PREFILL, REQUEST): "request",
    (PREFILL, COMPUTE): "compute",
    (PREFILL, ENCODE): "encode and wait for the wire",
    (PREFILL, WIRE): "handed to the kernel",
    (DECODE, LANDING): "on the wire until verified",
    (PREFILL, TOKENS): "tokens",
}


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The trace as a JSON object."""
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [
            *_names(timeline),
            *_phases(timeline),
            *_compute(timeline),
            *_frames(timeline),
            *_tokens(timeline),
        ],
        "otherData": {
            "request_id": timeline.request_id,
            "num_prompt_tokens": timeline.num_prompt_tokens,
            "kv_format": timeline.kv_format,
            "decode_clock_offset_s": timeline.clock_offset_s,
        },
    }


def _names(timeline: Timeline) -> Iterator[dict[str, Any]]:
    for pid, name in ((PREFILL, "prefill node"), (DECODE, f"decode node {timeline.peer or ''}".strip())):
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    for (pid, tid), name in TRACKS.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _phases(timeline: Timeline) -> Iterator[dict[str, Any]]:
    marks = [
        ("tokenize", timeline.received_s, timeline.arrived_s),
        ("queued", timeline.arrived_s, timeline.granted_s or timeline.prefill_started_s),
        ("reserved", timeline.granted_s, timeline.prefill_started_s),
        ("prefill", timeline.prefill_started_s, timeline.first_token_s),
        ("handoff", timeline.first_token_s, timeline.committed_s),
        ("decode", timeline.committed_s, timeline.finished_s),
    ]
    for name, begin_s, end_s in marks:
        yield from _span(timeline, name, PREFILL, REQUEST, begin_s, end_s)


def _compute(timeline: Timeline) -> Iterator[dict[str, Any]]:
    for span in timeline.spans.compute:
        kv_ready_ms = round(1e3 * (span.kv_ready_s - span.started_s), 3)
        args = {"layer": span.layers.start, "layers": len(span.layers), "kv_ready_ms": kv_ready_ms}
        yield from _span(timeline, name_of(span.layers), PREFILL, COMPUTE, span.started_s, span.ended_s, **args)


def _frames(timeline: Timeline) -> Iterator[dict[str, Any]]:
    for frame in timeline.spans.frames:
        blocks = f"{frame.first_block}..{frame.first_block + frame.num_blocks - 1}"
        name = f"{name_of(frame.layers)}, blocks {blocks}"
        args = {"layer": frame.first_layer, "layers": frame.num_layers, "bytes": frame.num_bytes}
        yield from _span(timeline, name, PREFILL, ENCODE, frame.encoded_s, frame.sent_s, **args)
        yield from _span(timeline, name, PREFILL, WIRE, frame.sent_s, frame.copied_s, **args)
        yield from _span(timeline, name, DECODE, LANDING, frame.sent_s, frame.verified_s, **args)


def _tokens(timeline: Timeline) -> Iterator[dict[str, Any]]:
    for choice, at_s in timeline.spans.tokens:
        place = {"pid": PREFILL, "tid": TOKENS, "ts": _micros(timeline, at_s)}
        yield {"ph": "i", "s": "t", "name": "token", "args": {"choice": choice}, **place}


def _span(
    timeline: Timeline, name: str, pid: int, tid: int, begin_s: float | None, end_s: float | None, **args: object
) -> Iterator[dict[str, Any]]:
    """Nothing where one of its ends never happened."""
    if begin_s is not None and end_s is not None:
        begin, end = _micros(timeline, begin_s), _micros(timeline, end_s)
        yield {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": begin, "dur": max(0.0, end - begin), "args": args}


def _micros(timeline: Timeline, at_s: float) -> float:
    return round(1e6 * (at_s - timeline.received_s), 1)
