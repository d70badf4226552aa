"""A sequence as the engines see it: where its KV lies and what has been generated."""

from dataclasses import dataclass, field

import numpy as np

from hmad.facts.formats import KVFormat
from hmad.facts.sampling import SamplingParams


@dataclass(frozen=True)
class Segment:
    """Consecutive positions of one sequence in one format; ``slots`` are int32 ids, one per block."""

    format: KVFormat
    num_tokens: int
    slots: np.ndarray


@dataclass(eq=False)
class DecodeSequence:
    """One choice that decodes: a prefix of segments as they landed, then the tail that decode itself writes.

    The tail holds the KV of every token that a step was launched for: a step computes the KV of the newest token and
    draws the next. While a step is under way, its token is not yet among the outputs.
    """

    prompt_token_ids: np.ndarray
    params: SamplingParams
    seed: int
    prefix: tuple[Segment, ...]
    tail_format: KVFormat
    tail_slots: np.ndarray
    output_token_ids: list[int] = field(default_factory=list)  # the first is the prefill node's
    num_tail_tokens: int = 0

    @property
    def num_prefix_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.prefix)

    @property
    def num_steps_left(self) -> int:
        """Steps until the longest answer."""
        return tail_tokens(self.params) - self.num_tail_tokens

    @property
    def context_len(self) -> int:
        """Positions whose KV is stored."""
        return self.num_prefix_tokens + self.num_tail_tokens


def tail_tokens(params: SamplingParams) -> int:
    """Positions a tail must hold: every output token but the last, whose KV nobody reads."""
    return params.max_tokens - 1
