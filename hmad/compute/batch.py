"""The metadata of a decode step, as the kernels read it: rebuilt when sequences join or leave, counted on otherwise.

Between steps that take milliseconds, what they need has left the caches, and each object costs more to fetch than to
change. So a step counts one number on, and looks at no sequence: what else changes follows from that number.
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

    seq_segments int32 [B + 1]; block_table int32 [n] slot ids; tail_firsts int32 [B]: where the slots of each tail
    begin in it. ``step`` is the number of the next step, counted from 0; what changes with it is given as of that step.

    stop_token_ids int64 [most of any row, B], where NO_STOP is none.

    What the sequences themselves say of their tails and outputs is of the last ``settle``.
    """

    def __init__(self, sequences: Sequence[DecodeSequence]) -> None:
        self.sequences = list(sequences)
        segments = [s.segments for s in self.sequences]
        tables = [s.block_table for s in self.sequences]
        counts, blocks = (np.array([len(a) for a in arrays], np.int32) for arrays in (segments, tables))
        self.seq_segments = np.concatenate(([0], counts.cumsum())).astype(np.int32)
        self.block_table = np.concatenate([NO_SLOTS, *tables])
        self._segments = np.concatenate([NO_SEGMENTS, *segments])
        self._segments[:, 2] += np.repeat(blocks.cumsum(dtype=np.int32) - blocks, counts)
        self._tails = self.seq_segments[1:] - 1
        self.tail_firsts = self._segments[self._tails, 2]
        self._tail_block_tokens = np.array([s.tail_format.tokens_per_block for s in self.sequences], np.int32)
        self._first_indices = np.array([s.num_tail_tokens + 1 for s in self.sequences], np.int32)
        prefixes = np.add.reduceat(self._segments[:, 1], self.seq_segments[:-1], dtype=np.int64)
        self._first_positions = prefixes + self._first_indices - 1
        self._last_indices = np.array([s.num_steps for s in self.sequences], np.int32)
        self._num_steps = min((s.num_steps - s.num_tail_tokens for s in self.sequences), default=0)
        self.step = 0
        self._num_settled = 0  # steps that the sequences know of
        self._drawn: list[np.ndarray] = []  # what they do not know yet
        stops = list(zip_longest(*(s.params.stop_token_ids for s in self.sequences), fillvalue=NO_STOP))
        self.stop_token_ids = np.array(stops, np.int64).reshape(len(stops), len(self.sequences))

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_steps_left(self) -> int:
        """Until the first of the sequences has had its last."""
        return self._num_steps - self.step

    def indices_of(self, step: int) -> np.ndarray:
        """int32 [B]: which token of each choice a step draws."""
        return self._first_indices + np.int32(step)

    def positions_of(self, step: int) -> np.ndarray:
        """int64 [B]: where the newest tokens go that a step feeds."""
        return self._first_positions + step

    @property
    def positions(self) -> np.ndarray:
        """int64 [B]: where each newest token goes."""
        return self.positions_of(self.step)

    @property
    def tail_lens(self) -> np.ndarray:
        """int32 [B]: tokens of each tail, the newest included, which a step appends before it attends. It draws the
        token of the same index.
        """
        return self.indices_of(self.step)

    @property
    def segments(self) -> np.ndarray:
        """int32 [num_segments, 3]: format code, num_tokens, first index into the block table."""
        segments = self._segments.copy()
        segments[self._tails, 1] = self.tail_lens
        return segments

    @property
    def newest_tokens(self) -> np.ndarray:
        """int64 [B]: the token each sequence feeds into this step. Settled they must be."""
        return np.array([s.output_token_ids[-1] for s in self.sequences], dtype=np.int64)

    @property
    def tail_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Slot ids and token offsets, int32 [B] each, where this step appends."""
        blocks, offsets = np.divmod(self.tail_lens - 1, self._tail_block_tokens)
        return self.block_table[self.tail_firsts + blocks], offsets

    def advance(self) -> None:
        """A step was launched: one more token stands in every tail."""
        self.step += 1

    def settle(self) -> None:
        """Tell the sequences of the steps since the last time."""
        num_steps, self._num_settled = self.step - self._num_settled, self.step
        for sequence in self.sequences:
            sequence.num_tail_tokens += num_steps
        if self._drawn:
            for sequence, token_ids in zip(self.sequences, np.stack(self._drawn, axis=1).tolist(), strict=True):
                sequence.output_token_ids += token_ids
            self._drawn = []

    def take(self, step: int, token_ids: np.ndarray, *, may_stop: bool = True) -> dict[int, str]:
        """A step drew these tokens, int64 [B]. Returns why choices end with them, by row: ``stop`` or ``length``. What
        goes to a sequence that has ended before, nobody reads. Who knows that no row drew one of its stop tokens says
        so.
        """
        self._drawn.append(token_ids)
        if len(self._drawn) == MOST_UNSETTLED:
            self.settle()
        ends: dict[int, str] = {}
        if step + 1 >= self._num_steps:
            ends = dict.fromkeys((self.indices_of(step) >= self._last_indices).nonzero()[0].tolist(), "length")
        if may_stop:
            ends |= dict.fromkeys((self.stop_token_ids == token_ids).nonzero()[1].tolist(), "stop")
        return ends
