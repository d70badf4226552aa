"""Logits to tokens: a pure function of (logits, parameters, seed, token index), so any node can go on with a sequence.

The order is the one vLLM's users know: log-probabilities of the raw logits; then penalties, temperature,
top_k, top_p, min_p, and the draw. Each filter keeps a row's largest logits, so all three together are one number per
row, the cutoff; a token that ties with the last one kept is kept too, so the outcome hangs on no sorting order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hmad.facts.errors import NonFiniteLogitsError
from hmad.facts.sampling import SampledToken, SamplingParams, TokenLogprobs
from hmad_kernels.cpu_sampling import gumbel_argmax

LARGEST_LOGIT = float(np.finfo(np.float32).max)

TokenIds = Sequence[int] | NDArray[np.integer]
Floats = NDArray[np.float32]  # [N, vocab], or [vocab] for one row


@dataclass(slots=True)
class SamplerInput:
    """What decides one row's token besides its logits. ``index`` counts the choice's tokens from 0.

    The token ids are read only under penalties. A numpy array or an ``array.array`` of them is read in place; a tuple
    or list is converted anew in every step, which costs some 30 ns a token.
    """

    params: SamplingParams
    seed: int
    index: int
    prompt_token_ids: TokenIds
    output_token_ids: TokenIds


def sample(logits: torch.Tensor, rows: Sequence[SamplerInput]) -> list[SampledToken | NonFiniteLogitsError]:
    """One token per row of float32 logits [N, vocab]; a row that cannot be sampled yields its error, alone."""
    # numpy's argmax takes one thread and SIMD; torch's wakes a thread team, which on a busy machine costs milliseconds.
    raw: Floats = logits.detach().cpu().numpy()
    top_ids = raw.argmax(1)
    # argmax stops at a NaN, so the value there tells whether the row is sound.
    tops = raw[np.arange(len(rows)), top_ids]
    sound = np.isfinite(tops).tolist()
    token_ids = choose(raw, top_ids.tolist(), [i for i, ok in enumerate(sound) if ok], rows)
    return [
        describe(raw[i], row.params, token_ids[i]) if sound[i] else non_finite(tops[i], row.index)
        for i, row in enumerate(rows)
    ]


def finish_reason(token_id: int, index: int, params: SamplingParams) -> str | None:
    """Why a choice ends with its token number ``index`` (from 0): ``stop``, ``length``, or None if it goes on."""
    if token_id in params.stop_token_ids:
        return "stop"
    return "length" if index + 1 >= params.max_tokens else None


def choose(raw: Floats, top_ids: list[int], live: list[int], rows: Sequence[SamplerInput]) -> list[int]:
    """Token ids of the ``live`` rows; the others keep what stands in ``top_ids``, the argmax of the raw logits."""
    token_ids, logits = top_ids, raw
    penalized = [i for i in live if rows[i].params.penalized]
    if penalized:
        logits = raw.copy()
    for i in penalized:
        penalize(logits[i], rows[i])
        token_ids[i] = int(logits[i].argmax())
    random = [i for i in live if not rows[i].params.greedy]
    if random:
        for i, token_id in zip(random, draw(logits, random, rows), strict=True):
            token_ids[i] = token_id
    for i in live:
        if rows[i].index < len(rows[i].params.forced_token_ids):
            token_ids[i] = rows[i].params.forced_token_ids[rows[i].index]
    return token_ids


def penalize(logits: Floats, row: SamplerInput) -> None:
    """Repetition penalty over prompt and output, frequency and presence over the output; in place, [vocab]."""
    params = row.params
    output = np.asarray(row.output_token_ids, dtype=np.int64)
    if params.repetition_penalty != 1.0:
        # Ids may repeat: each of its copies writes the same value.
        seen = np.concatenate([np.asarray(row.prompt_token_ids, dtype=np.int64), output])
        old = logits[seen].astype(np.float64)
        with np.errstate(over="ignore"):
            new = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
        logits[seen] = new.clip(-LARGEST_LOGIT, LARGEST_LOGIT)
    if params.frequency_penalty or params.presence_penalty:
        counts = np.bincount(output)
        used = np.flatnonzero(counts)
        logits[used] -= params.frequency_penalty * counts[used] + params.presence_penalty


def draw(logits: Floats, random: list[int], rows: Sequence[SamplerInput]) -> list[int]:
    """One token id for each of the ``random`` rows of penalized logits [N, vocab]."""
    chosen = [rows[i] for i in random]
    tops = [float(logits[i].max()) for i in random]
    cutoffs = [cutoff(logits[i], top, row.params) for i, top, row in zip(random, tops, chosen, strict=True)]
    picks = gumbel_argmax(
        np.ascontiguousarray(logits),
        np.array(random),
        np.array(tops),
        np.array(cutoffs),
        np.array([row.params.temperature for row in chosen]),
        np.array([row.seed for row in chosen], dtype=np.uint64),
        np.array([row.index for row in chosen], dtype=np.uint32),
    )
    token_ids: list[int] = picks.tolist()
    return token_ids


def cutoff(logits: Floats, top: float, params: SamplingParams) -> float:
    """The smallest logit of one row [vocab] that survives top_k, top_p and min_p; ``top`` is its largest."""
    floor, kept = -math.inf, logits
    if 0 < params.top_k < logits.size:
        floor = kth_largest(logits, params.top_k)
        kept = logits[logits >= floor]
    if params.top_p < 1.0:
        floor = max(floor, nucleus_floor(kept, top, params))
    if params.min_p > 0.0:
        floor = max(floor, top + params.temperature * math.log(params.min_p))
    return floor


def nucleus_floor(logits: Floats, top: float, params: SamplingParams) -> float:
    """The smallest logit among the fewest tokens whose probabilities add up to top_p."""
    weights = probability_weights(logits, top, params.temperature)
    total = weights.sum()
    # Tokens rarer than this add up to less than 1 - top_p: the nucleus is found among the few others.
    heavy = weights * logits.size >= (1.0 - params.top_p) * total
    candidates = np.sort(logits[heavy])[::-1]
    mass = np.cumsum(probability_weights(candidates, top, params.temperature))
    last = np.searchsorted(mass, params.top_p * total)
    return float(candidates[min(last, candidates.size - 1)])


def probability_weights(logits: Floats, top: float, temperature: float) -> NDArray[np.float64]:
    """Softmax without its denominator: 1 for the largest logit."""
    with np.errstate(over="ignore"):
        return np.exp((logits.astype(np.float64) - top) / temperature)


def kth_largest(logits: Floats, k: int) -> float:
    return float(np.partition(logits, logits.size - k)[logits.size - k])


def describe(raw: Floats, params: SamplingParams, token_id: int) -> SampledToken:
    """The token with what its request wants to know of the raw logits [vocab]."""
    logprobs = None if params.num_logprobs is None else token_logprobs(raw, token_id, params.num_logprobs)
    return SampledToken(token_id, logprobs, raw.astype("<f4", copy=False).tobytes() if params.want_logits else None)


def token_logprobs(raw: Floats, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-softmax of the raw logits at the token and at the ``num_top`` best, lowest ids first where they tie."""
    top = float(raw.max())
    log_total = top + math.log(probability_weights(raw, top, 1.0).sum())
    best = np.flatnonzero(raw >= kth_largest(raw, num_top)) if 0 < num_top < raw.size else np.arange(raw.size)
    best = best[np.argsort(-raw[best], kind="stable")][:num_top]
    return TokenLogprobs(float(raw[token_id]) - log_total, tuple((int(i), float(raw[i]) - log_total) for i in best))


def non_finite(top: np.float32, index: int) -> NonFiniteLogitsError:
    return NonFiniteLogitsError(
        f"the largest of the logits for output token {index} is {top}: no token can be drawn. "
        "If other requests fail too, the weights or this precision are at fault"
    )
