"""The pure decisions: what a prefill batch holds, which peer a prompt goes to, how many slots a request needs."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from hmad.compute.device import PrefillChunk, PrefillSequence
from hmad.compute.sequence import tail_tokens
from hmad.facts.formats import KVFormat
from hmad.facts.sampling import SamplingParams

# Chunk boundaries fall on whole blocks of every format (docs/design.md section 6).
CHUNK_ALIGN_TOKENS = 32


def plan_prefill(waiting: Iterable[PrefillSequence], max_batch_tokens: int) -> list[PrefillChunk]:
    """Fill a batch in order of arrival; a prompt that does not fit whole is cut at a block boundary and ends the batch.

    Only the last chunk can be of a cut prompt: whoever needs a history is easy to find.
    """
    chunks: list[PrefillChunk] = []
    budget = max_batch_tokens
    for sequence in waiting:
        num_tokens = min(sequence.num_remaining, budget)
        is_cut = num_tokens < sequence.num_remaining
        if is_cut:
            num_tokens -= num_tokens % CHUNK_ALIGN_TOKENS
        if num_tokens:
            chunks.append(PrefillChunk(sequence, num_tokens))
        if is_cut:
            break
        budget -= num_tokens
    return chunks


def slots_per_choice(tail_format: KVFormat, params: SamplingParams) -> int:
    """Arena slots of one choice's own tail."""
    return tail_format.num_blocks(tail_tokens(params))


def slots_needed(
    raw_format: KVFormat, tail_format: KVFormat, num_prompt_tokens: int, params: SamplingParams, num_choices: int
) -> int:
    """Arena slots of a request: its raw prefix once, and a tail for the longest answer of each choice."""
    return raw_format.num_blocks(num_prompt_tokens) + num_choices * slots_per_choice(tail_format, params)


class Candidate(Protocol):
    """A peer, as the choice sees it."""

    @property
    def usable(self) -> bool: ...

    @property
    def free_slots(self) -> int: ...


PeerT = TypeVar("PeerT", bound=Candidate)


def rank_peers(peers: Sequence[PeerT]) -> list[PeerT]:
    """The usable peers, the one with the most free slots first."""
    return sorted((peer for peer in peers if peer.usable), key=lambda peer: -peer.free_slots)
