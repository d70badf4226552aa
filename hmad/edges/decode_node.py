"""A decode node: the arena, the engine that steps over it, and the stream port."""

import asyncio
from typing import Any

from hmad.compute.landing import Landing
from hmad.edges.api import RoleServices
from hmad.edges.devices import open_decode
from hmad.edges.health import Health
from hmad.edges.metrics import Metrics
from hmad.edges.node_model import SHUTDOWN_S, NodeModel, common_status, in_passing_thread
from hmad.facts.config import Config
from hmad.facts.formats import FORMATS
from hmad.facts.keys import load_api_keys
from hmad.facts.logs import get_logger
from hmad.roles.decode import DecodeCounters, DecodeRole
from hmad.roles.decode_engine import DecodeEngine
from hmad.roles.engine import Engine
from hmad.transport.decode_listener import DecodeListener, ListenerSettings

log = get_logger(__name__)

STOPS = "the decode node stops"


class DecodeNode:
    """Built by ``build``; then start, drain, stop."""

    def __init__(self, config: Config, model: NodeModel, role: DecodeRole, landing: Landing, metrics: Metrics) -> None:
        self._config = config
        self._model = model
        self._role = role
        self._landing = landing
        self._listener = DecodeListener(
            ListenerSettings(model.identity, model.geometry, model.cluster_key, role.arena.num_slots, config.lease_s),
            role,
        )
        self.engine: Engine = role.engine
        self._health = Health(self._check)
        self.services = RoleServices(
            role="decode",
            metrics=metrics,
            health=self._health,
            status=self._status,
            api_key_digests=load_api_keys(config.api_key_file) if config.api_key_file else frozenset(),
        )

    @classmethod
    async def build(cls, config: Config, model: NodeModel) -> "DecodeNode":
        """Take the arena's memory and load the weights."""
        log.info("loading", model=str(config.model), precision=config.precision)
        metrics = Metrics("decode")
        opened = await in_passing_thread(lambda: open_decode(config, model, lambda error: role.engine.fail(error)))
        arena = opened.arena
        role = DecodeRole(
            arena,
            opened.landing,
            FORMATS[config.precision],
            model.max_model_len,
            model.config.vocab_size,
            DecodeCounters(
                received=lambda peer, size: metrics.count_link_bytes(peer, "received", size),
                rate=lambda peer, bytes_per_s: metrics.set_link_rate(peer, "received", bytes_per_s),
                sent_tokens=metrics.output_tokens.inc,
                failed=metrics.count_error,
            ),
        )
        role.engine = DecodeEngine(opened.device, config.max_batch_size, role.deliver_from_engine)
        log.info(
            "arena made",
            num_slots=arena.num_slots,
            slot_bytes=model.geometry.slot_bytes,
            num_layers=model.geometry.num_layers,
        )
        metrics.arena_total_slots.set(arena.num_slots)
        metrics.arena_used_slots.set_function(lambda: arena.used_slots)
        metrics.queue_length.set_function(lambda: role.engine.num_waiting)
        metrics.running.set_function(lambda: role.engine.num_running)
        return cls(config, model, role, opened.landing, metrics)

    async def start(self) -> None:
        self._role.engine.start()
        await self._listener.start(self._config.stream_host, self._config.stream_port)
        log.info("stream port open", address=f"{self._config.stream_host}:{self._config.stream_port}")

    def drain(self) -> None:
        self._role.drain()
        self._listener.drain(STOPS)

    async def drained(self) -> None:
        await self._role.drained()

    def end_requests(self) -> None:
        self._role.end_transfers(STOPS)

    async def stop(self) -> None:
        await self._listener.stop(STOPS)
        self._role.engine.stop()
        await asyncio.to_thread(self._role.engine.join, SHUTDOWN_S)
        await asyncio.to_thread(self._landing.close)

    def _check(self) -> tuple[bool, str]:
        trouble = self._role.engine.trouble
        if trouble is not None:
            return False, trouble
        if self._role.draining:
            return False, "this node drains: it finishes what it has and takes no more"
        return True, "the decode engine makes progress"

    def _status(self) -> dict[str, Any]:
        arena, engine = self._role.arena, self._role.engine
        return common_status(self._config, self._model) | {
            "health": self._health.describe(),
            "arena": {
                "used_slots": arena.used_slots,
                "total_slots": arena.num_slots,
                "slot_bytes": arena.geometry.slot_bytes * arena.geometry.num_layers,
                "bytes": arena.bytes.nbytes,
                **self._role.slots_by_state(),
            },
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "output_tokens": self._role.num_tokens,
            "failed_transfers": self._role.num_failed,
            "prefill_nodes": [session.describe() for session in self._listener.sessions.values()],
        }
