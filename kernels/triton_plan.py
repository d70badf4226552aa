"""Which program of the decode attention reads what: the host's part of it, in numpy.

Sequences are cut into *items* of about equal size, as many as fill the multiprocessors in whole waves, whose sum is
bounded by the batch size alone. ``triton_attention`` says what a program makes of an item.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hmad_kernels.triton_common import (
    FIRST_SLOTS,
    FORMAT_NAMES,
    ITEM_FIELDS,
    NO_ROW,
    TOKENS_PER_BLOCK,
    format_code,
)

PROGRAMS_PER_MULTIPROCESSOR = 24  # that a plan may have: three waves of 8, two of 12
SMALL_BATCH = 4  # whose plans have one wave of 8 or 12: programs without an item cost time as well
SMALL_BATCH_PROGRAMS = 12
FULL_ENOUGH = 0.98  # of the fullest waves that any size of items gives: then larger items are better
LEAST_ITEM_TOKENS = (64, 64, 32, 32, 32, 32)  # by format code: what a step of its program reads, or a few
SHORT_ITEM_TOKENS = 128  # of shorter items, it takes as long to launch and to merge them as to attend over them:
SHORT_ITEM_PROGRAMS = 4  # then a wave has at most so many programs for each multiprocessor
WAVE_ITEM_TOKENS = 512  # items that are at least so long leave room for one more wave
MOST_BLOCK_TOKENS = max(TOKENS_PER_BLOCK)


@dataclass(frozen=True)
class Plan:
    """What the programs of attention attend over: items, each with its *place*, where its partial result goes."""

    items: np.ndarray  # int32 [num_formats, capacity, ITEM_FIELDS]: see split_items
    num_items: np.ndarray  # int32 [num_formats]
    seq_items: np.ndarray  # int32 [batch + 1]: which places each sequence has
    last_items: np.ndarray  # int32 [batch]: which item of its format the last of each sequence is; NO_ROW: it has none


def split_items(
    seq_segments: np.ndarray,
    segments: np.ndarray,
    block_table: np.ndarray,
    formats: Sequence[str],
    item_tokens: int,
    capacity: int | None = None,
) -> Plan:
    """Cut every segment evenly into the fewest items of ``item_tokens`` at most.

    ``seq_segments`` int32 [batch + 1] says which segments each sequence has; ``segments`` int32 [num_segments, 3] are
    (format code, num_tokens, first index into ``block_table``, int32 [any]), of formats among ``formats``, which the
    plan keeps apart in that order. The fields of an item are: sequence, place, first index into the block table,
    num_tokens, and the slots at that index and the three after it, which come with the rest of the row. ``capacity`` is
    as many as there are if it is not given. Raises ValueError if they do not fit into it, or are of another format.
    """
    if item_tokens < 1 or item_tokens % MOST_BLOCK_TOKENS:
        raise ValueError(f"item_tokens must be a positive multiple of {MOST_BLOCK_TOKENS}, not {item_tokens}")
    counts = -(-segments[:, 1] // item_tokens)
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    if capacity is not None and total > capacity:
        raise ValueError(f"{total} items of {item_tokens} tokens do not fit into a plan of {capacity}")
    segment = np.repeat(np.arange(len(segments)), counts)
    num_tokens = segments[segment, 1]
    size = -(-num_tokens // (counts[segment] * MOST_BLOCK_TOKENS)) * MOST_BLOCK_TOKENS
    skipped = (np.arange(total) - np.repeat(ends - counts, counts)) * size  # tokens before the item
    code = segments[segment, 0]
    first = segments[segment, 2] + skipped // np.array(TOKENS_PER_BLOCK)[code]
    rows = np.empty((total, ITEM_FIELDS.value), dtype=np.int32)
    rows[:, 0] = np.repeat(np.arange(len(seq_segments) - 1), np.diff(seq_segments))[segment]
    rows[:, 1] = np.arange(total)
    rows[:, 2] = first
    rows[:, 3] = np.minimum(num_tokens - skipped, size)
    rows[:, 4:] = block_table[np.minimum(first[:, None] + np.arange(FIRST_SLOTS.value), len(block_table) - 1)]
    items = np.zeros((len(formats), total if capacity is None else capacity, ITEM_FIELDS.value), dtype=np.int32)
    num_items = np.zeros(len(formats), dtype=np.int32)
    index = np.empty(total, dtype=np.int32)  # of each among the items of its format
    for plane, name in enumerate(formats):
        (places,) = (code == format_code(name)).nonzero()
        num_items[plane] = len(places)
        index[places] = np.arange(len(places))
        items[plane, : len(places)] = rows[places]
    if num_items.sum() < total:
        raise ValueError(f"segments are of other formats than {', '.join(formats)}")
    seq_items = np.concatenate(([0], ends)).astype(np.int32)[seq_segments]
    last_items = np.full(len(seq_items) - 1, NO_ROW, dtype=np.int32)
    has_items = np.diff(seq_items) > 0
    last_items[has_items] = index[seq_items[1:][has_items] - 1]
    return Plan(items, num_items, seq_items, last_items)


def item_tokens_for(
    segments: np.ndarray, num_kv_heads: int, num_multiprocessors: int, resident: Mapping[str, int]
) -> int:
    """The size of items whose programs fill the multiprocessors in whole waves; ``segments`` as for split_items.

    ``resident`` are the programs of each format in the batch that a multiprocessor holds (see resident_programs). The
    waves are those of the format that most tokens have. Items of other formats, such as the tails of 8-bit prefixes,
    come on top of them.
    """
    code = int(np.bincount(segments[:, 0], segments[:, 1], minlength=len(FORMAT_NAMES)).argmax())
    is_main = segments[:, 0] == code
    num_tokens, num_main = int(segments[:, 1].sum()), int(is_main.sum())
    batch = -(-len(segments) // 2)
    most = _most_items(batch, num_kv_heads, num_multiprocessors)
    wave = min(max(1, resident[FORMAT_NAMES[code]] * num_multiprocessors // num_kv_heads), most)  # items
    num_waves = min(max(1, num_tokens // (wave * WAVE_ITEM_TOKENS)), most // wave)

    def least_for(num_items: int) -> int:
        """Blocks of an item, as all below, if there are at most so many."""
        num_items = max(num_items, 2 * num_main)
        return max(-(-num_tokens // (num_items * MOST_BLOCK_TOKENS)), LEAST_ITEM_TOKENS[code] // MOST_BLOCK_TOKENS)

    least = least_for(wave * num_waves)
    short = SHORT_ITEM_TOKENS // MOST_BLOCK_TOKENS
    if least < short:
        few = min(wave, max(1, SHORT_ITEM_PROGRAMS * num_multiprocessors // num_kv_heads))
        wave = few if least_for(few) <= short else wave
        least = min(least_for(few), short)
    # Twice the least leaves room for the end of every segment.
    sizes = np.unique(least + -(-np.arange(33) * least // 32)).astype(np.int32)
    blocks = -(-np.concatenate((segments[is_main, 1], segments[~is_main, 1])) // MOST_BLOCK_TOKENS)
    counts = -(-blocks // sizes[:, None])
    main_counts = counts[:, :num_main]
    longest = -(-blocks[:num_main] // np.maximum(main_counts, 1))  # of a segment's items
    waves = np.maximum(-(-main_counts.sum(axis=1) // wave), 1)
    full = 1 / (waves * longest.max(axis=1, initial=1))  # as if every wave took as long as the longest item
    full[counts.sum(axis=1) > max(most, 2 * batch) + 2 * batch] = 0.0
    return MOST_BLOCK_TOKENS * int(sizes[full >= FULL_ENOUGH * full.max()][-1])


def plan_capacity(batch: int, num_kv_heads: int, num_multiprocessors: int) -> int:
    """Items that split_items makes at most of so many sequences of two segments each, cut as item_tokens_for says."""
    return max(_most_items(batch, num_kv_heads, num_multiprocessors), 2 * batch) + 2 * batch


def _most_items(batch: int, num_kv_heads: int, num_multiprocessors: int) -> int:
    """Items that a plan may have, but for the ends of segments."""
    programs = SMALL_BATCH_PROGRAMS if batch <= SMALL_BATCH else PROGRAMS_PER_MULTIPROCESSOR
    return max(1, programs * num_multiprocessors // num_kv_heads)
