"""One request on its way: placed on a decode node, prefilled, handed over, relayed; placed again when that is lost.

A **placement** is one attempt: a lease on one decode node and the prefill for it. A request gets another, with the next
epoch, as long as its client has not been sent anything: of a streamed answer until its first token, of a whole answer
until its end. Sampling is a pure function of (logits, parameters, seed, index), so nobody sees the difference.
"""

import asyncio
import secrets
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from itertools import count
from typing import Any, Protocol

import numpy as np

from hmad.compute.device import LayerClock, PrefillSequence
from hmad.compute.sampler import finish_reason
from hmad.facts.errors import HmadError, LocalError, RemoteError, RemoteProtocolError, TransferAborted
from hmad.facts.formats import FORMATS
from hmad.facts.logs import get_logger
from hmad.facts.requests import GenerationRequest, TokenEvent
from hmad.facts.sampling import SampledToken
from hmad.facts.timeline import LayerTimes, Spans, Timeline
from hmad.roles.prefill_engine import PrefillDone
from hmad.transport.lease import Lease, StagedBlocks
from hmad.wire.extras import unpack_extras
from hmad.wire.messages import AbortReason, Choice, FinishReason, Reserve, TokenEntry
from hmad.wire.sampling import sampling_to_wire

log = get_logger(__name__)

MAX_PLACEMENTS = 4  # a request that costs one decode node after the other is not to cost them all
OURS = (AbortReason.NON_FINITE, AbortReason.CANCELLED)  # another decode node would end the transfer for the same reason


class PlacementHost(Protocol):
    """The prefill role, seen from its placements."""

    transfer_after: bool
    vocab_size: int
    max_spans: int

    async def place(self, placement: "Placement") -> Lease | None:
        """Wait for our turn and for room; None when nothing needs to be shipped (a single output token)."""

    def submit(self, placement: "Placement") -> None:
        """Compute the prompt; ``ship``, ``note_layer`` and ``prefilled`` tell how it goes."""

    def forget(self, placement: "Placement") -> None:
        """Nobody wants to hear of this prompt any more."""

    def finished(self, timeline: Timeline) -> None:
        """A placement has ended, well or badly."""

    def lost(self, error: RemoteError) -> None:
        """A placement has ended badly, and no client will hear of it: count it."""


