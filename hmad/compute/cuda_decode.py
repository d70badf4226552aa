"""Decode on a CUDA device: one captured graph per batch size, over raw blocks in an arena in device memory.

A step is one replay of the graph, and nothing is brought to it: where each row stands, the device counts on by itself,
the newest tokens stay there, and what was drawn it writes to the host's memory. So a step can be launched before the
host knows what the one before it has drawn. What the device cannot know comes when it changes: the members of a batch;
a plan of attention, which serves many steps; and tokens under teacher forcing.

The host's part is Python beside a fast device. Between steps of many milliseconds code leaves the caches as well, and
every call costs several times what it does in a loop: so there are few.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hmad.compute.arena import Arena
from hmad.compute.batch import NO_STOP, DecodeBatch
from hmad.compute.cuda_buffers import TURNS, Bundle, Field, brought, pinned
from hmad.compute.cuda_faults import fatal_faults
from hmad.compute.cuda_graphs import Pool, buckets_up_to, captured
from hmad.compute.cuda_sampler import (
    CONSTANT_COLUMNS,
    SETTINGS,
    device_sampling,
    forced_token,
    outcomes_of,
    sampling_fields,
    settings_of,
)
from hmad.compute.device import Outcomes, non_finite
from hmad.compute.model import Projected, Qwen3
from hmad.compute.sequence import DecodeSequence
from hmad.facts.errors import LocalError
from hmad.facts.formats import FORMATS, KVFormat
from hmad_kernels.triton_attention import (
    paged_decode_attention,
    partial_shapes,
    resident_programs,
)
from hmad_kernels.triton_common import ITEM_FIELDS, NO_ROW
from hmad_kernels.triton_plan import item_tokens_for, plan_capacity, split_items
from hmad_kernels.triton_rope import norm_rope_append
from hmad_kernels.triton_sampling import count_tokens, reset_counts, sample_rows
from hmad_kernels.triton_step import (
    MOST_STOPS,
    PLACE_DTYPES,
    RESULT_DTYPES,
    ROW_DTYPES,
    StepPlaces,
    StepResults,
    StepRows,
    begin_step,
    finish_step,
)

BUCKET_STEPS = ((4, 1), (64, 8), (128, 16), (1 << 20, 32))  # batch sizes that graphs are captured for
FORMAT_NAMES = tuple(FORMATS)
PLAN_STEPS = 32  # that the items of attention serve, before they are cut anew

Forced = list[tuple[int, DecodeSequence]]  # rows under teacher forcing


@dataclass(eq=False)
class Members:
    """A batch as the device was told of it, until its members change."""

    batch: DecodeBatch
    rows: dict[DecodeSequence, int]
    num_rows: int  # padded
    formats: tuple[str, ...]  # of its segments
    graph: torch.cuda.CUDAGraph
    settings: np.ndarray  # SETTINGS [B]
    forced: Forced
    described: list[int]  # rows whose logits the host wants
    plan_ends: int  # the step for which the plan of attention does not serve any more


@dataclass(frozen=True)
class Turn:
    """Where a step leaves its outcomes, and what happens when they are there. Two take turns."""

    arrays: dict[str, np.ndarray]
    done: torch.cuda.Event


class CudaDecode:
    """Decode on one CUDA device. Everything here belongs to the engine's thread."""

    runs_ahead = True

    def __init__(self, model: Qwen3, arena: Arena, tail_format: KVFormat, max_batch_size: int) -> None:
        config, device = model.config, model.device
        self.model = model
        self.arena = arena
        self._device = device
        self._tail_format = tail_format
        self._stream = torch.cuda.Stream(device)
        self._buckets = buckets_up_to(max_batch_size, BUCKET_STEPS)
        self._num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        capacity = self._capacity(max_batch_size)

        def room(dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
            return {name: torch.zeros(max_batch_size, dtype=dtype, device=device) for name, dtype in dtypes.items()}

        self._rows = Bundle(  # brought when members change, and counted on by the device
            sampling_fields(CONSTANT_COLUMNS, max_batch_size)
            | {name: Field(dtype, (max_batch_size,)) for name, dtype in ROW_DTYPES.items()}
            | {
                "stops": Field(torch.int64, (MOST_STOPS, max_batch_size)),
                "turn": Field(torch.int32, (1,)),
                "blocks": Field(torch.int32, (8 * arena.num_slots,)),  # eight choices, at most, share a prompt's prefix
            },
            device,
        )
        self._plan = Bundle(  # likewise, and anew every PLAN_STEPS steps
            {
                "num_items": Field(torch.int32, (len(FORMAT_NAMES),)),
                "seq_items": Field(torch.int32, (max_batch_size + 1,)),
                "last_items": Field(torch.int32, (max_batch_size,)),
                "items": Field(torch.int32, (len(FORMAT_NAMES) * capacity * ITEM_FIELDS.value,)),
            },
            device,
        )
        self._forced = Bundle(sampling_fields(("forced",), max_batch_size), device)
        self._on_device = self._rows.on_device | self._plan.on_device | self._forced.on_device
        self._places, self._results = room(PLACE_DTYPES), room(RESULT_DTYPES)
        self._host = {name: pinned((TURNS, max_batch_size), dtype) for name, dtype in RESULT_DTYPES.items()}
        self._num_special = pinned((TURNS,), torch.int32)
        told = self._host | {"num_special": self._num_special}
        self._turns = [
            Turn({name: tensor[turn].numpy() for name, tensor in told.items()}, torch.cuda.Event(blocking=True))
            for turn in range(TURNS)
        ]
        self._turn = 0  # of the next step
        shapes = partial_shapes(capacity, config.num_heads, config.head_dim)
        self._partials = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
        self._logits = torch.empty((max_batch_size, config.vocab_size), dtype=torch.float32, device=device)
        self._counts = torch.zeros((max_batch_size, config.vocab_size), dtype=torch.int32, device=device)
        self._resident: dict[str, int] = {}  # programs of attention that a multiprocessor holds, by format
        self._graphs: dict[tuple[int, tuple[str, ...]], torch.cuda.CUDAGraph] = {}
        self._pool: Pool = torch.cuda.graph_pool_handle()
        self._members: Members | None = None  # of the last step
        self._counted: dict[DecodeSequence, int] = {}  # rows of the counts
        torch.cuda.synchronize(device)  # what was made on the default stream is there for ours

    def _capacity(self, num_rows: int) -> int:
        """Items of attention that a batch of so many rows may have, however long its sequences are."""
        return plan_capacity(num_rows, self.model.config.num_kv_heads, self._num_multiprocessors)

    def warm_up(self, formats: Sequence[str]) -> None:
        """Have every kernel compiled before the first request waits for it. The largest graph comes first: the others
        share its memory, which captured in the order of a growing load would be a piece for each.
        """
        with fatal_faults, torch.inference_mode(), torch.cuda.stream(self._stream):
            for num_rows in (self._buckets[-1], 1):
                for name in formats:
                    self._graph_for(num_rows, tuple(n for n in FORMAT_NAMES if n in (name, self._tail_format.name)))
            self._stream.synchronize()
        torch.cuda.empty_cache()

    # --- one step ---

    def launch(self, batch: DecodeBatch) -> Callable[[], Outcomes]:
        with fatal_faults:
            try:
                if self._members is None or self._members.batch is not batch:
                    torch.cuda.set_stream(self._stream)  # for good: nothing else runs on this thread
                    self._members = self._adopt(batch, self._members)
                else:
                    self._bring_changes(self._members)
                return self._replay(self._members)
            except Exception:
                self._members = None  # whoever is launched next, the device is told all of it
                self._stream.synchronize()  # nobody else will wait for what was begun
                raise

    def _replay(self, members: Members) -> Callable[[], Outcomes]:
        """One step, whose outcomes are there after the event."""
        members.graph.replay()
        described = {row: self._logits[row].to("cpu", non_blocking=True, copy=True) for row in members.described}
        turn = self._turns[self._turn]
        turn.done.record(self._stream)
        self._turn = (self._turn + 1) % TURNS
        return partial(self._collect, members.batch, members.batch.step, described, turn)

    def _collect(self, batch: DecodeBatch, step: int, described: dict[int, Tensor], turn: Turn) -> Outcomes:
        with fatal_faults:
            turn.done.synchronize()
        size, arrays = len(batch), turn.arrays
        token_ids = arrays["token_ids"][:size].copy()  # the turn is taken again before all have read them
        if not (described or arrays["num_special"]):
            return Outcomes(token_ids, {}, may_stop=len(batch.stop_token_ids) > MOST_STOPS)
        raw = {row: logits.numpy() for row, logits in described.items()}
        outcomes = outcomes_of(batch.sequences, batch.indices_of(step), token_ids, arrays["tops"][:size], raw)
        positions, bad_rows = batch.positions_of(step), arrays["bad_rows"][:size].nonzero()[0].tolist()
        outcomes.special.update((row, non_finite(None, int(positions[row]))) for row in bad_rows)
        return outcomes

    # --- what it has to be told ---

    @torch.inference_mode()
    def _adopt(self, batch: DecodeBatch, before: Members | None) -> Members:
        """The members have changed: what follows from them alone. Those that stay keep their settings."""
        batch.settle()  # outputs are read here
        num_rows = next(size for size in self._buckets if size >= len(batch))
        formats = tuple(FORMAT_NAMES[code] for code in sorted(set(batch.segments[:, 0].tolist())))
        graph = self._graph_for(num_rows, formats)
        sequences, rows_before = batch.sequences, {} if before is None else before.rows
        sources = np.array([rows_before.get(s, NO_ROW) for s in sequences], np.int64)
        stay, new = sources >= 0, (sources < 0).nonzero()[0].tolist()
        settings = np.empty(len(batch), SETTINGS)
        if before is not None:
            settings[stay] = before.settings[sources[stay]]
        settings[new] = settings_of((sequences[row].params, sequences[row].seed) for row in new)
        settings["counts_row"] = self._count_rows(sequences, settings["is_penalized"])
        known = {row: sequences[row].output_token_ids[-1] for row in new}
        forced = [(row, sequences[row]) for row in settings["is_forced"].nonzero()[0].tolist()]
        self._bring_rows(batch, sources, settings, known)
        self._bring_forced(batch, forced)
        plan_ends = self._bring_plan(batch, num_rows, formats)
        described = settings["is_described"].nonzero()[0].tolist()
        rows = {sequence: row for row, sequence in enumerate(sequences)}
        return Members(batch, rows, num_rows, formats, graph, settings, forced, described, plan_ends)

    def _bring_changes(self, members: Members) -> None:
        """What else the device cannot know by itself."""
        if members.batch.step >= members.plan_ends:
            members.plan_ends = self._bring_plan(members.batch, members.num_rows, members.formats)
        if members.forced:
            self._bring_forced(members.batch, members.forced)

    def _bring_rows(self, batch: DecodeBatch, sources: np.ndarray, settings: np.ndarray, known: dict[int, int]) -> None:
        """Where the members stand, and how they sample; ``known`` are newest tokens that no step has drawn, by row."""
        arrays, size, num_blocks = self._rows.arrays, len(batch), len(batch.block_table)
        if num_blocks > len(arrays["blocks"]):
            raise LocalError(f"a batch of {num_blocks} blocks, {len(arrays['blocks'])} is the most")
        for name in CONSTANT_COLUMNS:
            arrays[name][:size] = settings[name]
        arrays["sources"][:size] = sources
        arrays["known"][list(known)] = list(known.values())
        arrays["positions"][:size] = batch.positions
        arrays["index"][:size] = batch.tail_lens
        arrays["tail_firsts"][:size] = batch.tail_firsts
        stops = batch.stop_token_ids[:MOST_STOPS]
        arrays["stops"][: len(stops), :size] = stops
        arrays["stops"][len(stops) :, :size] = NO_STOP
        self._fill_padding(size)
        arrays["blocks"][:num_blocks] = batch.block_table
        self._rows.upload(up_to=("blocks", num_blocks))

    def _bring_forced(self, batch: DecodeBatch, forced: Forced) -> None:
        """Tokens that the next step has to draw; no other row is forced."""
        array, indices = self._forced.arrays["forced"], batch.tail_lens
        array[:] = NO_ROW
        for row, sequence in forced:
            array[row] = forced_token(sequence.params, int(indices[row]))
        self._forced.upload()

    def _fill_padding(self, first: int) -> None:
        """Rows beyond the batch touch nothing, and are never counted on. The step takes its turn."""
        arrays = self._rows.arrays
        for name in ("sources", "tail_firsts", "counts_row"):
            arrays[name][first:] = NO_ROW
        for name in ("known", "positions", "temperature"):
            arrays[name][first:] = 0
        arrays["index"][first:] = 1
        arrays["turn"][0] = self._turn

    def _count_rows(self, sequences: Sequence[DecodeSequence], is_penalized: np.ndarray) -> np.ndarray:
        """A row of the counts for each sequence under penalties: its own as long as it is in the batch."""
        count_rows = np.full(len(sequences), NO_ROW, np.int32)
        penalized = is_penalized.nonzero()[0].tolist()
        kept = {s: self._counted[s] for s in map(sequences.__getitem__, penalized) if s in self._counted}
        free = iter(sorted(set(range(len(self._counts))) - set(kept.values())) if penalized else ())
        for row in penalized:
            sequence = sequences[row]
            if sequence not in kept:
                kept[sequence] = next(free)
                prompt, output = (
                    brought(ids, self._device) for ids in (sequence.prompt_token_ids, sequence.output_token_ids)
                )
                reset_counts(self._counts, kept[sequence], prompt, output)
            count_rows[row] = kept[sequence]
        self._counted = kept
        return count_rows

    def _bring_plan(self, batch: DecodeBatch, num_rows: int, formats: tuple[str, ...]) -> int:
        """Items of attention for the steps to come, and the step that they serve no more. From one step to the next the
        last item of each sequence grows, by the token that was appended to its tail: after some they are uneven.
        """
        capacity, size, arrays, segments = self._capacity(num_rows), len(batch), self._plan.arrays, batch.segments
        item_tokens = item_tokens_for(
            segments, self.model.config.num_kv_heads, self._num_multiprocessors, self._resident
        )
        plan = split_items(batch.seq_segments, segments, batch.block_table, formats, item_tokens, capacity)
        arrays["items"][: plan.items.size] = plan.items.ravel()
        arrays["num_items"][: len(formats)] = plan.num_items
        arrays["seq_items"][: size + 1] = plan.seq_items
        arrays["seq_items"][size + 1 : num_rows + 1] = plan.seq_items[-1]
        arrays["last_items"][:size] = plan.last_items
        self._plan.upload(up_to=("items", plan.items.size))
        return batch.step + PLAN_STEPS

    # --- graphs ---

    def _graph_for(self, num_rows: int, formats: tuple[str, ...]) -> torch.cuda.CUDAGraph:
        """The graph of a padded batch size and the formats in it, captured when it is first needed."""
        graph = self._graphs.get((num_rows, formats))
        if graph is None:
            graph = self._graphs[num_rows, formats] = self._capture(num_rows, formats)
        return graph

    def _capture(self, num_rows: int, formats: tuple[str, ...]) -> torch.cuda.CUDAGraph:
        config = self.model.config
        for name in formats:
            self._resident[name] = resident_programs(
                name, self.model.dtype, config.head_dim, config.num_heads, config.num_kv_heads,
                self.arena.geometry.slot_bytes, self._device,
            )  # fmt: skip
        newest = self._results["token_ids"].clone()  # the step before left them, and this one reads them
        self._fill_padding(0)
        self._plan.arrays["num_items"][:] = 0
        self._plan.arrays["seq_items"][:] = 0
        self._rows.upload()
        self._plan.upload()
        self._forced.arrays["forced"][:] = NO_ROW
        self._forced.upload()
        self._forward(num_rows, formats)  # compiles kernels, and lets libraries choose theirs
        self._stream.synchronize()
        graph = captured(lambda: self._forward(num_rows, formats), self._pool)
        self._results["token_ids"].copy_(newest)
        return graph

    def _forward(self, num_rows: int, formats: tuple[str, ...]) -> None:
        """Feed each row's newest token, append its KV to the tail, attend over all segments, sample, count on."""
        arrays = self._on_device
        rows = StepRows(**{name: arrays[name][:num_rows] for name in ROW_DTYPES})
        places = StepPlaces(**{name: tensor[:num_rows] for name, tensor in self._places.items()})
        results = StepResults(**{name: tensor[:num_rows] for name, tensor in self._results.items()})
        drawn, tail_tokens = self._results["token_ids"], self._tail_format.tokens_per_block
        begin_step(rows, drawn, arrays["blocks"], places, results.bad_rows, tail_tokens)

        def attend(layer_id: int, projected: Projected) -> Tensor:
            return self._attend(layer_id, projected, places, results.bad_rows, formats)

        hidden = self.model.forward(places.token_ids, rows.positions, attend)
        logits = self._logits[:num_rows]
        self.model.logits(hidden, out=logits)
        sampling = device_sampling(arrays, num_rows)
        sample_rows(logits, sampling, self._counts, results.token_ids, results.tops)
        count_tokens(self._counts, sampling.counts_row, results.token_ids)
        tail_items = self._items(num_rows, formats)[formats.index(self._tail_format.name)]
        finish_step(
            rows, results, tail_items, arrays["last_items"][:num_rows], arrays["stops"], arrays["turn"],
            StepResults(**self._host), self._num_special,
        )  # fmt: skip

    def _items(self, num_rows: int, formats: tuple[str, ...]) -> Tensor:
        """The plan's, as they lie on the device for so many rows and these formats."""
        shape = len(formats), self._capacity(num_rows), ITEM_FIELDS.value
        return self._on_device["items"][: math.prod(shape)].view(shape)

    def _attend(
        self, layer_id: int, rows: Projected, places: StepPlaces, bad_rows: Tensor, formats: tuple[str, ...]
    ) -> Tensor:
        config, arrays, num_rows = self.model.config, self._on_device, len(bad_rows)
        slots, capacity = self.arena.layer(layer_id), self._capacity(num_rows)
        norm_rope_append(
            rows.product, rows.q_norm, rows.k_norm, rows.angles.table, rows.angles.positions,
            config.num_heads, config.num_kv_heads, config.rms_norm_eps, self._tail_format.name,
            slots, places.tail_slots, places.tail_offsets, bad_rows,
        )  # fmt: skip
        q = rows.product.view(num_rows, -1, config.head_dim)[:, : config.num_heads]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        values, stats = self._partials
        paged_decode_attention(
            q, slots, self._items(num_rows, formats), arrays["num_items"][: len(formats)],
            arrays["seq_items"][: num_rows + 1], arrays["blocks"], out, values[:capacity], stats[:capacity],
            config.head_dim**-0.5, config.num_kv_heads, formats,
        )  # fmt: skip
        return out
