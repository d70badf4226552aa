"""Sampling on a CUDA device: parameters as columns, one row per token to draw; see ``hmad.compute.sampler``.

Only a token and its raw logit come back to the host; whole rows of logits only for who asked for logprobs or logits.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hmad.compute.cuda_buffers import Bundle, Field, brought, fetched
from hmad.compute.device import Outcome, Outcomes
from hmad.compute.sampler import SamplerInput, describe, non_finite
from hmad.compute.sequence import DecodeSequence
from hmad.facts.sampling import SamplingParams
from hmad_kernels.triton_common import NO_ROW
from hmad_kernels.triton_sampling import DTYPES, DeviceSampling, reset_counts, sample_rows

CONSTANT_COLUMNS = tuple(name for name in DTYPES if name not in ("index", "forced"))  # that no step changes
# The columns of a row that stay the same, and what else the host wants to know of it at a glance.
SETTINGS = np.dtype(
    [
        ("temperature", "f8"), ("top_k", "i4"), ("top_p", "f8"), ("min_p", "f8"),
        ("repetition", "f8"), ("frequency", "f8"), ("presence", "f8"),
        ("seed", "i8"), ("counts_row", "i4"), ("is_penalized", "?"), ("is_forced", "?"), ("is_described", "?"),
    ]
)  # fmt: skip


def sampling_fields(names: Iterable[str], num_rows: int) -> dict[str, Field]:
    """Columns as arrays of a bundle."""
    return {name: Field(DTYPES[name], (num_rows,)) for name in names}


def settings_of(rows: Iterable[tuple[SamplingParams, int]]) -> np.ndarray:
    """SETTINGS of (parameters, seed) of each row; they have no row of the counts yet."""
    return np.array(
        [
            (
                p.temperature, p.top_k, p.top_p, p.min_p,
                p.repetition_penalty, p.frequency_penalty, p.presence_penalty,
                np.uint64(seed).view(np.int64), NO_ROW, p.penalized, bool(p.forced_token_ids), wants_logits(p),
            )
            for p, seed in rows
        ],
        SETTINGS,
    )  # fmt: skip


def forced_token(params: SamplingParams, index: int) -> int:
    """The token that teacher forcing puts at this index of the output, or NO_ROW."""
    return params.forced_token_ids[index] if index < len(params.forced_token_ids) else NO_ROW


def device_sampling(arrays: Mapping[str, Tensor], num_rows: int) -> DeviceSampling:
    """The first rows of the columns, as the kernels take them."""
    return DeviceSampling(**{name: arrays[name][:num_rows] for name in DTYPES})


def outcomes_of(
    rows: Sequence[DecodeSequence | SamplerInput],
    index: np.ndarray,
    token_ids: np.ndarray,
    tops: np.ndarray,
    raw: Mapping[int, np.ndarray],
) -> Outcomes:
    """What the device has drawn; ``raw`` float32 [vocab] is there, by row, where the row's request asks for it."""
    unsound = (~np.isfinite(tops)).nonzero()[0].tolist()
    special: dict[int, Outcome] = {row: non_finite(tops[row], int(index[row])) for row in unsound}
    for row in raw.keys() - unsound:
        special[row] = describe(raw[row], rows[row].params, int(token_ids[row]))
    return Outcomes(token_ids, special)


def wants_logits(params: SamplingParams) -> bool:
    """Whether the host needs the whole row."""
    return params.want_logits or params.num_logprobs is not None


def sample_once(logits: Tensor, rows: Sequence[SamplerInput]) -> list[Outcome]:
    """One token per row of float32 logits [N, vocab]. Waits for the device when all is launched."""
    device, num_rows = logits.device, len(rows)
    settings = settings_of((row.params, row.seed) for row in rows)
    penalized = settings["is_penalized"].nonzero()[0].tolist()
    settings["counts_row"][penalized] = np.arange(len(penalized))
    columns = Bundle(sampling_fields(DTYPES, num_rows), device, turns=1)
    for name in CONSTANT_COLUMNS:
        columns.arrays[name][:] = settings[name]
    columns.arrays["index"][:] = [row.index for row in rows]
    columns.arrays["forced"][:] = [forced_token(row.params, row.index) for row in rows]
    columns.upload()
    counts = torch.zeros((max(1, len(penalized)), logits.shape[1]), dtype=torch.int32, device=device)
    for number, i in enumerate(penalized):
        reset_counts(
            counts, number, *(brought(ids, device) for ids in (rows[i].prompt_token_ids, rows[i].output_token_ids))
        )
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    tops = torch.empty(num_rows, dtype=torch.float32, device=device)
    sample_rows(logits, device_sampling(columns.on_device, num_rows), counts, tokens, tops)
    described = settings["is_described"].nonzero()[0].tolist()
    token_ids, largest, *raw = fetched(tokens, tops, *(logits[row] for row in described))
    return list(outcomes_of(rows, columns.arrays["index"], token_ids, largest, dict(zip(described, raw, strict=True))))