class RequestRun:
    """One request under way (hmad.facts.requests.Generation). Iterating it drives it."""

    def __init__(self, host: PlacementHost, request: GenerationRequest) -> None:
        self.request_id = request.request_id
        self._host = host
        self._request = request
        self._transfer_id = secrets.token_bytes(16)
        self._arrived_s = time.monotonic()
        self._unfinished = set(range(len(request.seeds)))
        self._sent = False  # the client may have seen something
        self._ended: HmadError | None = None
        self._epochs = count()  # one for each RESERVE: asked again, a decode node must not take it for a repetition
        self._num_placements = 0
        self._placement = self._next_placement()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Events of one placement after the other, until every choice has finished."""
        while self._unfinished:
            try:
                async with aclosing(self._placement.events()) as events:
                    async for event in events:
                        self._sent = self._request.streamed
                        if event.finish_reason:
                            self._unfinished.discard(event.choice)
                        yield event
                return
            except RemoteError as error:
                self._place_again(error)

    def stop_choice(self, choice: int) -> None:
        """The edge has all it wants of this choice: no more events come for it."""
        self._unfinished.discard(choice)
        self._placement.stop_choice(choice)

    def end(self, error: HmadError) -> None:
        """Make whoever iterates get this error: the node stops."""
        self._ended = error
        self._placement.end(error)

    def close(self) -> None:
        """End whatever has not ended. Nobody iterates any more."""
        self._placement.close(AbortReason.CANCELLED)

    def _place_again(self, error: RemoteError) -> None:
        """Start over elsewhere, unless the client would notice or nobody else could do better: then raise."""
        self._placement.close(AbortReason.CANCELLED)
        self._num_placements += 1
        hopeless = isinstance(error, TransferAborted) and error.reason in OURS
        lied = isinstance(error, RemoteProtocolError)  # in an answer: its transfer, and so this id, are still alive
        if self._ended or self._sent or hopeless or lied or self._num_placements == MAX_PLACEMENTS:
            raise error
        log.warning("placed again", transfer_id=self._transfer_id, number=self._num_placements, error=str(error))
        self._host.lost(error)
        self._placement = self._next_placement()

    def _next_placement(self) -> "Placement":
        num_tokens = len(self._request.prompt_token_ids)
        spans = Spans(self._host.max_spans)
        timeline = Timeline(self.request_id, num_tokens, self._request.received_s, self._arrived_s, spans=spans)
        choices = tuple(sorted(self._unfinished))
        return Placement(self._host, self._request, choices, self._transfer_id, self._epochs, timeline)


class Placement:
    """One attempt at the unfinished choices of a request. On the wire they are numbered from 0."""

    def __init__(
        self,
        host: PlacementHost,
        request: GenerationRequest,
        choices: tuple[int, ...],
        transfer_id: bytes,
        epochs: Iterator[int],
        timeline: Timeline,
    ) -> None:
        self.request = request
        self.transfer_id = transfer_id
        self._epochs = epochs
        self.timeline = timeline
        self.lease: Lease | None = None
        self.seeds = tuple(request.seeds[choice] for choice in choices)
        self.sequence = PrefillSequence(request.prompt_token_ids, request.params, self.seeds, format=None)
        self.prompt_bytes = np.asarray(request.prompt_token_ids, "<u4").tobytes()
        self._host = host
        self._choices = choices
        self._done: asyncio.Future[PrefillDone] = asyncio.get_running_loop().create_future()
        self._held_back: list[StagedBlocks] = []  # of a transfer that starts after the prompt is computed
        self._live: set[int] = set()  # choices that still decode, as the wire numbers them
        self._stopped: set[int] = set()  # choices of which nobody wants more, numbered so too
        self._closed = False

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """An attempt's life: place, prefill, first tokens to the client at once, commit, relay."""
        self.lease = await self._host.place(self)
        first_tokens = await self._prefill()
        for event in self._first_events(first_tokens):
            yield event
        while self._live and self.lease is not None:
            next_event = await self._next_event(self.lease)
            if next_event is not None:
                yield next_event
        self._finish()

    def stop_choice(self, choice: int) -> None:
        """No more events are wanted of this choice of the request. It need not have begun: when a node was lost, the
        end of what it had sent may be read when the next placement is under way."""
        if choice not in self._choices:
            return
        index = self._choices.index(choice)
        self._stopped.add(index)
        if index in self._live:
            self._live.discard(index)
            if self.lease is not None:
                self.lease.cancel([index])

    def end(self, error: HmadError) -> None:
        """Make whoever waits for our events get this error."""
        if self.lease is not None:
            self.lease.interrupt(error)
        if not self._done.done():
            self._done.set_exception(error)
            self._done.exception()  # nobody need wait

    def close(self, reason: AbortReason) -> None:
        """End whatever has not ended. Nobody asks for our events any more."""
        self.sequence.cancelled = True
        self._host.forget(self)
        self._drop_held_back()
        self._close_lease(reason)
        self._finish()

    # --- prefill ---

    async def _prefill(self) -> list[SampledToken]:
        """Compute the prompt; its layers leave meanwhile. ``prefilled`` commits when the first tokens are known."""
        self.sequence.format = FORMATS[self.lease.format] if self.lease else None
        self._host.submit(self)
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
        if self.lease is not None and self.lease.ended.done() and (self._live or not self._done.done()):
            self.sequence.cancelled = True
            self.lease.ended.result()
        return self._done.result()

    def reserve_message(self, format_name: str) -> Reserve:
        return Reserve(
            transfer_id=self.transfer_id,
            epoch=next(self._epochs),
            format=format_name,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_choices=len(self.seeds),
            sampling=sampling_to_wire(self.request.params),
        )

    def note_layer(self, clock: LayerClock) -> None:
        """Layers of ours were computed, maybe for one more chunk."""
        for layer_id in clock.layers:
            times = self.timeline.layers.setdefault(layer_id, LayerTimes(clock.started_s, clock.kv_ready_s))
            times.kv_ready_s = clock.kv_ready_s
        self.timeline.spans.computed(clock.layers, clock.started_s, clock.kv_ready_s)
        self.timeline.prefill_started_s = self.timeline.prefill_started_s or clock.started_s

    def ship(self, blocks: StagedBlocks) -> None:
        """Blocks are ready for the wire; of a prompt that ships nothing, there is no use for them."""
        if self.lease is None:
            blocks.release()
        elif self._host.transfer_after:
            self._held_back.append(blocks)
        else:
            self.lease.send_blocks(blocks)

    def prefilled(self, done: PrefillDone) -> None:
        """The prompt is computed (or failed): commit the choices that go on, at once, whoever reads our events."""
        if done.first_tokens:
            self.timeline.first_token_s = done.finished_s
            self.timeline.spans.compute_ended(done.finished_s)
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
            for index, (seed, token) in enumerate(zip(self.seeds, first_tokens, strict=True))
            if index not in self._stopped and finish_reason(token.token_id, 0, self.request.params) is None
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

    def _first_events(self, first_tokens: Sequence[SampledToken]) -> Iterable[TokenEvent]:
        for index, (choice, token) in enumerate(zip(self._choices, first_tokens, strict=True)):
            if index not in self._stopped:
                self._note_token(choice)
                yield TokenEvent(choice, 0, token, finish_reason(token.token_id, 0, self.request.params))

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
        choice = self._choices[entry.choice]
        self._note_token(choice)
        return TokenEvent(choice, entry.index, self._token(entry, extras), entry.finish_reason)

    def _note_token(self, choice: int) -> None:
        self.timeline.num_output_tokens += 1
        self.timeline.spans.token(choice, time.monotonic())

    def _token(self, entry: TokenEntry, extras: bytes) -> SampledToken:
        params, vocab_size = self.request.params, self._host.vocab_size
        token_id = entry.token_id or 0
        if token_id >= vocab_size:
            raise RemoteProtocolError(f"the decode node sent token {token_id}, the vocabulary has {vocab_size}")
        logprobs, logits = unpack_extras(extras, params.num_logprobs is not None, params.want_logits, vocab_size)
        return SampledToken(token_id, logprobs, logits)

    # --- leaving ---

    def _finish(self) -> None:
        """Keep the record, once."""
        if not self._closed:
            self._closed = True
            self.timeline.finished_s = time.monotonic()
            self._host.finished(self.timeline)

    def _close_lease(self, reason: AbortReason) -> None:
        if self.lease is not None:
            self.lease.close(reason)

    def _drop_held_back(self) -> None:
        for blocks in self._held_back:
            blocks.release()
        self._held_back = []
