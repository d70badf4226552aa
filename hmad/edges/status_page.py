"""The page at /: what a node does right now, for a person. It needs no script and refreshes itself.

Everything on it is also in /status and /metrics; the latencies are read off the histograms there.
"""

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from itertools import pairwise
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample

from hmad.edges.pages import NOTHING, document, millis, size, table, tiles

REFRESH_S = 2
PERCENTILES = (0.5, 0.9, 0.99)
LATENCIES = {
    "TTFT": "hmad_time_to_first_token_seconds",
    "ITL": "hmad_inter_token_latency_seconds",
    "queue": "hmad_queue_seconds",
    "exposed KV": "hmad_kv_exposed_seconds",
}
SLOT_STATES = ("landing_slots", "decoding_slots", "free_slots")


def status_page(status: Mapping[str, Any], healthy: bool, reason: str, registry: CollectorRegistry) -> str:
    """The page of one node, from its /status, its health and its metrics."""
    samples = [sample for family in registry.collect() for sample in family.samples]
    node_id = str(status["node_id"])
    health = escape(reason) if healthy else f'<b class="bad">{escape(reason)}</b>'
    body = (
        f"<h1>{escape(node_id)}</h1>"
        f'<p class="sub">{escape(status["role"])} node, hmad {escape(status["version"])}, '
        f"{escape(status['precision'])}; {health}</p>"
        + tiles(("running", str(status["running"])), ("waiting", str(status["waiting"])), *counts(samples))
        + arena(status.get("arena"))
        + section("Decode nodes", status.get("decode_nodes"), ("address", "usable", "format", "free_slots", "trouble"))
        + section("Prefill nodes", status.get("prefill_nodes"), ("node_id", "address", "format", "transfers"))
        + links(samples)
        + latencies(samples)
        + errors(samples)
        + recent(status.get("requests"))
    )
    return document(f"hmad {node_id}", body, REFRESH_S)


def counts(samples: Iterable[Sample]) -> Iterator[tuple[str, str]]:
    for sample in samples:
        if sample.name == "hmad_output_tokens_total":
            yield "output tokens", f"{sample.value:.0f}"
        if sample.name == "hmad_requests_total":
            yield f"{sample.labels['outcome']} requests", f"{sample.value:.0f}"


def arena(state: Mapping[str, Any] | None) -> str:
    """A decode node's slots, by what they are doing."""
    if state is None:
        return ""
    used = 100 * state["used_slots"] / state["total_slots"]
    slots = {name: state[name] for name in SLOT_STATES}
    rows = [(name.replace("_", " "), n, size(n * state["slot_bytes"])) for name, n in slots.items()]
    meter = f'<div class="meter" title="{used:.1f} % used"><i style="width:{used:.1f}%"></i></div>'
    return f"<h2>Arena: {used:.1f} % of {size(state['bytes'])} used</h2>{meter}" + table(("", "slots", "bytes"), rows)


def section(title: str, rows: Iterable[Mapping[str, Any]] | None, columns: tuple[str, ...]) -> str:
    """One table of what /status lists; nothing where it does not."""
    if rows is None:
        return ""
    cells = [tuple(NOTHING if row[name] is None else row[name] for name in columns) for row in rows]
    return f"<h2>{title}</h2>" + (table(columns, cells) if cells else '<p class="bad">none connected</p>')


def links(samples: Iterable[Sample]) -> str:
    """KV bytes to or from each peer, and the rate of the last transfer."""
    rates = {}
    totals = {}
    for sample in samples:
        if sample.name == "hmad_link_bytes_total":
            totals[sample.labels["peer"], sample.labels["direction"]] = sample.value
        if sample.name == "hmad_link_bytes_per_second":
            rates[sample.labels["peer"], sample.labels["direction"]] = sample.value
    rows = [(*link, size(total), f"{size(rates.get(link, 0))}/s") for link, total in sorted(totals.items())]
    return "<h2>Links</h2>" + table(("peer", "direction", "KV", "last rate"), rows) if rows else ""


def latencies(samples: Iterable[Sample]) -> str:
    samples = list(samples)
    header = ("", *(f"p{100 * p:.0f}" for p in PERCENTILES))
    rows = []
    for title, name in LATENCIES.items():
        buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name == f"{name}_bucket"]
        if buckets and buckets[-1][1]:
            rows.append((title, *(millis(percentile(buckets, p)) for p in PERCENTILES)))
    return "<h2>Latencies</h2>" + table(header, rows) if rows else ""


def percentile(buckets: list[tuple[float, float]], share: float) -> float:
    """The value below which ``share`` of a histogram's observations lie, linear within its bucket.

    ``buckets`` are (upper bound, observations up to it), the last bound infinite: what lies there counts as the last
    finite bound.
    """
    wanted = share * buckets[-1][1]
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *buckets]):
        if count >= wanted and count > below:
            return low if high == float("inf") else low + (high - low) * (wanted - below) / (count - below)
    return buckets[-1][0]


def errors(samples: Iterable[Sample]) -> str:
    rows: list[tuple[object, ...]] = [
        (s.labels["cause"], f"{s.value:.0f}") for s in samples if s.name == "hmad_errors_total" and s.value
    ]
    return "<h2>Errors since the start</h2>" + (table(("cause", "count"), rows) if rows else "<p>none</p>")


def recent(requests: Iterable[Mapping[str, Any]] | None) -> str:
    """The last requests, each with a link to its timeline."""
    rows = [
        "<tr>"
        f'<td><a href="/timeline/{escape(r["request_id"])}">{escape(r["request_id"])}</a></td>'
        f"<td>{r['num_prompt_tokens']}</td><td>{r['num_output_tokens']}</td>"
        f"<td>{millis(r['handoff_s'])}</td><td>{share(r['hidden'])}</td></tr>"
        for r in reversed(list(requests or ()))
    ]
    head = "<tr><th>request</th><th>prompt</th><th>output</th><th>handoff</th><th>hidden</th></tr>"
    return f"<h2>Last requests</h2><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""


def share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1%}"
