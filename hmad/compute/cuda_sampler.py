"""Sampling on a CUDA device: parameters as columns, one row per token to draw; see ``hmad.compute.sampler``.

Only a token and its raw logit come back to the host; whole rows of logits only for who asked for logprobs or logits.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hmad.compute.cuda_buffers import Field
from hmad.compute.device import Outcome
from hmad.compute.sampler import SamplerInput, describe, non_finite
from hmad.facts.sampling import SampledToken, SamplingParams
from hmad_kernels.triton_sampling import DTYPES, DeviceSampling, reset_counts, sample_rows

NO_ROW = -1  # of the counts: no penalties; of forced: none


def sampling_fields(num_rows: int) -> dict[str, Field]:
    """The columns as arrays of a bundle."""
    return {name: Field(dtype, (num_rows,)) for name, dtype in DTYPES.items()}


def columns(rows: Iterable[tuple[SamplingParams, int]]) -> dict[str, np.ndarray]:
    """The columns of (parameters, seed) of each row, but for those that change from step to step."""
    params, seeds = zip(*rows, strict=True)
    return {
        "temperature": np.array([p.temperature for p in params]),
        "top_k": np.array([p.top_k for p in params], np.int32),
        "top_p": np.array([p.top_p for p in params]),
        "min_p": np.array([p.min_p for p in params]),
        "repetition": np.array([p.repetition_penalty for p in params]),
        "frequency": np.array([p.frequency_penalty for p in params]),
        "presence": np.array([p.presence_penalty for p in params]),
        "seed": np.array(seeds, np.uint64).view(np.int64),
    }


def forced_token(params: SamplingParams, index: int) -> int:
    """The token that teacher forcing puts at this index of the output, or NO_ROW."""
    return params.forced_token_ids[index] if index < len(params.forced_token_ids) else NO_ROW


def device_sampling(arrays: Mapping[str, Tensor], num_rows: int) -> DeviceSampling:
    """The first rows of the columns, as the kernels take them."""
    return DeviceSampling(**{name: arrays[name][:num_rows] for name in DTYPES})


def outcome(params: SamplingParams, index: int, token_id: int, top: float, raw: np.ndarray | None) -> Outcome:
    """What the device has drawn; ``raw`` float32 [vocab] is there where the row's request asks for it."""
    if not math.isfinite(top):
        return non_finite(np.float32(top), index)
    return SampledToken(token_id) if raw is None else describe(raw, params, token_id)


def wants_logits(params: SamplingParams) -> bool:
    """Whether the host needs the whole row."""
    return params.want_logits or params.num_logprobs is not None


def sample_once(logits: Tensor, rows: Sequence[SamplerInput]) -> list[Outcome]:
    """One token per row of float32 logits [N, vocab]. Waits for the device."""
    device, num_rows = logits.device, len(rows)
    arrays = columns((row.params, row.seed) for row in rows)
    arrays["index"] = np.array([row.index for row in rows], np.int64)
    arrays["forced"] = np.array([forced_token(row.params, row.index) for row in rows], np.int64)
    penalized = [i for i, row in enumerate(rows) if row.params.penalized]
    arrays["counts_row"] = np.full(num_rows, NO_ROW, np.int32)
    arrays["counts_row"][penalized] = np.arange(len(penalized))
    counts = torch.zeros((max(1, len(penalized)), logits.shape[1]), dtype=torch.int32, device=device)
    for number, i in enumerate(penalized):
        reset_counts(
            counts, number, *(token_tensor(ids, device) for ids in (rows[i].prompt_token_ids, rows[i].output_token_ids))
        )
    on_device = {name: torch.from_numpy(array).to(device, DTYPES[name]) for name, array in arrays.items()}
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    tops = torch.empty(num_rows, dtype=torch.float32, device=device)
    sample_rows(logits, device_sampling(on_device, num_rows), counts, tokens, tops)
    drawn = zip(rows, tokens.tolist(), tops.tolist(), logits, strict=True)
    return [
        outcome(row.params, row.index, token_id, top, raw.cpu().numpy() if wants_logits(row.params) else None)
        for row, token_id, top, raw in drawn
    ]


def token_tensor(token_ids: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """int64 [n] on the device."""
    return torch.from_numpy(np.asarray(token_ids, dtype=np.int64)).to(device)
