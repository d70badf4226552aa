"""The prefill role: queue, pick a peer, compute, ship every layer while later ones compute, hand over, relay tokens."""

import asyncio
import secrets
import time
from asyncio import FIRST_COMPLETED
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from hmad.compute.device import EncodedBlocks, LayerClock, PrefillChunk, PrefillSequence
from hmad.compute.sampler import finish_reason
from hmad.compute.staging import StagingPool
from hmad.facts.errors import LocalError, RemoteError, RemoteProtocolError, RequestError, TransferAborted
from hmad.facts.formats import FORMATS, KVGeometry
from hmad.facts.requests import GenerationRequest, TokenEvent
from hmad.facts.sampling import SampledToken
from hmad.facts.timeline import LayerTimes, Timeline
from hmad.roles.engines import PrefillDone, PrefillEngine
from hmad.roles.scheduler import rank_peers
from hmad.transport.lease import Denied, Lease, StagedBlocks
from hmad.transport.prefill_link import PeerLink
from hmad.wire.extras import unpack_extras
from hmad.wire.frames import DIGEST_NONE
from hmad.wire.messages import AbortReason, Choice, DenyReason, FinishReason, Reserve, TokenEntry
from hmad.wire.sampling import sampling_to_wire

NUM_TIMELINES = 64
RETRY_AFTER_S = 1.0
NO_DIGEST = bytes(16)


@dataclass(frozen=True)
class PrefillSettings:
    """What the role needs of the configuration and the model."""

    geometry: KVGeometry
    vocab_size: int
    max_batch_tokens: int
    max_prompt_tokens: int  # what history (or staging, when nothing is sent before the end) has room for
    max_queue: int
    queue_timeout_s: float
    transfer_after: bool  # the sequential baseline: nothing is sent before the prompt is computed
    digest: str


class PrefillRole:
    """Generates: the seam that the REST edge calls (hmad.facts.requests.Generator)."""

    def __init__(self, settings: PrefillSettings, staging: StagingPool, finished: Callable[[Timeline], None]) -> None:
        self.settings = settings
        self.staging = staging
        self.engine: PrefillEngine
        self.links: Sequence[PeerLink] = ()
        self.timelines: deque[Timeline] = deque(maxlen=NUM_TIMELINES)
        self._finished = finished
        self.num_waiting = 0
        self.num_running = 0
        self._loop = asyncio.get_running_loop()
        self._head = asyncio.Lock()  # whoever holds it is the head of the queue; the lock is fair, so it is the queue
        self._changed = asyncio.Event()
        self._runs: dict[PrefillSequence, RequestRun] = {}

    # --- what the edge calls ---

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> "AsyncIterator[RequestRun]":
        """One request; leaving the context cancels whatever is not finished."""
        run = RequestRun(self, request)
        try:
            yield run
        finally:
            run.close()

    def check_admissible(self, requests: Sequence[GenerationRequest]) -> None:
        """Raise RequestError for what would be refused at once."""
        longest = max(len(request.prompt_token_ids) for request in requests)
        if longest > self.settings.max_prompt_tokens:
            raise RequestError(
                400,
                f"the prompt has {longest} tokens, this prefill node has memory for {self.settings.max_prompt_tokens}: "
                "ask its operator for more history-bytes (or staging-bytes with transfer = after)",
                param="prompt",
                code="never_fits",
            )
        if self.num_waiting + len(requests) > self.settings.max_queue:
            raise RequestError(
                429,
                f"the queue is full: {self.num_waiting} requests wait, {self.settings.max_queue} may",
                code="queue_full",
                retry_after_s=RETRY_AFTER_S,
            )

    def finished(self, timeline: Timeline) -> None:
        self.timelines.append(timeline)
        self._finished(timeline)

    # --- placing ---

    async def place(self, run: "RequestRun") -> Lease | None:
        """Wait for our turn and for room; None when nothing needs to be shipped (a single output token)."""
        self.check_admissible([run.request])
        self.num_waiting += 1
        try:
            async with asyncio.timeout(self.settings.queue_timeout_s), self._head:
                await self._wait_until(self._engine_has_room)
                return None if run.request.params.max_tokens == 1 else await self._reserve_somewhere(run)
        except TimeoutError:
            raise self._timed_out() from None
        finally:
            self.num_waiting -= 1

    def _engine_has_room(self) -> bool:
        """Place a request only when its prefill is near: slots on the decode node are not to wait for our queue."""
        if self.settings.transfer_after:  # a prompt's whole KV waits in staging: one prompt at a time
            return self.num_running == 0
        return self.engine.backlog_tokens < self.settings.max_batch_tokens

    async def _reserve_somewhere(self, run: "RequestRun") -> Lease:
        """Ask the peers, the emptiest first, until one grants; wait for a change when all are full."""
        while True:
            self._changed.clear()
            denials = []
            for link in rank_peers(self.links):
                try:
                    return await self._reserve(link, run)
                except Denied as denied:
                    denials.append(denied)
                except RemoteError:
                    continue  # the link is gone or going; it says so itself
            refuse_if_hopeless(denials)
            await self._changed.wait()

    async def _reserve(self, link: PeerLink, run: "RequestRun") -> Lease:
        lease = link.session.reserve(run.reserve_message(link.session.agreement.format), run.prompt_bytes, run.timeline)
        try:
            await lease.granted()
        except asyncio.CancelledError:
            lease.close()
            raise
        run.timeline.granted_s = time.monotonic()
        run.timeline.peer, run.timeline.kv_format = link.name, lease.format
        return lease

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _timed_out(self) -> RequestError:
        troubles = [f"{link.name}: {link.trouble or 'full'}" for link in self.links]
        return RequestError(
            503,
            f"no decode node had room within {self.settings.queue_timeout_s:g} s ({'; '.join(troubles)})",
            code="no_capacity",
            retry_after_s=RETRY_AFTER_S,
        )

    def changed(self) -> None:
        """A peer's load, a link or the engine's backlog has changed: whoever waits looks again."""
        self._changed.set()

    # --- computing: the engine's thread hands over, the loop takes ---

    def submit(self, run: "RequestRun") -> None:
        self._runs[run.sequence] = run
        self.num_running += 1
        self.engine.submit(run.sequence)

    def blocks_encoded(self, blocks: EncodedBlocks) -> None:
        """Engine thread: digest the blocks while they are in cache, then give them to the loop."""
        digest = NO_DIGEST if self.settings.digest == DIGEST_NONE else xxhash.xxh3_128_digest(blocks.payload.data)
        self._loop.call_soon_threadsafe(self._ship, blocks, digest)

    def layer_computed(self, chunks: Sequence[PrefillChunk], clock: LayerClock) -> None:
        """Engine thread."""
        self._loop.call_soon_threadsafe(self._note_layer, [chunk.sequence for chunk in chunks], clock)

    def prefill_done(self, done: PrefillDone) -> None:
        """Engine thread."""
        self._loop.call_soon_threadsafe(self._prefilled, done)

    def _ship(self, blocks: EncodedBlocks, digest: bytes) -> None:
        def release() -> None:
            self.staging.release(blocks.page)

        run = self._runs.get(blocks.sequence)
        staged = StagedBlocks(
            blocks.layer_id, blocks.first_block, blocks.num_blocks, blocks.payload.data, digest, release
        )
        if run is None or run.lease is None:
            release()
        else:
            run.ship(staged)

    def _note_layer(self, sequences: Iterable[PrefillSequence], clock: LayerClock) -> None:
        for sequence in sequences:
            run = self._runs.get(sequence)
            if run is not None:
                run.note_layer(clock)

    def _prefilled(self, done: PrefillDone) -> None:
        run = self._runs.pop(done.sequence, None)
        self.num_running -= 1
        if run is not None:
            run.prefilled(done)
        self.changed()


