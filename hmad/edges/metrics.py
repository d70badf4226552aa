"""What a node counts, for Prometheus. One registry per node, so that tests may run several in one process.

Roles and edges call the methods; ``render`` is what /metrics answers. Names carry base units, as Prometheus asks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from aiohttp import ClientConnectionResetError
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from hmad.facts.errors import RequestError, TransferAborted

CONTENT_TYPE = CONTENT_TYPE_LATEST

M = TypeVar("M", Counter, Gauge, Histogram)
Role = Literal["prefill", "decode"]
Direction = Literal["sent", "received"]

STEP_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
REQUEST_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
LOOP_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SHARE_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.93, 0.95, 0.97, 0.99, 1.0)


class Metrics:
    """All metric objects of one node. Times are in seconds, sizes in bytes.

    What only the other role can know is counted nowhere and exported nowhere: a series that is always 0 misleads.
    """

    def __init__(self, role: Role) -> None:
        self._role = role
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._create_latencies()
        self._create_gauges()
        self._create_link()
        self._create_counters()

    def _create_latencies(self) -> None:
        self.ttft_s = self._histogram(
            "time_to_first_token_seconds", "Request received until the first token of each choice"
        )
        self.itl_s = self._histogram(
            "inter_token_latency_seconds", "Each gap between two tokens of a choice", STEP_BUCKETS_S
        )
        self.tpot_s = self._histogram(
            "time_per_output_token_seconds", "(E2E - TTFT) / (tokens - 1) of each choice", STEP_BUCKETS_S
        )
        self.e2e_s = self._histogram("end_to_end_seconds", "Request received until the last token of each choice")
        self.queue_s = self._histogram("queue_seconds", "Request queued until its prefill began")

    def _create_gauges(self) -> None:
        self.queue_length = self._create(Gauge, "queue_requests", "Prompts (decode: sequences) that wait their turn")
        self.running = self._create(Gauge, "running_sequences", "Sequences being computed")
        self.arena_used_slots = self._create(Gauge, "arena_used_slots", "Slots of the arena in use", of="decode")
        self.arena_total_slots = self._create(Gauge, "arena_total_slots", "Slots of the arena", of="decode")

        self.loop_busy_s = self._create(
            Histogram,
            "event_loop_busy_seconds",
            "CPU time of the event loop between two ticks 25 ms apart: no callback held it for longer",
            buckets=LOOP_BUCKETS_S,
        )

    def _create_link(self) -> None:
        labels = ("peer", "direction")
        self._link_bytes = self._create(Counter, "link_bytes", "KV bytes on the wire", labels)
        self._link_rate = self._create(Gauge, "link_bytes_per_second", "Rate of the last transfer's KV", labels)
        self.kv_exposed_s = self._histogram(
            "kv_exposed_seconds", "Transfer time that a request waited for after its first token", STEP_BUCKETS_S
        )
        self.kv_hidden_share = self._histogram(
            "kv_hidden_ratio", "Share of the wire time hidden behind compute", SHARE_BUCKETS
        )

    def _create_counters(self) -> None:
        self.prompt_tokens = self._create(Counter, "prompt_tokens", "Prompt tokens accepted", of="prefill")
        self.output_tokens = self._create(
            Counter, "output_tokens", "Tokens given to clients (decode: to prefill nodes)"
        )
        self._requests = self._create(Counter, "requests", "Generation requests by outcome", ("outcome",), of="prefill")
        self._errors = self._create(Counter, "errors", "Errors by cause", ("cause",))
        for outcome in ("finished", "rejected", "cancelled", "failed"):
            self._requests.labels(outcome)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = REQUEST_BUCKETS_S) -> Histogram:
        """All times of requests are known to the prefill node alone."""
        return self._create(Histogram, name, text, of="prefill", buckets=buckets)

    def _create(
        self, kind: type[M], name: str, text: str, labels: tuple[str, ...] = (), of: Role | None = None, **more: Any
    ) -> M:
        registry = self.registry if of in (None, self._role) else None
        return kind(f"hmad_{name}", text, labels, registry=registry, **more)

    def count_link_bytes(self, peer: str, direction: Direction, num_bytes: int) -> None:
        """KV bytes that went to or came from a peer."""
        self._link_bytes.labels(peer, direction).inc(num_bytes)

    def set_link_rate(self, peer: str, direction: Direction, bytes_per_s: float) -> None:
        """How fast the last transfer's bytes went."""
        self._link_rate.labels(peer, direction).set(bytes_per_s)

    def observe_overlap(self, exposed_s: float, hidden: float) -> None:
        """One transfer's exposed time, and the share of its wire time that compute hid."""
        self.kv_exposed_s.observe(exposed_s)
        self.kv_hidden_share.observe(hidden)

    def count_error(self, cause: str) -> None:
        """``cause`` is one of our own words (an error code, a class name, an abort reason), never a peer's text."""
        self._errors.labels(cause).inc()

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Count how a generation request ends, and why if badly."""
        ended = "cancelled"
        try:
            yield
            ended = "finished"
        except ClientConnectionResetError:  # the client left while we wrote
            raise
        except RequestError:
            ended = "rejected"
            raise
        except Exception:
            ended = "failed"
            raise
        finally:
            self._requests.labels(ended).inc()

    def render(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)


def error_cause(error: Exception) -> str:
    """A word for an error, from a set we know."""
    if isinstance(error, RequestError):
        return error.code or f"http_{error.status}"
    return error.reason if isinstance(error, TransferAborted) else type(error).__name__
