"""The decode role: lease slots, let raw blocks land in them, join the running batch, stream tokens back."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np

from hmad.compute.arena import Arena
from hmad.compute.landing import Landing, Lane
from hmad.compute.sequence import DecodeSequence, Segment, tail_tokens
from hmad.facts.errors import HmadError, LocalError, NonFiniteKVError, NonFiniteLogitsError, RemoteProtocolError
from hmad.facts.formats import FORMATS, KVFormat
from hmad.facts.logs import get_logger
from hmad.facts.sampling import SamplingParams
from hmad.roles.decode_engine import DecodeEngine, StepOutput
from hmad.roles.scheduler import slots_needed, slots_per_choice
from hmad.transport.decode_listener import DecodeSession
from hmad.wire.decode_transfer import DecodeTransfer
from hmad.wire.extras import pack_extras
from hmad.wire.messages import (
    AbortReason,
    Choice,
    Commit,
    DenyReason,
    FinishReason,
    Layer,
    Load,
    Reserve,
    TokenEntry,
)
from hmad.wire.sampling import sampling_from_wire

log = get_logger(__name__)

RETRY_AFTER_S = 1.0
BATCH_SHARE_AHEAD = 4  # a quarter of a batch may be leased beyond it


@dataclass(eq=False)
class Holding:
    """What one transfer holds on this node: its slots, and its choices in the engine."""

    session: DecodeSession
    prompt_token_ids: np.ndarray  # uint32
    params: SamplingParams
    format: KVFormat
    raw_slots: np.ndarray  # int32
    tail_slots: list[np.ndarray]  # one per choice
    running: dict[int, DecodeSequence] = field(default_factory=dict)  # by choice
    released: bool = False  # the wire is through with it
    num_bytes: int = 0  # of KV that began to land
    landing_since_s: float | None = None

    @property
    def all_slots(self) -> list[np.ndarray]:
        return [self.raw_slots, *self.tail_slots]


Owner: TypeAlias = tuple[DecodeTransfer, Holding, int]  # of a sequence; it is this choice of the transfer


@dataclass(frozen=True)
class DecodeCounters:
    """Who counts what happens on this node."""

    received: Callable[[str, int], None]  # peer, bytes of a LAYER that begins to land
    rate: Callable[[str, float], None]  # peer, bytes/s of a transfer's KV, its first byte to its last
    sent_tokens: Callable[[int], None]
    failed: Callable[[str], None]  # cause, one of our own words


class DecodeRole:
    """Owns the arena and what lies in it. Everything here runs on the loop's thread; steps run in the engine's."""

    def __init__(
        self,
        arena: Arena,
        landing: Landing,
        tail_format: KVFormat,
        max_model_len: int,
        vocab_size: int,
        counters: DecodeCounters,
    ) -> None:
        self.arena = arena
        self._landing = landing
        self._vocab_size = vocab_size
        self._counters = counters
        self._tail_format = tail_format
        self._max_model_len = max_model_len
        self._holdings: dict[DecodeTransfer, Holding] = {}
        self._num_choices = 0  # of all holdings
        self._owners: dict[DecodeSequence, Owner] = {}
        self._loop = asyncio.get_running_loop()
        self.engine: DecodeEngine
        self.num_tokens = 0
        self.num_failed = 0
        self.draining = False
        self._empty = asyncio.Event()  # nothing is held
        self._empty.set()

    def deliver_from_engine(self, outputs: Iterable[StepOutput], left: list[DecodeSequence]) -> None:
        """The engine's thread hands over what a step brought, and which sequences it is through with."""
        self._loop.call_soon_threadsafe(self._deliver, outputs, left)

    def slots_by_state(self) -> dict[str, int]:
        """Slots into which KV lands, slots that decode reads, and free ones."""
        landing = sum(len(slots) for h in self._holdings.values() if not h.running for slots in h.all_slots)
        free = self.arena.free_slots
        used = self.arena.num_slots - free
        return {"landing_slots": landing, "decoding_slots": used - landing, "free_slots": free}

    # --- stopping ---

    def drain(self) -> None:
        """Take nothing new; what is here goes on."""
        self.draining = True

    async def drained(self) -> None:
        """Wait until nothing is held any more."""
        await self._empty.wait()

    def end_transfers(self, message: str) -> None:
        """Tell the prefill nodes that what is still here ends now."""
        for transfer, holding in list(self._holdings.items()):
            holding.session.abort(transfer, AbortReason.SHUTDOWN, message)

    # --- DecodeHost: what sessions ask ---

    def load(self) -> Load:
        return Load(
            free_slots=0 if self._too_far_ahead(1) else self.arena.free_slots,
            total_slots=self.arena.num_slots,
            running=self.engine.num_running,
            waiting=self.engine.num_waiting,
        )

    def reserve(self, session: DecodeSession, transfer: DecodeTransfer, message: Reserve, prompt: memoryview) -> None:
        """Lease room for the prompt and the longest answer, or say why not."""
        params = sampling_from_wire(message.sampling)
        fmt = FORMATS[message.format]
        prompt_token_ids = np.frombuffer(prompt, "<u4")
        needed = slots_needed(fmt, self._tail_format, message.num_prompt_tokens, params, message.num_choices)
        never = self._never_fits(message, needed)
        bad = self._mistake(prompt_token_ids, params)
        if self.draining:
            session.deny(transfer, DenyReason.DRAINING, "this decode node drains", RETRY_AFTER_S)
        elif bad:
            session.deny(transfer, DenyReason.BAD_REQUEST, bad, 0.0)
        elif never:
            session.deny(transfer, DenyReason.NEVER_FITS, never, 0.0)
        elif needed > self.arena.free_slots:
            full = f"{needed} slots are needed, {self.arena.free_slots} of {self.arena.num_slots} are free"
            session.deny(transfer, DenyReason.FULL, full, RETRY_AFTER_S)
        elif self._too_far_ahead(message.num_choices):
            ahead = f"{self._num_choices} choices are here, {self.engine.max_batch_size} decode at once"
            session.deny(transfer, DenyReason.FULL, ahead, RETRY_AFTER_S)
        else:
            self._hold(session, transfer, message, prompt_token_ids, params)
            session.grant(transfer)

    def open_lane(self, when_free: Callable[[], object]) -> Lane:
        return self._landing.open_lane(when_free)

    def place(self, transfer: DecodeTransfer, layer: Layer, lane: Lane) -> Sequence[memoryview]:
        """Where these blocks and heads are to be received."""
        holding = self._holdings[transfer]
        slots = holding.raw_slots[layer.first_block : layer.first_block + layer.num_blocks]
        size = layer.num_layers * len(slots) * self.arena.geometry.block_bytes(holding.format, layer.num_heads)
        holding.num_bytes += size
        holding.landing_since_s = holding.landing_since_s or time.monotonic()
        self._counters.received(holding.session.agreement.peer_node_id, size)
        return lane.place(layer.layers, slots, holding.format, layer.first_head, layer.num_heads)

    def ready(self, session: DecodeSession, transfer: DecodeTransfer, commit: Commit) -> None:
        """Every layer is here and verified: the choices join the running batch as soon as all of it is in its slots."""
        if any(choice.first_token >= self._vocab_size for choice in commit.choices):
            raise RemoteProtocolError(f"COMMIT has a first token outside the vocabulary of {self._vocab_size}")
        self._landing.when_stored(partial(self._loop.call_soon_threadsafe, self._join, session, transfer, commit))

    def _join(self, session: DecodeSession, transfer: DecodeTransfer, commit: Commit) -> None:
        holding = self._holdings.get(transfer)
        if holding is None or transfer.over:  # cancelled, or its session lost, meanwhile
            return
        holding.running = {choice.index: self._sequence(holding, choice) for choice in commit.choices}
        for choice, sequence in holding.running.items():
            self._owners[sequence] = (transfer, holding, choice)
        self._note_rate(holding, transfer.last_landed_s)
        # First the batch: a choice that was cancelled meanwhile can only be dropped from where it is.
        self.engine.join_batch(holding.running.values())
        session.committed(transfer)

    def cancelled(self, transfer: DecodeTransfer, choices: Sequence[int]) -> None:
        running = self._holdings[transfer].running
        self.engine.drop([running[choice] for choice in choices if choice in running])

    def release(self, transfer: DecodeTransfer) -> None:
        """The wire is through with a transfer; its slots go back once the engine is, too."""
        holding = self._holdings[transfer]
        holding.released = True
        self.engine.drop(list(holding.running.values()))
        self._free_if_unused(transfer)

    def failed(self, cause: str) -> None:
        self._counters.failed(cause)

    # --- inside ---

    def _mistake(self, prompt_token_ids: np.ndarray, params: SamplingParams) -> str | None:
        """What no prefill node of ours would ask for, and what would disturb other sequences of the batch."""
        foreign = [t for t in (int(prompt_token_ids.max()), *params.forced_token_ids) if t >= self._vocab_size]
        if foreign:
            return f"token {foreign[0]} is outside the vocabulary of {self._vocab_size}"
        if tail_tokens(params) < 1:  # no tail: its step would write into the block of whoever stands next to it
            return f"an answer of {params.max_tokens} tokens ends on the prefill node"
        return None

    def _never_fits(self, message: Reserve, needed: int) -> str | None:
        length = message.num_prompt_tokens + message.sampling.max_tokens
        if length > self._max_model_len:
            return f"{length} tokens are more than this decode node's max-model-len of {self._max_model_len}"
        if needed > self.arena.num_slots:
            return f"{needed} slots are needed, the whole arena has {self.arena.num_slots}: raise --arena-bytes"
        return None

    def _too_far_ahead(self, num_choices: int) -> bool:
        """Whether these would stand in line here: beyond the batch, only as many as keep it full while others arrive.

        The prefill node's queue is where requests wait: it is bounded and fair, and has not begun to answer them.
        """
        at_most = self.engine.max_batch_size + max(1, self.engine.max_batch_size // BATCH_SHARE_AHEAD)
        return bool(self._holdings) and self._num_choices + num_choices > at_most

    def _hold(
        self,
        session: DecodeSession,
        transfer: DecodeTransfer,
        message: Reserve,
        prompt_token_ids: np.ndarray,
        params: SamplingParams,
    ) -> None:
        fmt = FORMATS[message.format]
        raw = self.arena.reserve(fmt.num_blocks(message.num_prompt_tokens))
        per_choice = slots_per_choice(self._tail_format, params)
        tails = [self.arena.reserve(per_choice) for _ in range(message.num_choices)]
        self._empty.clear()
        self._holdings[transfer] = Holding(session, prompt_token_ids, params, fmt, raw, tails)
        self._num_choices += len(tails)

    def _note_rate(self, holding: Holding, landed_s: float) -> None:
        if holding.landing_since_s is not None and landed_s > holding.landing_since_s:
            rate = holding.num_bytes / (landed_s - holding.landing_since_s)
            self._counters.rate(holding.session.agreement.peer_node_id, rate)

    def _sequence(self, holding: Holding, choice: Choice) -> DecodeSequence:
        return DecodeSequence(
            prompt_token_ids=holding.prompt_token_ids,
            params=holding.params,
            seed=choice.seed,
            prefix=(Segment(holding.format, len(holding.prompt_token_ids), holding.raw_slots),),
            tail_format=self._tail_format,
            tail_slots=holding.tail_slots[choice.index],
            output_token_ids=[choice.first_token],
        )

    def _deliver(self, outputs: Iterable[StepOutput], left: list[DecodeSequence]) -> None:
        """A step's tokens to the prefill nodes they belong to, one batch per session."""
        outputs = list(outputs)
        by_session: dict[DecodeSession, list[tuple[TokenEntry, bytes]]] = defaultdict(list)
        for output in outputs:  # first of all: a failed choice ends its transfer, and no token of it may follow
            if output.error is not None:
                transfer, holding, _ = self._owners[output.sequence]
                self._fail(transfer, holding, output.error)
        for output in outputs:
            transfer, holding, choice = self._owners[output.sequence]
            if not transfer.over and holding.session.is_open:
                by_session[holding.session].append(entry_of(transfer, choice, output))
        num_tokens = sum(len(entries) for entries in by_session.values())
        self.num_tokens += num_tokens
        self._counters.sent_tokens(num_tokens)
        for sequence in left:
            self._leave_engine(sequence)
        for session, entries in by_session.items():
            session.send_tokens(entries)

    def _fail(self, transfer: DecodeTransfer, holding: Holding, error: HmadError) -> None:
        """One choice cannot go on, so the request cannot: end the transfer, and with it the other choices."""
        if transfer.over:  # another choice of it failed in the same step
            return
        self.num_failed += 1
        log.error(
            "a sequence cannot go on", transfer_id=transfer.transfer_id, peer=holding.session.name, error=str(error)
        )
        non_finite = isinstance(error, NonFiniteKVError | NonFiniteLogitsError)
        holding.session.abort(transfer, AbortReason.NON_FINITE if non_finite else AbortReason.INTERNAL, str(error))

    def _leave_engine(self, sequence: DecodeSequence) -> None:
        """No step reads or writes its slots any more."""
        transfer, holding, choice = self._owners.pop(sequence)
        del holding.running[choice]
        self._free_if_unused(transfer)

    def _free_if_unused(self, transfer: DecodeTransfer) -> None:
        holding = self._holdings[transfer]
        if not holding.released or holding.running:
            return
        del self._holdings[transfer]
        self._num_choices -= len(holding.tail_slots)
        for slots in holding.all_slots:
            self.arena.release(slots)
        if not self._holdings:
            self.check_integrity()
            self._empty.set()
        holding.session.tell_load()

    def check_integrity(self) -> None:
        """Raise LocalError unless the arena's reference counts are exactly those of what we hold."""
        num_choices = sum(len(holding.tail_slots) for holding in self._holdings.values())
        if num_choices != self._num_choices:
            raise LocalError(f"{self._num_choices} choices are counted, {num_choices} are held")
        self.arena.check_integrity(slots for holding in self._holdings.values() for slots in holding.all_slots)


def entry_of(transfer: DecodeTransfer, choice: int, output: StepOutput) -> tuple[TokenEntry, bytes]:
    """What the prefill node is told of one choice, and the bytes that go with it. By position: this is done for every
    token, and keywords take half as long again.
    """
    token, reason = output.token, output.finish_reason
    finish_reason = None if reason is None else FinishReason(reason)
    if token is None:
        return TokenEntry(transfer.transfer_id, choice, output.index, None, finish_reason), b""
    if token.logprobs is None and token.logits is None:
        return TokenEntry(transfer.transfer_id, choice, output.index, token.token_id, finish_reason), b""
    extras = pack_extras(token)
    return TokenEntry(transfer.transfer_id, choice, output.index, token.token_id, finish_reason, len(extras)), extras
