"""A request's timeline as one HTML page: a lane of computed layers over a lane of the same layers on the wire.

What lies on the wire left of the first token was hidden behind compute; what lies right of it was exposed: the decode
node had to wait for it (docs/design.md section 8).
"""

from html import escape
from itertools import groupby

from hmad.edges.pages import NOTHING, document, millis, size, table, tiles
from hmad.facts.timeline import Timeline, label_of, name_of

WIDTH, MARGIN, LANE, GAP, TOP = 1000, 8, 56, 26, 34  # of the drawing, in its own units
EDGE, DIGIT = 8, 6.5  # of a label: a bar that is narrower has no room for it
COMPUTE_Y, WIRE_Y = TOP, TOP + LANE + GAP
TOKENS_Y = WIRE_Y + LANE + GAP
HEIGHT = TOKENS_Y + 40


def timeline_page(timeline: Timeline) -> str:
    """The page of one request."""
    num_bytes = sum(layer.wire_bytes for layer in timeline.layers.values())
    hidden = timeline.hidden
    body = (
        f"<h1>Request {escape(timeline.request_id)}</h1>"
        f'<p class="sub">{timeline.num_prompt_tokens} prompt tokens, {timeline.num_output_tokens} output tokens; '
        f"KV as {escape(timeline.kv_format or 'nothing')} to {escape(timeline.peer or 'nobody')}</p>"
        + tiles(
            ("TTFT", millis(since(timeline.received_s, timeline.first_token_s))),
            ("handoff", millis(timeline.handoff_s)),
            ("hidden behind compute", NOTHING if hidden is None else f"{100 * hidden:.1f} %"),
            ("exposed", millis(timeline.exposed_s)),
            ("on the wire", size(num_bytes)),
            ("total", millis(since(timeline.received_s, timeline.finished_s))),
        )
        + "<h2>Layers: computed, and on the wire</h2>"
        + drawing(timeline)
        + "<details><summary>The same in numbers</summary>"
        + layer_table(timeline)
        + "</details>"
        + f'<p><a href="/v1/timeline/{escape(timeline.request_id)}">Trace for Perfetto</a> '
        "(open it at ui.perfetto.dev or chrome://tracing)</p>"
    )
    return document(f"hmad timeline {timeline.request_id}", body)


def since(begin_s: float | None, end_s: float | None) -> float | None:
    return None if begin_s is None or end_s is None else end_s - begin_s


class Scale:
    """Seconds to the drawing's units: the prompt's compute and transfer fill its width."""

    def __init__(self, begin_s: float, end_s: float) -> None:
        self.begin_s = begin_s
        self._per_s = (WIDTH - 2 * MARGIN) / max(end_s - begin_s, 1e-6)

    def x(self, at_s: float) -> float:
        return round(MARGIN + (at_s - self.begin_s) * self._per_s, 2)

    def bar(self, y: float, begin_s: float, end_s: float, fill: str, title: str, label: str = "") -> str:
        x, width = self.x(begin_s), max(0.6, round((end_s - begin_s) * self._per_s, 2))
        text = (
            f'<text x="{x + 4}" y="{y + LANE / 2 + 4}" style="fill:#fff">{label}</text>'
            if width > EDGE + DIGIT * len(label)
            else ""
        )
        rect = f'<rect x="{x}" y="{y}" width="{width}" height="{LANE}" fill="var(--{fill})" rx="2">'
        return f"{rect}<title>{escape(title)}</title></rect>{text}"

    def mark(self, at_s: float, label: str, y: float) -> str:
        x = self.x(at_s)
        anchor = "end" if x > WIDTH / 2 else "start"
        line = f'<line x1="{x}" x2="{x}" y1="{y}" y2="{HEIGHT - 12}" stroke="var(--token)" stroke-dasharray="4 3"/>'
        return f'{line}<text x="{x}" y="{y - 4}" text-anchor="{anchor}">{escape(label)}</text>'


def drawing(timeline: Timeline) -> str:
    """Two lanes of layer bars over one time axis, and ticks for the tokens that came within it."""
    begin_s, end_s = timeline.prefill_started_s, timeline.first_token_s
    if begin_s is None or end_s is None:
        return '<p class="bad">This request ended before its prompt was computed.</p>'
    verified_s = max((layer.verified_s for layer in timeline.layers.values() if layer.verified_s), default=end_s)
    last_s = max(end_s, verified_s, timeline.committed_s or end_s)
    scale = Scale(begin_s, last_s)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="layers computed and transferred over time">',
        f'<text x="{MARGIN}" y="{COMPUTE_Y + LANE + 14}">compute, by layer</text>',
        f'<text x="{MARGIN}" y="{WIRE_Y + LANE + 14}">on the wire, by layer (red: exposed)</text>',
        *compute_bars(timeline, scale),
        *wire_bars(timeline, scale, end_s),
        scale.mark(end_s, f"first token {millis(end_s - begin_s)}", COMPUTE_Y - 4),
        *([scale.mark(timeline.committed_s, "committed", TOKENS_Y)] if timeline.committed_s else []),
        f'<text x="{MARGIN}" y="{HEIGHT - 4}">0</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 4}" text-anchor="end">{millis(last_s - begin_s)}</text></svg>',
    ]
    return "".join(parts)


def compute_bars(timeline: Timeline, scale: Scale) -> list[str]:
    """One bar for each chunk of each layer, or of layers that were computed at once."""
    return [
        scale.bar(
            COMPUTE_Y,
            span.started_s,
            span.ended_s,
            "compute" if number % 2 else "compute2",
            f"{name_of(span.layers)}: {millis(span.ended_s - span.started_s)}",
            label_of(span.layers),
        )
        for number, span in enumerate(timeline.spans.compute)
        if span.ended_s is not None
    ]


def wire_bars(timeline: Timeline, scale: Scale, first_token_s: float) -> list[str]:
    """One bar for each layer's way, or for that of layers that went together; what is right of the first token is
    another colour."""
    bars = []
    ways = groupby(sorted(timeline.layers.items()), lambda item: (item[1].sent_s, item[1].verified_s))
    for number, ((sent_s, verified_s), layers) in enumerate(ways):
        if sent_s is None or verified_s is None:
            continue
        together = dict(layers)
        run = range(min(together), max(together) + 1)
        num_bytes = sum(layer.wire_bytes for layer in together.values())
        title = f"{name_of(run)}: {size(num_bytes)} in {millis(verified_s - sent_s)}"
        label = label_of(run)
        fill = "wire" if number % 2 else "wire2"
        if sent_s < first_token_s:
            bars.append(scale.bar(WIRE_Y, sent_s, min(verified_s, first_token_s), fill, title, label))
        if verified_s > first_token_s:
            begin_s = max(sent_s, first_token_s)
            bars.append(scale.bar(WIRE_Y, begin_s, verified_s, "exposed", f"{title}, exposed", label))
    return bars


def layer_table(timeline: Timeline) -> str:
    zero_s = timeline.prefill_started_s or timeline.arrived_s
    rows: list[tuple[object, ...]] = [
        (
            layer_id,
            *(millis(since(zero_s, at)) for at in (layer.started_s, layer.kv_ready_s, layer.sent_s, layer.verified_s)),
            size(layer.wire_bytes),
        )
        for layer_id, layer in sorted(timeline.layers.items())
    ]
    return table(("layer", "begun", "KV ready", "sent", "verified", "bytes"), rows)