class RequestRun:
    """One request under way (hmad.facts.requests.Generation). Iterating it drives it."""

    def __init__(self, role: PrefillRole, request: GenerationRequest) -> None:
        self.request_id = secrets.token_hex(16)
        self.request = request
        self.lease: Lease | None = None
        self.timeline = Timeline(self.request_id, len(request.prompt_token_ids), time.monotonic())
        self.sequence = PrefillSequence(request.prompt_token_ids, request.params, request.seeds, format=None)
        self.prompt_bytes = np.asarray(request.prompt_token_ids, "<u4").tobytes()
        self._role = role
        self._done: asyncio.Future[PrefillDone] = asyncio.get_running_loop().create_future()
        self._held_back: list[StagedBlocks] = []  # of a transfer that starts after the prompt is computed
        self._live: set[int] = set()  # choices that still decode

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """A request's life: place, prefill, first tokens to the client at once, commit, relay."""
        self.lease = await self._role.place(self)
        first_tokens = await self._prefill()
        for event in self._first_events(first_tokens):
            yield event
        while self._live and self.lease is not None:
            next_event = await self._next_event(self.lease)
            if next_event is not None:
                yield next_event
        self._finish()

    def stop_choice(self, choice: int) -> None:
        """The edge has all it wants of this choice: no more events come for it."""
        if choice in self._live:
            self._live.discard(choice)
            if self.lease is not None:
                self.lease.cancel([choice])

    def close(self) -> None:
        """End whatever has not ended. Nobody iterates any more."""
        self.sequence.cancelled = True
        self._drop_held_back()
        self._close_lease(AbortReason.CANCELLED)
        self._finish()

    # --- prefill ---

    async def _prefill(self) -> list[SampledToken]:
        """Compute the prompt; its layers leave meanwhile. ``prefilled`` commits when the first tokens are known."""
        self.sequence.format = FORMATS[self.lease.format] if self.lease else None
        self._role.submit(self)
        done = await self._done_or_abandoned()
        if done.sequence.error is not None:
            raise done.sequence.error
        if not done.first_tokens:
            raise LocalError("the prompt was cancelled before its first token")
        return done.first_tokens

    async def _done_or_abandoned(self) -> PrefillDone:
        """The prompt's end; or, when the decode node ends the transfer before it, why: then nobody needs the rest."""
        ends: list[asyncio.Future[Any]] = [self._done, *([self.lease.ended] if self.lease else [])]
        await asyncio.wait(ends, return_when=FIRST_COMPLETED)
        if self.lease is not None and not self._done.done():
            self.sequence.cancelled = True
            self.lease.ended.result()
        return self._done.result()

    def reserve_message(self, format_name: str) -> Reserve:
        return Reserve(
            transfer_id=secrets.token_bytes(16),
            epoch=0,
            format=format_name,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_choices=len(self.request.seeds),
            sampling=sampling_to_wire(self.request.params),
        )

    def note_layer(self, clock: LayerClock) -> None:
        """A layer of ours was computed, maybe for one more chunk."""
        times = self.timeline.layers.setdefault(clock.layer_id, LayerTimes(clock.started_s, clock.kv_ready_s))
        times.kv_ready_s = clock.kv_ready_s
        self.timeline.prefill_started_s = self.timeline.prefill_started_s or clock.started_s

    def ship(self, blocks: StagedBlocks) -> None:
        """Blocks are ready for the wire."""
        if self.lease is not None and not self._role.settings.transfer_after:
            self.lease.send_blocks(blocks)
        else:
            self._held_back.append(blocks)

    def prefilled(self, done: PrefillDone) -> None:
        """The prompt is computed (or failed): commit the choices that go on, at once, whoever reads our events."""
        if done.first_tokens:
            self.timeline.first_token_s = done.finished_s
        if done.first_tokens and not self.sequence.cancelled:
            self._hand_over(done.first_tokens)
        else:
            self._drop_held_back()
            self._close_lease(AbortReason.NON_FINITE if done.sequence.error else AbortReason.CANCELLED)
        if not self._done.done():
            self._done.set_result(done)

    def _hand_over(self, first_tokens: list[SampledToken]) -> None:
        choices = [
            Choice(index, seed, token.token_id)
            for index, (seed, token) in enumerate(zip(self.request.seeds, first_tokens, strict=True))
            if finish_reason(token.token_id, 0, self.request.params) is None
        ]
        self._live = {choice.index for choice in choices}
        if self.lease is None or not choices:
            self._drop_held_back()
            self._close_lease(AbortReason.CANCELLED)
            return
        for blocks in self._held_back:
            self.lease.send_blocks(blocks)
        self._held_back = []
        self.lease.commit(choices)

    def _first_events(self, first_tokens: list[SampledToken]) -> Iterable[TokenEvent]:
        for index, token in enumerate(first_tokens):
            self.timeline.num_output_tokens += 1
            yield TokenEvent(index, token, finish_reason(token.token_id, 0, self.request.params))

    # --- decode ---

    async def _next_event(self, lease: Lease) -> TokenEvent | None:
        """The next token of a choice that is still wanted; None for one that is not."""
        entry, extras = await lease.next_token()
        if entry.choice not in self._live:
            return None
        if entry.finish_reason is not None:
            self._live.discard(entry.choice)
        if entry.token_id is None or entry.finish_reason is FinishReason.CANCELLED:
            raise TransferAborted(AbortReason.CANCELLED, "the decode node cancelled a choice that nobody asked it to")
        self.timeline.num_output_tokens += 1
        return TokenEvent(entry.choice, self._token(entry, extras), entry.finish_reason)

    def _token(self, entry: TokenEntry, extras: bytes) -> SampledToken:
        params, vocab_size = self.request.params, self._role.settings.vocab_size
        token_id = entry.token_id or 0
        if token_id >= vocab_size:
            raise RemoteProtocolError(f"the decode node sent token {token_id}, the vocabulary has {vocab_size}")
        logprobs, logits = unpack_extras(extras, params.num_logprobs is not None, params.want_logits, vocab_size)
        return SampledToken(token_id, logprobs, logits)

    def _finish(self) -> None:
        """Keep the record of a request that got as far as a token, once."""
        if self.timeline.first_token_s is not None and self.timeline.finished_s is None:
            self.timeline.finished_s = time.monotonic()
            self._role.finished(self.timeline)

    # --- leaving ---

    def _close_lease(self, reason: AbortReason) -> None:
        if self.lease is not None:
            self.lease.close(reason)

    def _drop_held_back(self) -> None:
        for blocks in self._held_back:
            blocks.release()
        self._held_back = []


def refuse_if_hopeless(denials: Sequence[Denied]) -> None:
    """A request that no peer could ever take is the client's to change."""
    hopeless = (DenyReason.NEVER_FITS, DenyReason.BAD_REQUEST)
    if denials and all(denied.reason in hopeless for denied in denials):
        raise RequestError(400, f"the request can never fit: {denials[0]}", param="max_tokens", code="never_fits")
