"""What begins and ends a decode step on the GPU, so that the host brings nothing to it: where each row's newest token
goes follows from a count, which the device keeps; what was drawn is written to pinned memory of the host.

The reference twin is the host's own account of a batch, ``hmad.compute.batch.DecodeBatch``, after as many steps. Limit:
the launch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hmad_kernels.triton_common import ITEM_FIELDS, check_pinned, check_place, check_tensor

MOST_STOPS = 4  # stop tokens of a row that the device watches for
ROWS = 256  # of a program, or of one turn of its loop
STEP_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


@dataclass(frozen=True)
class StepRows:
    """Rows of a batch, [B] each, as they stand before a step. The host writes them when members change."""

    sources: torch.Tensor  # the row of the step before that drew the newest token; NO_ROW: it is ``known``
    known: torch.Tensor
    positions: torch.Tensor  # where the newest token goes
    index: torch.Tensor  # of the token to draw; the tail has as many tokens once the newest is appended
    tail_firsts: torch.Tensor  # index of the tail's first block in the block table; NO_ROW: the row is padding


@dataclass(frozen=True)
class StepPlaces:
    """What ``begin_step`` works out for the kernels of the step, [B] each."""

    token_ids: torch.Tensor  # to feed
    tail_slots: torch.Tensor  # where the newest token's KV is appended; NO_ROW: nowhere
    tail_offsets: torch.Tensor


@dataclass(frozen=True)
class StepResults:
    """What a step leaves, [B] each; in the host's memory a turn of it, [turns, B], for each step that may be under way
    or unread.
    """

    token_ids: torch.Tensor  # drawn
    tops: torch.Tensor  # the raw logit that says whether the row is sound
    bad_rows: torch.Tensor  # whether a K or V of the row cannot be stored


ROW_DTYPES = {
    "sources": torch.int64, "known": torch.int64, "positions": torch.int64, "index": torch.int64,
    "tail_firsts": torch.int32,
}  # fmt: skip
PLACE_DTYPES = {"token_ids": torch.int64, "tail_slots": torch.int32, "tail_offsets": torch.int32}
RESULT_DTYPES = {"token_ids": torch.int64, "tops": torch.float32, "bad_rows": torch.uint8}


def begin_step(
    rows: StepRows,
    drawn: torch.Tensor,
    block_table: torch.Tensor,
    places: StepPlaces,
    bad_rows: torch.Tensor,
    tail_tokens: int,
) -> None:
    """Work out each row's newest token, and from its count where that goes. ``drawn`` int64 [any] are the tokens of the
    step before, which may have had other rows; ``block_table`` int32 [any]; ``tail_tokens`` are those of a tail's
    block. ``bad_rows`` uint8 [B] is cleared.

    What indices say is not checked: whoever made them on the host did. Raises ValueError on shapes, dtypes and memory
    that do not fit.
    """
    num_rows = len(rows.sources)
    _check(rows, ROW_DTYPES, num_rows)
    _check(places, PLACE_DTYPES, num_rows)
    check_tensor("drawn", drawn, torch.int64, (-1,))
    check_tensor("block_table", block_table, torch.int32, (-1,))
    check_tensor("bad_rows", bad_rows, torch.uint8, (num_rows,))
    others = {"places": places.token_ids, "drawn": drawn, "block_table": block_table, "bad_rows": bad_rows}
    check_place(vars(rows) | others)
    _begin_kernel[(triton.cdiv(num_rows, ROWS),)](
        rows.sources, rows.known, rows.index, rows.tail_firsts, block_table,
        drawn, bad_rows, places.token_ids, places.tail_slots, places.tail_offsets,
        num_rows, TAIL_TOKENS=tail_tokens, ROWS=ROWS, **STEP_OPTIONS,
    )  # fmt: skip


def finish_step(
    rows: StepRows,
    results: StepResults,
    items: torch.Tensor,
    last_items: torch.Tensor,
    stops: torch.Tensor,
    turn: torch.Tensor,
    host: StepResults,
    host_num_special: torch.Tensor,
) -> None:
    """Write results to the pinned memory ``host`` at ``turn`` int32 [1], and to ``host_num_special`` int32 [turns] how
    many rows the host has to look at: those with bad KV, with a top that is not finite, or with a token of their column
    of ``stops`` int64 [MOST_STOPS, as many columns as rows or more], where -1 is none. Then count on: turn, positions
    and indices by one, and by one token that of the ``items`` int32 [any, ITEM_FIELDS] (of the tails' format, see
    ``triton_plan.Plan``) which is each row's of ``last_items`` int32 [B]. Every row's newest token is its own now.
    What indices say is not checked.

    Raises ValueError on shapes, dtypes and memory that do not fit.
    """
    num_rows = len(rows.sources)
    _check(rows, ROW_DTYPES, num_rows)
    _check(results, RESULT_DTYPES, num_rows)
    check_tensor("items", items, torch.int32, (-1, ITEM_FIELDS.value))
    check_tensor("last_items", last_items, torch.int32, (num_rows,))
    check_tensor("stops", stops, torch.int64, (MOST_STOPS, -1))
    check_tensor("turn", turn, torch.int32, (1,))
    num_turns, host_rows = host.token_ids.shape
    for name, dtype in RESULT_DTYPES.items():
        check_tensor(f"the host's {name}", getattr(host, name), dtype, (num_turns, host_rows))
    check_tensor("host_num_special", host_num_special, torch.int32, (num_turns,))
    for name, room in (("stops", stops.shape[1]), ("the host", host_rows)):
        if room < num_rows:
            raise ValueError(f"{name} has room for {room} rows, not for {num_rows}")
    on_device = {"results": results.token_ids, "items": items, "last_items": last_items, "stops": stops, "turn": turn}
    check_place(vars(rows) | on_device)
    check_pinned({f"the host's {name}": getattr(host, name) for name in RESULT_DTYPES})
    check_pinned({"host_num_special": host_num_special})
    _finish_kernel[(1,)](
        rows.sources, rows.positions, rows.index, rows.tail_firsts, results.token_ids, results.tops, results.bad_rows,
        items, last_items, stops, turn, host.token_ids, host.tops, host.bad_rows, host_num_special,
        num_rows, stops.shape[1], host_rows,
        STOPS=MOST_STOPS, TURNS=num_turns, ROWS=ROWS, **STEP_OPTIONS,
    )  # fmt: skip


def _check(part: StepRows | StepPlaces | StepResults, dtypes: Mapping[str, torch.dtype], num_rows: int) -> None:
    """Raise ValueError unless all of it is of as many rows, of these types, and where kernels can run."""
    for name, dtype in dtypes.items():
        check_tensor(name, getattr(part, name), dtype, (num_rows,))
    check_place(vars(part))


@triton.jit(do_not_specialize=["num_rows"])  # or other numbers would have it compiled anew, between two steps
def _begin_kernel(
    sources, known, index, tail_firsts, block_table, drawn, bad_rows, token_ids, tail_slots, tail_offsets, num_rows,
    TAIL_TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    source = tl.load(sources + row, mask=exists, other=-1)
    newest = tl.load(drawn + source, mask=source >= 0, other=0)
    token = tl.where(source >= 0, newest, tl.load(known + row, mask=exists, other=0))
    tl.store(token_ids + row, token, mask=exists)

    first = tl.load(tail_firsts + row, mask=exists, other=-1)
    place = tl.load(index + row, mask=exists, other=1) - 1
    slot = tl.load(block_table + first + place // TAIL_TOKENS, mask=first >= 0, other=-1)
    tl.store(tail_slots + row, slot, mask=exists)
    tl.store(tail_offsets + row, (place % TAIL_TOKENS).to(tl.int32), mask=exists)
    tl.store(bad_rows + row, tl.zeros([ROWS], tl.uint8), mask=exists)


@triton.jit(do_not_specialize=["num_rows"])
def _finish_kernel(
    sources, positions, index, tail_firsts, drawn, tops, bad_rows, items, last_items, stops, turn,
    host_drawn, host_tops, host_bad_rows, host_num_special, num_rows, stops_rows, host_rows,
    STOPS: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.load(turn)
    num_special = tl.full([], 0, tl.int32)
    for begin in range(0, num_rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        exists = row < num_rows
        lives = tl.load(tail_firsts + row, mask=exists, other=-1) >= 0
        top = tl.load(tops + row, mask=lives, other=0.0)
        bad = tl.load(bad_rows + row, mask=lives, other=0)
        place = at * host_rows + row
        token = tl.load(drawn + row, mask=lives, other=0)
        tl.store(host_drawn + place, token, mask=exists)
        tl.store(host_tops + place, top, mask=exists)
        tl.store(host_bad_rows + place, bad, mask=exists)
        is_plain = (bad == 0) & (tl.abs(top) < float("inf"))  # which NaN is not, either
        for number in tl.static_range(STOPS):
            is_plain &= token != tl.load(stops + number * stops_rows + row, mask=lives, other=-1)
        num_special += tl.sum((is_plain == 0).to(tl.int32), axis=0)

        tl.store(sources + row, row.to(tl.int64), mask=lives)
        tl.store(positions + row, tl.load(positions + row, mask=lives, other=0) + 1, mask=lives)
        tl.store(index + row, tl.load(index + row, mask=lives, other=0) + 1, mask=lives)
        num_tokens = items + ITEM_FIELDS * tl.load(last_items + row, mask=lives, other=0) + 3
        tl.store(num_tokens, tl.load(num_tokens, mask=lives, other=0) + 1, mask=lives)
    tl.store(host_num_special + at, num_special)
    tl.store(turn, (at + 1) % TURNS)
