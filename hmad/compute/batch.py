"""The metadata of a decode step, as the kernels read it: rebuilt when sequences join or leave, advanced otherwise.

Between steps that take milliseconds, what they need has left the caches, and each object costs more to fetch than to
change. So a step goes through arrays, and looks at no sequence.
"""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from hmad.compute.sequence import DecodeSequence

NO_SEGMENTS, NO_SLOTS = np.empty((0, 3), np.int32), np.empty(0, np.int32)
NO_STOP = -1  # no token id
MOST_UNSETTLED = 64  # steps whose tokens the sequences do not have yet


class DecodeBatch:
    """B sequences with their segments in CSR form; the last segment of each is its tail.

    seq_segments int32 [B + 1]; segments int32 [num_segments, 3]: format code, num_tokens, first index into
    block_table; block_table int32 [n] slot ids; positions int64 [B]: where each newest token goes; tail_lens int32 [B]:
    tokens of each tail, the newest one included: a step appends it before it attends, and it is the index of the token
    that the step draws. ``num_steps_left``: until the first of the sequences has had its last.

    What the sequences themselves say of their tails and outputs is of the last ``settle``.
    """

    def __init__(self, sequences: Sequence[DecodeSequence]) -> None:
        self.sequences = list(sequences)
        segments = [s.segments for s in self.sequences]
        tables = [s.block_table for s in self.sequences]
        counts, blocks = (np.array([len(a) for a in arrays], np.int32) for arrays in (segments, tables))
        self.seq_segments = np.concatenate(([0], counts.cumsum())).astype(np.int32)
        self.segments = np.concatenate([NO_SEGMENTS, *segments])
        self.segments[:, 2] += np.repeat(blocks.cumsum(dtype=np.int32) - blocks, counts)
        self.block_table = np.concatenate([NO_SLOTS, *tables])
        self.tail_lens = np.array([s.num_tail_tokens + 1 for s in self.sequences], np.int32)
        self._tails = self.seq_segments[1:] - 1
        self._tail_starts = self.segments[self._tails, 2]
        self._tail_block_tokens = np.array([s.tail_format.tokens_per_block for s in self.sequences], np.int32)
        self.segments[self._tails, 1] = self.tail_lens
        self.positions = np.add.reduceat(self.segments[:, 1], self.seq_segments[:-1], dtype=np.int64) - 1
        self.num_steps_left = min((s.num_steps - s.num_tail_tokens for s in self.sequences), default=0)
        self._num_steps = 0  # that the sequences do not know of
        self._drawn: list[np.ndarray] = []  # likewise
        self._last_indices = np.array([s.num_steps for s in self.sequences], np.int32)
        stops = list(zip_longest(*(s.params.stop_token_ids for s in self.sequences), fillvalue=NO_STOP))
        self._stop_token_ids = np.array(stops, np.int64).reshape(len(stops), len(self.sequences))

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def newest_tokens(self) -> np.ndarray:
        """int64 [B]: the token each sequence feeds into this step. Settled they must be."""
        return np.array([s.output_token_ids[-1] for s in self.sequences], dtype=np.int64)

    @property
    def tail_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Slot ids and token offsets, int32 [B] each, where this step appends."""
        blocks, offsets = np.divmod(self.tail_lens - 1, self._tail_block_tokens)
        return self.block_table[self._tail_starts + blocks], offsets

    def advance(self) -> None:
        """A step was launched: one more token stands in every tail."""
        self._num_steps += 1
        self.tail_lens += 1
        self.segments[self._tails, 1] = self.tail_lens
        self.positions += 1
        self.num_steps_left -= 1

    def settle(self) -> None:
        """Tell the sequences of the steps since the last time."""
        for sequence in self.sequences:
            sequence.num_tail_tokens += self._num_steps
        self._num_steps = 0
        if self._drawn:
            for sequence, token_ids in zip(self.sequences, np.stack(self._drawn, axis=1).tolist(), strict=True):
                sequence.output_token_ids += token_ids
            self._drawn = []

    def take(self, token_ids: np.ndarray, indices: np.ndarray) -> dict[int, str]:
        """A step drew these tokens, int64 [B], number ``indices`` int32 [B] of each choice. Returns why choices end
        with them, by row: ``stop`` or ``length``. What goes to a sequence that has ended before, nobody reads.
        """
        self._drawn.append(token_ids)
        if len(self._drawn) == MOST_UNSETTLED:
            self.settle()
        stops = (self._stop_token_ids == token_ids).any(axis=0)
        ends = stops | (indices >= self._last_indices)
        return {row: "stop" if stops[row] else "length" for row in ends.nonzero()[0].tolist()}
