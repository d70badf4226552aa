"""A prefill node: the engine, the staging, the links to decode nodes, and the OpenAI routes."""

import asyncio
from dataclasses import asdict, replace
from typing import Any

from hmad.compute.checkpoint import read_generation_defaults
from hmad.compute.device import KVHistory
from hmad.compute.linears import activation_dtype
from hmad.compute.staging import StagingPool
from hmad.compute.tokenizer import Tokenizer
from hmad.edges.api import RoleServices
from hmad.edges.completions import ServedModel
from hmad.edges.devices import open_prefill
from hmad.edges.health import Health
from hmad.edges.metrics import Metrics, error_cause
from hmad.edges.node_model import SHUTDOWN_S, NodeModel, common_status, in_passing_thread
from hmad.facts.config import Config
from hmad.facts.errors import RequestError
from hmad.facts.formats import FORMATS, KVGeometry
from hmad.facts.keys import load_api_keys
from hmad.facts.logs import get_logger
from hmad.facts.timeline import Spans, Timeline
from hmad.roles.engine import Engine
from hmad.roles.prefill import PrefillCounters, PrefillRole, PrefillSettings
from hmad.roles.prefill_engine import PrefillEngine, PrefillListener
from hmad.transport.prefill_link import LinkSettings, PeerLink
from hmad.transport.rate import Pacer

log = get_logger(__name__)

NUM_STATUS_TIMELINES = 8
RETRY_AFTER_S = 1.0


class PrefillNode:
    """Built by ``build``; then start, drain, stop."""

    def __init__(
        self, config: Config, model: NodeModel, role: PrefillRole, tokenizer: Tokenizer, metrics: Metrics
    ) -> None:
        self._config = config
        self._model = model
        self._role = role
        self._tasks: list[asyncio.Task[None]] = []
        self.engine: Engine = role.engine
        self._health = Health(self._check)
        self.services = RoleServices(
            role="prefill",
            metrics=metrics,
            health=self._health,
            status=self._status,
            served=ServedModel(
                names=config.served_model_names,
                generator=role,
                tokenizer=tokenizer,
                defaults=read_generation_defaults(config.model, model.config),
                vocab_size=model.config.vocab_size,
                max_model_len=model.max_model_len,
                default_max_tokens=config.default_max_tokens,
                timeline_of=role.timelines.get,
                request_timeout_s=config.request_timeout_s,
            ),
            api_key_digests=load_api_keys(config.api_key_file) if config.api_key_file else frozenset(),
        )

    @classmethod
    async def build(cls, config: Config, model: NodeModel) -> "PrefillNode":
        """Load tokenizer and weights, take the staging's memory, make the links."""
        log.info("loading", model=str(config.model), precision=config.precision)
        tokenizer = Tokenizer(config.model)
        opened = await in_passing_thread(lambda: open_prefill(config, model))
        staging = opened.staging
        metrics = Metrics("prefill")
        role = PrefillRole(role_settings(config, model, staging), staging, counters(metrics))
        role.engine = PrefillEngine(
            opened.device,
            config.max_batch_tokens,
            config.history_bytes,
            PrefillListener(role.blocks_encoded, role.layers_computed, role.prefill_done),
            waits_for_wire=lambda: staging.is_waited_for,
        )
        link_settings = LinkSettings(
            model.identity,
            model.cluster_key,
            config.bulk_connections,
            Pacer(config.stream_bytes_per_s),
            staging.page_bytes,
            role.counters.failed,
        )
        role.links = [PeerLink(peer.host, peer.port, link_settings, role.changed) for peer in config.peers]
        metrics.queue_length.set_function(lambda: role.queue.num_waiting)
        metrics.running.set_function(lambda: role.num_running)
        return cls(config, model, role, tokenizer, metrics)

    async def start(self) -> None:
        self._role.engine.start()
        self._tasks = [asyncio.create_task(link.run()) for link in self._role.links]

    def drain(self) -> None:
        self._role.drain("the prefill node stops")

    async def drained(self) -> None:
        await self._role.drained()

    def end_requests(self) -> None:
        self._role.end_requests(
            RequestError(503, "this prefill node stops", code="shutting_down", retry_after_s=RETRY_AFTER_S)
        )

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._role.staging.close()
        self._role.engine.stop()
        await asyncio.to_thread(self._role.engine.join, SHUTDOWN_S)

    def _check(self) -> tuple[bool, str]:
        trouble = self._role.engine.trouble
        if trouble is not None:
            return False, trouble
        if self._role.draining:
            return False, "this node drains: it finishes what it has and takes no more"
        if not any(link.usable for link in self._role.links):
            return False, "; ".join(f"decode node {link.name}: {link.trouble or 'drains'}" for link in self._role.links)
        return True, "the prefill engine makes progress, a decode node is connected"

    def _status(self) -> dict[str, Any]:
        role = self._role
        return common_status(self._config, self._model) | {
            "health": self._health.describe(),
            "waiting": role.queue.num_waiting,
            "running": role.num_running,
            "staging": {"free_pages": role.staging.free_pages, "total_pages": role.staging.num_pages},
            "decode_nodes": [link.describe() for link in role.links],
            "requests": [describe(timeline) for timeline in list(role.timelines.values())[-NUM_STATUS_TIMELINES:]],
        }


