"""The metadata of a decode step, as the kernels read it: rebuilt when sequences join or leave, advanced otherwise."""

from collections.abc import Sequence

import numpy as np

from hmad.compute.sequence import DecodeSequence
from hmad.facts.formats import FORMATS

FORMAT_CODE = {name: code for code, name in enumerate(FORMATS)}


class DecodeBatch:
    """B sequences with their segments in CSR form; the last segment of each is its tail.

    seq_segments int32 [B + 1]; segments int32 [num_segments, 3]: format code, num_tokens, first index into
    block_table; block_table int32 [n] slot ids; positions int64 [B]: where each newest token goes.
    """

    def __init__(self, sequences: Sequence[DecodeSequence]) -> None:
        self.sequences = list(sequences)
        rows: list[tuple[int, int, int]] = []
        tables: list[np.ndarray] = []
        counts = [0]
        next_index = 0
        for sequence in self.sequences:
            # A step appends the newest token before it attends, so the tail is counted with it.
            tail = (sequence.tail_format, sequence.num_tail_tokens + 1, sequence.tail_slots)
            for fmt, num_tokens, slots in [*((s.format, s.num_tokens, s.slots) for s in sequence.prefix), tail]:
                rows.append((FORMAT_CODE[fmt.name], num_tokens, next_index))
                tables.append(slots)
                next_index += len(slots)
            counts.append(len(rows))
        self.seq_segments = np.array(counts, dtype=np.int32)
        self.segments = np.array(rows, dtype=np.int32).reshape(-1, 3)
        self.block_table = np.concatenate(tables).astype(np.int32) if tables else np.empty(0, np.int32)
        self.positions = np.array([s.context_len for s in self.sequences], dtype=np.int64)
        self._tails = self.seq_segments[1:] - 1
        self._tail_block_tokens = np.array([s.tail_format.tokens_per_block for s in self.sequences], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def newest_tokens(self) -> np.ndarray:
        """int64 [B]: the token each sequence feeds into this step."""
        return np.array([s.output_token_ids[-1] for s in self.sequences], dtype=np.int64)

    @property
    def tail_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Slot ids and token offsets, int32 [B] each, where this step appends."""
        tokens, first = self.segments[self._tails, 1] - 1, self.segments[self._tails, 2]
        return self.block_table[first + tokens // self._tail_block_tokens], tokens % self._tail_block_tokens

    def advance(self) -> None:
        """A step was launched: one more token stands in every tail."""
        for sequence in self.sequences:
            sequence.num_tail_tokens += 1
        self.segments[self._tails, 1] += 1
        self.positions += 1
