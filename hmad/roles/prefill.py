"""The prefill role: queue, pick a peer, compute, ship every layer while later ones compute, hand over, relay tokens."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from hmad.compute.device import EncodedBlocks, LayerClock, PrefillChunk, PrefillSequence
from hmad.compute.staging import StagingPool
from hmad.facts.errors import HmadError, RemoteError, RequestError
from hmad.facts.formats import KVGeometry
from hmad.facts.requests import GenerationRequest
from hmad.facts.timeline import MAX_SPANS, Timeline
from hmad.roles.placement import Placement, RequestRun
from hmad.roles.prefill_engine import PrefillDone, PrefillEngine
from hmad.roles.queue import RETRY_AFTER_S, FairQueue, Place
from hmad.roles.scheduler import rank_peers
from hmad.transport.lease import Denied, Lease, StagedBlocks
from hmad.transport.prefill_link import PeerLink
from hmad.wire.messages import DenyReason

DRAIN_RETRY_AFTER_S = 5.0
PEERLESS_S = 1.5  # for so long a request waits for any decode node to be there at all


@dataclass(frozen=True)
class PrefillSettings:
    """What the role needs of the configuration and the model."""

    geometry: KVGeometry
    vocab_size: int
    max_batch_tokens: int
    max_prompt_tokens: int  # what history (or staging, when nothing is sent before the end) has room for
    max_queue: int
    max_timelines: int
    queue_timeout_s: float
    transfer_after: bool  # the sequential baseline: nothing is sent before the prompt is computed


@dataclass(frozen=True)
class PrefillCounters:
    """Who counts what happens on this node."""

    finished: Callable[[Timeline], None]  # a placement has ended
    failed: Callable[[Exception], None]  # a session is lost, or a request has to be placed again: why


class PrefillRole:
    """Generates: the seam that the REST edge calls (hmad.facts.requests.Generator)."""

    def __init__(self, settings: PrefillSettings, staging: StagingPool, counters: PrefillCounters) -> None:
        self.settings = settings
        self.transfer_after, self.vocab_size = settings.transfer_after, settings.vocab_size
        self.max_spans = MAX_SPANS if settings.max_timelines else 0
        self.staging = staging
        self.engine: PrefillEngine
        self.links: Sequence[PeerLink] = ()
        self.timelines: dict[str, Timeline] = {}  # the last requests', by id, the oldest first
        self.counters = counters
        self.queue = FairQueue(settings.max_queue)
        self.num_running = 0
        self.draining = False
        self._ended: HmadError | None = None
        self._peerless_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._open: set[RequestRun] = set()
        self._placements: dict[PrefillSequence, Placement] = {}

    # --- what the edge calls ---

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[RequestRun]:
        """One request; leaving the context cancels whatever is not finished."""
        run = RequestRun(self, request)
        self._open.add(run)
        try:
            yield run
        finally:
            self._open.discard(run)
            run.close()
            self.changed()

    def check_room(self, client: str, num_prompts: int = 1) -> None:
        """Raise RequestError for a client that ``admit`` would not let in."""
        if self.draining:
            raise RequestError(
                503, "this prefill node drains: ask another", code="draining", retry_after_s=DRAIN_RETRY_AFTER_S
            )
        self.queue.check_room(client, num_prompts)

    @contextmanager
    def admit(self, client: str, num_prompts: int) -> Iterator[list[Place]]:
        """Places in the queue, until the requests have ended."""
        self.check_room(client, num_prompts)
        try:
            with self.queue.admit(client, num_prompts) as places:
                yield places
        finally:
            self.changed()

    def check_fits(self, requests: Sequence[GenerationRequest]) -> None:
        """Raise RequestError for what this node has no memory for."""
        longest = max(len(request.prompt_token_ids) for request in requests)
        if longest > self.settings.max_prompt_tokens:
            raise RequestError(
                400,
                f"the prompt has {longest} tokens, this prefill node has memory for {self.settings.max_prompt_tokens}: "
                "ask its operator for more history-bytes (or staging-bytes with transfer = after)",
                param="prompt",
                code="never_fits",
            )

    # --- stopping ---

    def drain(self, reason: str) -> None:
        """Take no new requests; those that are here go on."""
        self.draining = True
        for link in self.links:
            link.drain(reason)

    async def drained(self) -> None:
        """Wait until every request has ended."""
        await self._wait_until(lambda: not self._open and not self.queue.num_waiting)

    def end_requests(self, error: HmadError) -> None:
        """Make every request that is still here end with this error."""
        self._ended = error
        for run in self._open:
            run.end(error)
        self.changed()

    # --- what placements call ---

    async def place(self, placement: Placement) -> Lease | None:
        """Wait for our turn and for room; None when nothing needs to be shipped (a single output token)."""
        try:
            async with asyncio.timeout(self.settings.queue_timeout_s), self.queue.turn(placement.request.place):
                await self._wait_until(self._engine_has_room)
                if placement.request.params.max_tokens == 1:
                    return None
                return await self._reserve_somewhere(placement)
        except TimeoutError:
            raise self._no_capacity() from None

    def forget(self, placement: Placement) -> None:
        self._placements.pop(placement.sequence, None)

    def finished(self, timeline: Timeline) -> None:
        if timeline.first_token_s is not None:
            self._keep(timeline)
        self.counters.finished(timeline)

    def lost(self, error: RemoteError) -> None:
        self.counters.failed(error)

    def _keep(self, timeline: Timeline) -> None:
        """Of a request that was placed several times the last placement's timeline is kept."""
        self.timelines.pop(timeline.request_id, None)
        self.timelines[timeline.request_id] = timeline
        while len(self.timelines) > self.settings.max_timelines:
            del self.timelines[next(iter(self.timelines))]

    # --- placing ---

    def _engine_has_room(self) -> bool:
        """Place a request only when its prefill is near: slots on the decode node are not to wait for our queue."""
        if self.settings.transfer_after:  # a prompt's whole KV waits in staging: one prompt at a time
            return self.num_running == 0
        return self.engine.backlog_tokens < self.settings.max_batch_tokens

    async def _reserve_somewhere(self, placement: Placement) -> Lease:
        """Ask the peers, the emptiest first, until one grants; wait for a change when all are full."""
        denied_by: dict[PeerLink, Denial] = {}
        while True:
            self._changed.clear()
            for link in rank_peers(self.links):
                if link in denied_by and denied_by[link].still_holds(link.free_slots):
                    continue
                try:
                    return await self._reserve(link, placement)
                except Denied as denied:
                    denied_by[link] = Denial(denied, time.monotonic())
                except RemoteError:
                    continue  # the link is gone or going; it says so itself
            refuse_if_hopeless([denied_by[link].error for link in self.links if link in denied_by], len(self.links))
            await self._wait_for_peers()

    async def _wait_for_peers(self) -> None:
        """Wait for any change; but where nobody is left who could make one, not for long."""
        try:
            async with asyncio.timeout_at(self._peerless_until()):
                await self._wait_for_change()
        except TimeoutError:
            raise self._no_capacity("no_decode_node") from None

    def _peerless_until(self) -> float | None:
        """When waiting for any decode node to be there ends, by the loop's clock; None while there is one."""
        if any(link.usable for link in self.links):
            self._peerless_since = None
            return None
        if self._peerless_since is None:
            self._peerless_since = self._loop.time()
        return self._peerless_since + PEERLESS_S

    async def _reserve(self, link: PeerLink, placement: Placement) -> Lease:
        message = placement.reserve_message(link.session.agreement.format)
        lease = link.session.reserve(message, placement.prompt_bytes, placement.timeline)
        try:
            await lease.granted()
        except asyncio.CancelledError:
            lease.close()
            raise
        placement.timeline.granted_s = time.monotonic()
        placement.timeline.peer, placement.timeline.kv_format = link.name, lease.format
        return lease

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        await self._changed.wait()
        if self._ended is not None:
            raise self._ended

    def _no_capacity(self, code: str = "no_capacity") -> RequestError:
        troubles = "; ".join(f"{link.name}: {link.trouble or 'full'}" for link in self.links)
        what = "no decode node is there" if code == "no_decode_node" else "no decode node had room in time"
        return RequestError(503, f"{what} ({troubles})", code=code, retry_after_s=RETRY_AFTER_S)

    def changed(self) -> None:
        """A peer's load, a link or the engine's backlog has changed: whoever waits looks again."""
        self._peerless_until()
        self._changed.set()

    # --- computing: the engine's thread hands over, the loop takes ---

    def submit(self, placement: Placement) -> None:
        self._placements[placement.sequence] = placement
        self.num_running += 1
        self.engine.submit(placement.sequence)

    def blocks_encoded(self, blocks: EncodedBlocks) -> None:
        """A thread of the device's."""
        self._loop.call_soon_threadsafe(self._ship, blocks, time.monotonic())

    def layers_computed(self, chunks: Sequence[PrefillChunk], clock: LayerClock) -> None:
        """A thread of the device's."""
        self._loop.call_soon_threadsafe(self._note_layer, [chunk.sequence for chunk in chunks], clock)

    def prefill_done(self, done: PrefillDone) -> None:
        """Engine thread."""
        self._loop.call_soon_threadsafe(self._prefilled, done)

    def _ship(self, blocks: EncodedBlocks, encoded_s: float) -> None:
        def release() -> None:
            self.staging.release(blocks.page)

        placement = self._placements.get(blocks.sequence)
        staged = StagedBlocks(
            blocks.first_layer,
            blocks.num_layers,
            blocks.first_block,
            blocks.num_blocks,
            blocks.payload.data,
            encoded_s,
            release,
        )
        if placement is None:
            release()
        else:
            placement.ship(staged)

    def _note_layer(self, sequences: Iterable[PrefillSequence], clock: LayerClock) -> None:
        for sequence in sequences:
            placement = self._placements.get(sequence)
            if placement is not None:
                placement.note_layer(clock)

    def _prefilled(self, done: PrefillDone) -> None:
        placement = self._placements.pop(done.sequence, None)
        self.num_running -= 1
        if placement is not None:
            placement.prefilled(done)
        self.changed()


@dataclass(frozen=True)
class Denial:
    """A decode node's no. With more free slots it may say yes, or for a reason that its LOAD does not tell."""

    error: Denied
    at_s: float

    def still_holds(self, free_slots: int) -> bool:
        return free_slots <= self.error.free_slots and time.monotonic() - self.at_s < RETRY_AFTER_S


def refuse_if_hopeless(denials: Sequence[Denied], num_peers: int) -> None:
    """A request that no peer could ever take is the client's to change."""
    hopeless = (DenyReason.NEVER_FITS, DenyReason.BAD_REQUEST)
    if len(denials) == num_peers and all(denied.reason in hopeless for denied in denials):
        raise RequestError(400, f"the request can never fit: {denials[0]}", param="max_tokens", code="never_fits")