def max_prompt_tokens(config: Config, geometry: KVGeometry, staging: StagingPool) -> int:
    """The longest prompt for which there is memory: one forward pass needs none, later chunks need history."""
    bytes_per_token = KVHistory.bytes_per_token(geometry, activation_dtype(config.precision))
    longest = max(config.max_batch_tokens, config.history_bytes // bytes_per_token)
    if config.transfer == "layerwise":
        return longest
    # Nothing leaves before the end, so staging holds all of it: whole pages for each chunk of each layer.
    fmt = max(FORMATS.values(), key=lambda f: geometry.block_bytes(f) / f.tokens_per_block)
    tokens_per_page = staging.page_bytes // geometry.block_bytes(fmt) * fmt.tokens_per_block
    pages_per_chunk = -(-config.max_batch_tokens // tokens_per_page)
    num_chunks, pages_left = divmod(staging.num_pages // geometry.num_layers, pages_per_chunk)
    return min(longest, num_chunks * config.max_batch_tokens + pages_left * tokens_per_page)


def role_settings(config: Config, model: NodeModel, staging: StagingPool) -> PrefillSettings:
    return PrefillSettings(
        geometry=model.geometry,
        max_prompt_tokens=max_prompt_tokens(config, model.geometry, staging),
        vocab_size=model.config.vocab_size,
        max_batch_tokens=config.max_batch_tokens,
        max_queue=config.max_queue,
        max_timelines=config.timelines,
        queue_timeout_s=config.queue_timeout_s,
        transfer_after=config.transfer == "after",
    )


def counters(metrics: Metrics) -> PrefillCounters:
    return PrefillCounters(
        finished=lambda timeline: record(timeline, metrics),
        failed=lambda error: metrics.count_error(error_cause(error)),
    )


def record(timeline: Timeline, metrics: Metrics) -> None:
    """A placement has ended: how long it queued, its bytes, and what its transfer cost."""
    if timeline.prefill_started_s is not None:
        metrics.queue_s.observe(timeline.prefill_started_s - timeline.arrived_s)
    num_bytes = sum(layer.wire_bytes for layer in timeline.layers.values())
    if timeline.peer is not None:  # also of a transfer that was cut short
        metrics.count_link_bytes(timeline.peer, "sent", num_bytes)
    if timeline.peer is None or timeline.wire_s is None or timeline.exposed_s is None or timeline.hidden is None:
        return
    metrics.set_link_rate(timeline.peer, "sent", num_bytes / timeline.wire_s)
    metrics.observe_overlap(timeline.exposed_s, timeline.hidden)


def describe(timeline: Timeline) -> dict[str, Any]:
    """A timeline as JSON, without its spans, with what is derived from it."""
    derived = {name: getattr(timeline, name) for name in ("wire_s", "exposed_s", "hidden", "handoff_s")}
    fields = asdict(replace(timeline, spans=Spans()))
    del fields["spans"]
    return fields | derived
