"""A sequence as the engines see it: where its KV lies and what has been generated."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hmad.facts.formats import FORMATS, KVFormat
from hmad.facts.sampling import SamplingParams

FORMAT_CODE = {name: code for code, name in enumerate(FORMATS)}


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
    draws the next. While a step is under way, its token is not yet among the outputs. Both are told of
    several steps in one go (``DecodeBatch.settle``), and say how it was then.
    """

    prompt_token_ids: np.ndarray
    params: SamplingParams
    seed: int
    prefix: tuple[Segment, ...]
    tail_format: KVFormat
    tail_slots: np.ndarray
    output_token_ids: list[int] = field(default_factory=list)  # the first is the prefill node's
    num_tail_tokens: int = 0

    @cached_property
    def segments(self) -> np.ndarray:
        """int32 [num_segments, 3]: format code, num_tokens, first index into ``block_table``. The tail comes last, and
        its tokens are not counted here.
        """
        rows, first = [], 0
        for segment in self.prefix:
            rows.append((FORMAT_CODE[segment.format.name], segment.num_tokens, first))
            first += len(segment.slots)
        return np.array([*rows, (FORMAT_CODE[self.tail_format.name], 0, first)], np.int32)

    @cached_property
    def block_table(self) -> np.ndarray:
        """int32 [n]: the slots of all segments, in order."""
        return np.concatenate([*(segment.slots for segment in self.prefix), self.tail_slots]).astype(np.int32)

    @cached_property
    def num_steps(self) -> int:
        """Steps that the longest answer takes: each leaves one more token in the tail."""
        return tail_tokens(self.params)


def tail_tokens(params: SamplingParams) -> int:
    """Positions a tail must hold: every output token but the last, whose KV nobody reads."""
    return params.max_tokens - 1
