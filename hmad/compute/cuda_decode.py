"""Decode on a CUDA device: one captured graph per batch size, over raw blocks in an arena in device memory.

A step is: bring its metadata to the device in one copy, replay the graph, bring the tokens back in another. The newest
tokens stay on the device from one step to the next, so that a step can be launched before the host knows what the one
before it has drawn.

The host's part is Python beside a fast device, so it touches arrays, and no sequence by itself: what follows from the
members of a batch alone is brought to the device when they change, and a plan of attention serves many steps. Between
steps of many milliseconds code leaves the caches as well, and every call costs several times what it does in a loop: so
there are few, and the thread keeps the stream as its current one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from hmad.compute.arena import Arena
from hmad.compute.batch import DecodeBatch
from hmad.compute.cuda_buffers import TURNS, Bundle, Field
from hmad.compute.cuda_faults import fatal_faults
from hmad.compute.cuda_graphs import Pool, buckets_up_to, captured
from hmad.compute.cuda_sampler import (
    CONSTANT_COLUMNS,
    NO_ROW,
    SETTINGS,
    STEP_COLUMNS,
    device_sampling,
    forced_token,
    outcomes_of,
    sampling_fields,
    settings_of,
    token_tensor,
)
from hmad.compute.device import Outcomes, non_finite
from hmad.compute.model import Projected, Qwen3
from hmad.compute.sequence import DecodeSequence
from hmad.facts.errors import LocalError
from hmad.facts.formats import FORMATS, KVFormat
from hmad_kernels.triton_attention import (
    EMPTY,
    item_tokens_for,
    paged_decode_attention,
    partial_shapes,
    plan_capacity,
    resident_programs,
    split_items,
)
from hmad_kernels.triton_rope import norm_rope_append
from hmad_kernels.triton_sampling import count_tokens, reset_counts, sample_rows

BUCKET_STEPS = ((4, 1), (64, 8), (128, 16), (1 << 20, 32))  # batch sizes that graphs are captured for
FORMAT_NAMES = tuple(FORMATS)
PLAN_STEPS = 32  # that the items of attention serve, before they are cut anew


class Plan:
    """A batch's items of attention. From one step to the next only the last of each sequence grows, by the token that
    was appended to its tail.
    """

    def __init__(self, items: np.ndarray, seq_items: np.ndarray) -> None:
        self.items = items  # int32 [capacity, 4], as ``split_items`` makes them
        self.seq_items = seq_items  # int32 [B + 1]
        self.num_steps_left = PLAN_STEPS
        self._num_tokens = items[:, 3]
        self._last = seq_items[1:] - 1

    def advance(self) -> None:
        self._num_tokens[self._last] += 1
        self.num_steps_left -= 1


@dataclass(eq=False)
class Members:
    """What of a batch's metadata stays the same, or only counts on, until its members change."""

    batch: DecodeBatch
    rows: dict[DecodeSequence, int]
    num_rows: int  # padded
    graph: torch.cuda.CUDAGraph
    settings: np.ndarray  # SETTINGS [B]
    forced: list[tuple[int, DecodeSequence]]  # rows under teacher forcing
    described: list[int]  # rows whose logits the host wants
    plan: Plan


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
        self._inputs = Bundle(
            {
                "positions": Field(torch.int64, (max_batch_size,)),
                # The row of the step before that drew each newest token; -1: the host knows it.
                "sources": Field(torch.int64, (max_batch_size,)),
                "tail_slots": Field(torch.int32, (max_batch_size,)),  # -1: padding
                "tail_offsets": Field(torch.int32, (max_batch_size,)),
                "items": Field(torch.int32, (capacity, 4)),
                "seq_items": Field(torch.int32, (max_batch_size + 1,)),
            }
            | sampling_fields(STEP_COLUMNS, max_batch_size),
            device,
        )
        blocks = Field(torch.int32, (8 * arena.num_slots,))  # the choices of a request, eight at most, share its prefix
        self._constants = Bundle(  # while the members stay the same
            sampling_fields(CONSTANT_COLUMNS, max_batch_size)
            | {"token_ids": Field(torch.int64, (max_batch_size,)), "blocks": blocks},
            device,
        )
        self._on_device = self._inputs.on_device | self._constants.on_device
        self._outputs = Bundle(
            {
                "token_ids": Field(torch.int64, (max_batch_size,)),
                "tops": Field(torch.float32, (max_batch_size,)),
                "bad_rows": Field(torch.uint8, (max_batch_size,)),
            },
            device,
        )
        self._done = cycle([torch.cuda.Event(blocking=True) for _ in range(TURNS)])
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
        with fatal_faults(), torch.inference_mode(), torch.cuda.stream(self._stream):
            for num_rows in (self._buckets[-1], 1):
                for name in formats:
                    self._graph_for(num_rows, tuple(n for n in FORMAT_NAMES if n in (name, self._tail_format.name)))
            self._stream.synchronize()
        torch.cuda.empty_cache()

    # --- one step ---

    def launch(self, batch: DecodeBatch) -> Callable[[], Outcomes]:
        with fatal_faults():
            torch.cuda.set_stream(self._stream)  # for good: nothing else runs on this thread
            try:
                members = self._members
                if members is None or members.batch is not batch:
                    members = self._adopt(batch, members)
                outcomes = self._replay(members)
            except Exception:
                self._stream.synchronize()  # nobody else will wait for what was begun
                raise
        if self._members is not members:
            self._members = members
            # From now on the step before has drawn every newest token.
            self._inputs.arrays["sources"][: len(batch)] = np.arange(len(batch))
        members.plan.advance()
        return outcomes

    def _replay(self, members: Members) -> Callable[[], Outcomes]:
        """One step's metadata up, the graph, and its outcomes down: they are there after the event."""
        batch = members.batch
        self._fill(members)
        self._inputs.upload()
        members.graph.replay()
        arrays = self._outputs.download()
        described = {row: self._logits[row].to("cpu", non_blocking=True) for row in members.described}
        done = next(self._done)
        done.record(self._stream)
        counts = batch.tail_lens.copy(), batch.positions.copy()
        return partial(self._collect, batch.sequences, *counts, arrays, described, done)

    def _collect(
        self,
        sequences: Sequence[DecodeSequence],
        index: np.ndarray,
        positions: np.ndarray,
        arrays: dict[str, np.ndarray],
        described: dict[int, Tensor],
        done: torch.cuda.Event,
    ) -> Outcomes:
        with fatal_faults():
            done.synchronize()
        size = len(sequences)
        raw = {row: logits.numpy() for row, logits in described.items()}
        token_ids = arrays["token_ids"][:size].copy()  # the turn is taken again before all have read them
        outcomes = outcomes_of(sequences, index, token_ids, arrays["tops"][:size], raw)
        bad_rows = arrays["bad_rows"][:size].nonzero()[0].tolist()
        outcomes.special.update((row, non_finite(None, int(positions[row]))) for row in bad_rows)
        return outcomes

    # --- its metadata ---

    @torch.inference_mode()
    def _adopt(self, batch: DecodeBatch, before: Members | None) -> Members:
        """The members have changed: what follows from them alone. Those that stay keep their settings."""
        num_rows = next(size for size in self._buckets if size >= len(batch))
        codes = sorted(set(batch.segments[:, 0].tolist()))
        graph = self._graph_for(num_rows, tuple(FORMAT_NAMES[code] for code in codes))
        sequences, rows_before = batch.sequences, {} if before is None else before.rows
        sources = np.array([rows_before.get(s, NO_ROW) for s in sequences], np.int64)
        stay, new = sources >= 0, (sources < 0).nonzero()[0].tolist()
        settings = np.empty(len(batch), SETTINGS)
        if before is not None:
            settings[stay] = before.settings[sources[stay]]
        settings[new] = settings_of((sequences[row].params, sequences[row].seed) for row in new)
        settings["counts_row"] = self._count_rows(sequences, settings["is_penalized"])
        self._bring_constants(batch, settings, {row: sequences[row].output_token_ids[-1] for row in new})
        self._inputs.arrays["sources"][: len(batch)] = sources
        self._fill_padding(len(batch), num_rows)
        return Members(
            batch,
            {sequence: row for row, sequence in enumerate(sequences)},
            num_rows,
            graph,
            settings,
            [(row, sequences[row]) for row in settings["is_forced"].nonzero()[0].tolist()],
            settings["is_described"].nonzero()[0].tolist(),
            self._plan(batch, num_rows),
        )

    def _bring_constants(self, batch: DecodeBatch, settings: np.ndarray, known: dict[int, int]) -> None:
        """What the members' steps have in common; ``known`` are newest tokens that no step has drawn, by row."""
        arrays, size, num_blocks = self._constants.arrays, len(batch), len(batch.block_table)
        if num_blocks > len(arrays["blocks"]):
            raise LocalError(f"a batch of {num_blocks} blocks, {len(arrays['blocks'])} is the most")
        for name in CONSTANT_COLUMNS:
            arrays[name][:size] = settings[name]
        arrays["token_ids"][list(known)] = list(known.values())
        self._fill_constant_padding(size)
        arrays["blocks"][:num_blocks] = batch.block_table
        self._constants.upload(up_to=("blocks", num_blocks))

    def _fill_constant_padding(self, first: int) -> None:
        arrays = self._constants.arrays
        arrays["token_ids"][first:] = 0
        arrays["temperature"][first:] = 0
        arrays["counts_row"][first:] = NO_ROW

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
                    token_tensor(ids, self._device) for ids in (sequence.prompt_token_ids, sequence.output_token_ids)
                )
                reset_counts(self._counts, kept[sequence], prompt, output)
            count_rows[row] = kept[sequence]
        self._counted = kept
        return count_rows

    def _plan(self, batch: DecodeBatch, num_rows: int) -> Plan:
        """The items stand where they are uploaded from, and count on there."""
        capacity, size, arrays = self._capacity(num_rows), len(batch), self._inputs.arrays
        item_tokens = item_tokens_for(
            batch.segments, self.model.config.num_kv_heads, self._num_multiprocessors, self._resident
        )
        items, seq_items = split_items(batch.seq_segments, batch.segments, item_tokens, capacity)
        arrays["items"][:capacity] = items
        arrays["seq_items"][: size + 1] = seq_items
        arrays["seq_items"][size + 1 : num_rows + 1] = seq_items[-1]
        return Plan(arrays["items"][:capacity], seq_items)

    def _fill(self, members: Members) -> None:
        """What of the arrays changes from step to step."""
        batch, arrays, size = members.batch, self._inputs.arrays, len(members.batch)
        arrays["positions"][:size] = batch.positions
        arrays["tail_slots"][:size], arrays["tail_offsets"][:size] = batch.tail_places
        arrays["index"][:size] = batch.tail_lens  # of the token to draw: the prefill node's was number 0
        for row, sequence in members.forced:
            arrays["forced"][row] = forced_token(sequence.params, int(batch.tail_lens[row]))
        if not members.plan.num_steps_left:
            members.plan = self._plan(batch, members.num_rows)

    def _fill_padding(self, first: int, end: int) -> None:
        """Rows beyond the batch touch nothing; and no row is forced, unless its step says so."""
        arrays = self._inputs.arrays
        for name in ("positions", "tail_offsets", "index"):
            arrays[name][first:end] = 0
        for name in ("sources", "tail_slots"):
            arrays[name][first:end] = NO_ROW
        arrays["forced"][:end] = NO_ROW

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
        newest = self._outputs.on_device["token_ids"].clone()  # the step before left them, and this one reads them
        self._fill_padding(0, num_rows)
        self._inputs.arrays["items"][:] = EMPTY
        self._inputs.arrays["seq_items"][:] = 0
        self._inputs.upload()
        self._fill_constant_padding(0)
        self._constants.upload()
        self._forward(num_rows, formats)  # compiles kernels, and lets libraries choose theirs
        self._stream.synchronize()
        graph = captured(lambda: self._forward(num_rows, formats), self._pool)
        self._outputs.on_device["token_ids"].copy_(newest)
        return graph

    def _forward(self, num_rows: int, formats: tuple[str, ...]) -> None:
        """Feed each row's newest token, append its KV to the tail, attend over all segments, sample."""
        arrays, outputs = self._on_device, self._outputs.on_device
        sources, bad_rows = arrays["sources"][:num_rows], outputs["bad_rows"][:num_rows]
        newest = outputs["token_ids"].index_select(0, sources.clamp(min=0))
        token_ids = torch.where(sources >= 0, newest, arrays["token_ids"][:num_rows])
        positions = arrays["positions"][:num_rows]
        bad_rows.zero_()

        def attend(layer_id: int, rows: Projected) -> Tensor:
            return self._attend(layer_id, rows, num_rows, formats)

        hidden = self.model.forward(token_ids, positions, attend)
        logits = self._logits[:num_rows]
        self.model.logits(hidden, out=logits)
        sampling = device_sampling(arrays, num_rows)
        drawn = outputs["token_ids"][:num_rows]
        sample_rows(logits, sampling, self._counts, drawn, outputs["tops"][:num_rows])
        count_tokens(self._counts, sampling.counts_row, drawn)

    def _attend(self, layer_id: int, rows: Projected, num_rows: int, formats: tuple[str, ...]) -> Tensor:
        config, arrays = self.model.config, self._on_device
        slots, capacity = self.arena.layer(layer_id), self._capacity(num_rows)
        norm_rope_append(
            rows.product, rows.q_norm, rows.k_norm, rows.angles.table, rows.angles.positions,
            config.num_heads, config.num_kv_heads, config.rms_norm_eps, self._tail_format.name,
            slots, arrays["tail_slots"][:num_rows], arrays["tail_offsets"][:num_rows],
            self._outputs.on_device["bad_rows"][:num_rows],
        )  # fmt: skip
        q = rows.product.view(num_rows, -1, config.head_dim)[:, : config.num_heads]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        values, stats = self._partials
        paged_decode_attention(
            q, slots, arrays["items"][:capacity], arrays["seq_items"][: num_rows + 1], arrays["blocks"],
            out, values[:capacity], stats[:capacity], config.head_dim**-0.5, config.num_kv_heads, formats,
        )  # fmt: skip
        return out
