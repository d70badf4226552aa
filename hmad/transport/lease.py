"""The prefill node's end of one transfer: reserve, send layers, commit, receive tokens; and give every page back."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hmad.facts.errors import HmadError, RemoteError, TransferAborted
from hmad.facts.timeline import FrameSpan, Timeline
from hmad.transport.bulk import OutgoingLayer
from hmad.transport.clock import ClockOffset
from hmad.wire.frames import NO_DIGEST
from hmad.wire.messages import (
    Abort,
    AbortReason,
    AnyMessage,
    Choice,
    Committed,
    Deny,
    DenyReason,
    Grant,
    Landed,
    Layer,
    Load,
    Reserve,
    TokenEntry,
)
from hmad.wire.prefill_transfers import PrefillTransfers
from hmad.wire.transfers import State


class Denied(RemoteError):
    """A decode node does not take this request. ``free_slots`` is how many it had when it said so."""

    def __init__(self, deny: Deny, free_slots: int) -> None:
        super().__init__(deny.message)
        self.free_slots = free_slots
        self.reason: DenyReason = deny.reason
        self.retry_after_s = deny.retry_after_s


@dataclass(frozen=True)
class StagedBlocks:
    """Encoded blocks of a run of layers in staging, as they go into one LAYER. ``release`` gives their memory back:
    called once, when nobody reads it any more."""

    first_layer: int
    num_layers: int
    first_block: int
    num_blocks: int
    payload: memoryview
    encoded_s: float
    release: Callable[[], None]


class Carrier(Protocol):
    """The session that carries a lease."""

    transfers: PrefillTransfers
    clock: ClockOffset
    load: Load
    peer_name: str
    num_kv_heads: int

    def send(self, message: AnyMessage, payload: bytes | None = None) -> None: ...

    def send_layer(self, layer: OutgoingLayer) -> None: ...

    def forget(self, lease: "Lease") -> None: ...


@dataclass(eq=False)
class _Page:
    """A LAYER between the queue and LANDED. Its memory is free when the kernel has it and D has it, or wants it not.

    Belongs to the loop's thread.
    """

    blocks: StagedBlocks
    span: FrameSpan
    layer: OutgoingLayer = field(init=False)
    begun: bool = False  # to leave, and counted
    sent: bool = False
    unwanted: bool = False

    def release_if_free(self) -> None:
        if self.sent and self.unwanted:
            self.blocks.release()


class Lease:
    """Slots on a decode node, from RESERVE until both sides have ended the transfer.

    Belongs to the loop's thread: threads that send hear of a frame's fate only by who was first to ``take`` it, and
    tell theirs as callbacks of the loop.
    """

    def __init__(self, session: Carrier, reserve: Reserve, prompt: bytes, timeline: Timeline) -> None:
        self.transfer_id, self.epoch = reserve.transfer_id, reserve.epoch
        self.format = reserve.format
        self.peer_name = session.peer_name
        self._session = session
        self._timeline = timeline
        self._pages: dict[tuple[int, int], _Page] = {}  # by (first layer, first block), until LANDED
        self._num_queued = 0  # LAYERs that have not begun to leave
        self._choices: tuple[Choice, ...] | None = None  # to commit once the last LAYER has begun to leave
        self._gone = False  # the decode node has sent its terminal frame, or the session is lost
        self._answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # raises why, if badly
        self._tokens: asyncio.Queue[tuple[TokenEntry, bytes] | Exception] = asyncio.Queue()
        session.transfers.reserve(reserve)
        session.send(reserve, prompt)

    # --- what the role does ---

    async def granted(self) -> None:
        """Wait for the slots. Raises Denied or RemoteError."""
        await self._answer

    def send_blocks(self, blocks: StagedBlocks) -> None:
        """Queue a LAYER; its memory is given back by itself."""
        if self._over:
            blocks.release()
            return
        extent = (blocks.first_layer, blocks.num_layers, blocks.first_block, blocks.num_blocks)
        span = self._timeline.spans.frame(FrameSpan(*extent, blocks.payload.nbytes, blocks.encoded_s))
        page = self._pages[blocks.first_layer, blocks.first_block] = _Page(blocks, span)
        self._num_queued += 1
        message = Layer(
            transfer_id=self.transfer_id,
            epoch=self.epoch,
            first_layer=blocks.first_layer,
            num_layers=blocks.num_layers,
            first_block=blocks.first_block,
            num_blocks=blocks.num_blocks,
            first_head=0,
            num_heads=self._session.num_kv_heads,
            digest=NO_DIGEST,  # until it leaves
        )
        page.layer = OutgoingLayer(message, blocks.payload, lambda: self._begun(page), lambda: self._sent(page))
        self._session.send_layer(page.layer)

    def commit(self, choices: Sequence[Choice]) -> None:
        """Every LAYER is queued: let these choices decode as soon as D has all of them."""
        self._choices = tuple(choices)
        self._commit_if_due()

    async def next_token(self) -> tuple[TokenEntry, bytes]:
        """The next entry of this transfer, and its extras. Raises TransferAborted or RemoteError."""
        item = await self._tokens.get()
        if isinstance(item, Exception):
            raise item
        return item

    def interrupt(self, error: HmadError) -> None:
        """Make whoever waits for a token get this error. The transfer goes on until ``close``."""
        self._tokens.put_nowait(error)

    def cancel(self, choices: Sequence[int]) -> None:
        """No more tokens are wanted of these choices."""
        cancel = None if self._gone else self._session.transfers.cancel(self.transfer_id, "cancelled", tuple(choices))
        if cancel is not None:
            self._session.send(cancel)

    def close(self, reason: AbortReason = AbortReason.CANCELLED) -> None:
        """Leave: end what has not ended. May be called at any time, and again."""
        if self._gone:
            return
        if self._state in (State.RESERVING, State.SENDING):
            self._give_up_pages()  # first: ABORT counts the LAYERs that have begun to leave
            self._session.send(self._session.transfers.abort(self.transfer_id, reason))
        else:
            self.cancel(())

    # --- what the session tells ---

    def granted_by_peer(self, grant: Grant) -> None:
        self._session.transfers.granted(grant)
        if not self._answer.done():
            self._answer.set_result(None)

    def denied_by_peer(self, deny: Deny) -> None:
        self._send_owed(self._session.transfers.denied(deny))
        self._end(Denied(deny, self._session.load.free_slots))

    def landed(self, landed: Landed) -> None:
        """D has verified a LAYER: its page is free, and D's clock says when its last byte came."""
        page = self._pages.get((landed.first_layer, landed.first_block))
        if page is not None:
            self._settle(page)  # D's answer may overtake the sender's report
        self._session.transfers.landed(landed)
        landed_s = self._session.clock.to_ours(landed.landed_s)
        verified_s = self._session.clock.to_ours(landed.verified_s)
        self._timeline.frame_landed(landed.layers, landed_s, verified_s)
        if page is not None:
            del self._pages[landed.first_layer, landed.first_block]
            page.span.landed_s, page.span.verified_s = landed_s, verified_s
            page.unwanted = True
            page.release_if_free()

    def committed_by_peer(self, committed: Committed) -> None:
        self._session.transfers.committed(committed)
        self._timeline.committed_s = self._session.clock.to_ours(committed.committed_s)
        self._timeline.clock_offset_s = self._session.clock.offset_s

    def aborted_by_peer(self, abort: Abort) -> None:
        self._give_up_pages()  # first: our ABORT in return counts the LAYERs that have begun to leave
        self._send_owed(self._session.transfers.aborted(abort))
        self._end(TransferAborted(abort.reason, f"decode node {self.peer_name}: {abort.message or abort.reason}"))

    def token_received(self, entry: TokenEntry, extras: bytes) -> None:
        """An entry that ``transfers.tokens`` has accepted."""
        self._tokens.put_nowait((entry, extras))
        if self._state is State.ENDED and not self._gone:  # several choices may finish in one frame
            self._end(None)

    def session_lost(self, error: RemoteError) -> None:
        self._end(error)

    # --- inside ---

    @property
    def _state(self) -> State:
        return self._session.transfers.state(self.transfer_id)

    @property
    def _over(self) -> bool:
        """No LAYER may leave any more."""
        return self._gone or self._state is not State.SENDING

    def _begun(self, page: _Page) -> None:
        """The sender's report: a LAYER's first byte is on its way."""
        self._count(page)
        self._commit_if_due()

    def _settle(self, page: _Page) -> None:
        """Decide here and now: a LAYER that has begun to leave counts, though its report is still to come; any other
        stays here."""
        if page.begun or page.sent:
            return
        if page.layer.take():
            page.sent = True
        else:
            self._count(page)

    def _count(self, page: _Page) -> None:
        """A LAYER counts from its first byte on."""
        if page.begun or self._over:
            return
        page.begun = True
        self._num_queued -= 1
        self._session.transfers.layer_sent(page.layer.message)
        page.span.sent_s = page.layer.begun_s
        self._timeline.frame_sent(page.span)

    def _commit_if_due(self) -> None:
        """COMMIT counts the LAYERs, so it waits for the last to begin; it overtakes its bytes on the other channel."""
        if self._choices is not None and self._num_queued == 0 and not self._over:
            self._session.send(self._session.transfers.commit(self.transfer_id, self._choices))

    def _sent(self, page: _Page) -> None:
        page.sent = True
        page.span.copied_s = page.layer.sent_s
        page.release_if_free()

    def _send_owed(self, abort: Abort | None) -> None:
        if abort is not None:
            self._session.send(abort)

    def _give_up_pages(self) -> None:
        """No LAYER leaves from now on but those that have begun to."""
        pages, self._pages = self._pages, {}
        for page in pages.values():
            self._settle(page)
            page.unwanted = True
            page.release_if_free()

    def _end(self, error: Exception | None) -> None:
        """D has nothing more to say."""
        self._gone = True
        self._give_up_pages()
        self._session.forget(self)
        if not self._answer.done():
            self._answer.set_exception(error or RemoteError("the transfer ended before it was granted"))
            self._answer.exception()  # whoever waited has it; nobody need have
        if error is None:
            self.ended.set_result(None)
            return
        self._tokens.put_nowait(error)
        self.ended.set_exception(error)
        self.ended.exception()  # nobody need ask
