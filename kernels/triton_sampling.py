"""Sampling on the GPU: one token per row, the same token as the CPU's sampler, in launches that a graph can capture.

The semantics are those of ``hmad.compute.sampler``, which kernels must not import, and the noise is that of
``cpu_sampling``: the two are the reference twin, and the tests compare tokens. Penalties are applied wherever a logit
is read, so the raw logits stay. Six launches, whatever the rows ask for; a row that does not need one ends it at once:

1. tops: each chunk of a row finds its largest logit (and its share of the softmax, for a top_p without top_k);
2. plan: a row's largest logit, its token if nothing is drawn, and a bound that no cutoff can be below;
3. gather: chunks copy the logits above that bound, usually few, to one place;
4. cutoff: the smallest logit that survives the filters, found digit by digit of the floats' ordered bits, without a
   sort;
5. draw: each chunk finds its best score, with noise;
6. settle: the best of a row's chunks.

Masses and scores are float64, so the token is the CPU's unless a mass is within rounding (1e-12) of a border. What is
slow or missing in float64 on some GPUs is needed for few logits: a bound in float32 rules out all others. Limit: the
logits read three times (1, 3 and 5), once for greedy rows, over memory bandwidth.
"""

import math
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from hmad_kernels.triton_common import bits_of, check_place, check_tensor, described, float_of

CHUNK = 1024  # logits of a program
MAX_VOCAB = 1 << 20
SEEN = tl.constexpr(1 << 30)  # the flag of a count: the token is in the prompt; below it, how often it was put out
LARGEST_LOGIT = tl.constexpr(3.4028234663852886e38)
DIGIT_BITS, DIGITS = tl.constexpr(4), tl.constexpr(16)
LN_2 = tl.constexpr(math.log(2.0))
UNIT = tl.constexpr(2.0**-32)
# No noise is larger: u is at most 1 - 2^-33, whose Gumbel value is 22.87.
MAX_NOISE, MIN_NOISE = tl.constexpr(23.0), tl.constexpr(3.5)  # nor is any below -log(log(2^33)) = -3.13
SLACK = tl.constexpr(1e-3)  # far more than float32 errs for a score that can win, which is above -30

ROW_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
CUTOFF_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# The types of the fields of ``DeviceSampling``. Float64, as on the CPU: temperature 0.6 in float32 is another number.
DTYPES = {
    "temperature": torch.float64, "top_k": torch.int32, "top_p": torch.float64, "min_p": torch.float64,
    "repetition": torch.float64, "frequency": torch.float64, "presence": torch.float64, "seed": torch.int64,
    "index": torch.int64, "forced": torch.int64, "counts_row": torch.int32,
}  # fmt: skip
NEUTRAL = {"top_p": 1.0, "repetition": 1.0, "forced": -1, "counts_row": -1}  # 0 for all others


@dataclass(frozen=True)
class DeviceSampling:
    """What decides each row's token besides its logits: tensors [B] on the device."""

    temperature: torch.Tensor  # 0: greedy
    top_k: torch.Tensor  # 0: off
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor
    seed: torch.Tensor  # the 64 bits of an unsigned seed
    index: torch.Tensor  # of the token, from 0
    forced: torch.Tensor  # the token that it must be; -1: none
    counts_row: torch.Tensor  # the row of ``counts``; -1: no penalties

    @classmethod
    def neutral(cls, num_rows: int, device: torch.device | str) -> "DeviceSampling":
        """Greedy rows without penalties: what padding may be, and a place to copy parameters to."""
        return cls(
            **{
                name: torch.full((num_rows,), NEUTRAL.get(name, 0), dtype=dtype, device=device)
                for name, dtype in DTYPES.items()
            }
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def sample_rows(
    logits: torch.Tensor,
    params: DeviceSampling,
    counts: torch.Tensor,
    tokens_out: torch.Tensor,
    tops_out: torch.Tensor,
) -> None:
    """One token for each row of logits, float32 [B, vocab], into tokens_out int64 [B].

    ``counts`` int32 [R, vocab] is what ``reset_counts`` and ``count_tokens`` made. ``tops_out`` float32 [B] becomes
    each row's largest raw logit, NaN if it has a NaN: where that is not finite the row is unsound, and its token is 0.
    What ``params`` say is not checked here. Raises ValueError on shapes, dtypes and memory that do not fit.
    """
    num_rows, vocab = _check(logits, params, counts, tokens_out, tops_out)
    if not num_rows:
        return
    num_chunks = triton.cdiv(vocab, CHUNK)

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    chunk_raw, chunk_max = (empty(num_rows, num_chunks, dtype=torch.float32) for _ in range(2))
    chunk_best = empty(num_rows, num_chunks, dtype=torch.int64)  # the largest logit's key and token
    chunk_mass, chunk_score = empty(num_rows, num_chunks), empty(num_rows, num_chunks)
    chunk_token = empty(num_rows, num_chunks, dtype=torch.int32)
    top, low = empty(num_rows, dtype=torch.float32), empty(num_rows, dtype=torch.float32)
    total, cutoff = empty(num_rows), empty(num_rows)
    gathered, num_gathered = torch.empty_like(logits), empty(num_rows, dtype=torch.int32)
    p = params
    penalties = p.repetition, p.frequency, p.presence, counts, p.counts_row
    constants = row_constants(vocab)
    chunks, rows = (num_rows, num_chunks), (num_rows,)
    _tops_kernel[chunks](
        logits, *penalties, p.temperature, p.top_k, p.top_p,
        chunk_raw, chunk_max, chunk_best, chunk_mass, **constants, **ROW_OPTIONS,
    )  # fmt: skip
    _plan_kernel[rows](
        p.temperature, p.top_k, p.top_p, p.min_p, p.forced, chunk_raw, chunk_max, chunk_best, chunk_mass,
        top, low, total, cutoff, num_gathered, tokens_out, tops_out, **constants, **ROW_OPTIONS,
    )  # fmt: skip
    _gather_kernel[chunks](logits, *penalties, chunk_max, low, gathered, num_gathered, **constants, **ROW_OPTIONS)
    _cutoff_kernel[rows](
        p.temperature, p.top_k, p.top_p, top, low, total, gathered, num_gathered, cutoff,
        **constants, **CUTOFF_OPTIONS,
    )  # fmt: skip
    _draw_kernel[chunks](
        logits, *penalties, p.temperature, p.seed, p.index, chunk_max, top, cutoff, chunk_score, chunk_token,
        **constants, **ROW_OPTIONS,
    )  # fmt: skip
    _settle_kernel[rows](cutoff, chunk_score, chunk_token, tokens_out, **constants, **ROW_OPTIONS)


def row_constants(vocab: int) -> dict[str, int]:
    """The compile-time constants of the kernels that know rows."""
    return {"VOCAB": vocab, "NUM_CHUNKS": triton.cdiv(vocab, CHUNK), "CHUNK": CHUNK}


def count_tokens(counts: torch.Tensor, counts_row: torch.Tensor, tokens: torch.Tensor) -> None:
    """Count tokens int64 [B], each in its row of counts int32 [R, vocab]; counts_row int32 [B], -1: nowhere."""
    check_tensor("counts", counts, torch.int32, (-1, -1))
    check_tensor("counts_row", counts_row, torch.int32, (-1,))
    check_tensor("tokens", tokens, torch.int64, tuple(counts_row.shape))
    check_place({"counts": counts, "counts_row": counts_row, "tokens": tokens})
    if len(tokens):
        _count_kernel[(triton.cdiv(len(tokens), CHUNK),)](
            counts, counts_row, tokens, len(tokens), counts.shape[1], BLOCK=CHUNK, **ROW_OPTIONS
        )


def reset_counts(counts: torch.Tensor, row: int, prompt_ids: torch.Tensor, output_ids: torch.Tensor) -> None:
    """Let a row of counts int32 [R, vocab] be that of a sequence of these tokens, int64 [n] on the same device.

    The tokens are not looked at: whoever made the sequence has. Raises ValueError on shapes and dtypes that do not fit.
    """
    check_tensor("counts", counts, torch.int32, (-1, -1))
    if not 0 <= row < len(counts):
        raise ValueError(f"there is no row {row} in counts, {described(counts)}")
    for name, ids in (("prompt_ids", prompt_ids), ("output_ids", output_ids)):
        check_tensor(name, ids, torch.int64, (-1,))
    check_place({"counts": counts, "prompt_ids": prompt_ids, "output_ids": output_ids})
    counts[row].zero_()
    counts[row].index_fill_(0, prompt_ids, SEEN.value)
    counts[row].index_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.int32))


def _check(
    logits: torch.Tensor,
    params: DeviceSampling,
    counts: torch.Tensor,
    tokens_out: torch.Tensor,
    tops_out: torch.Tensor,
) -> tuple[int, int]:
    check_tensor("logits", logits, torch.float32, (-1, -1))
    num_rows, vocab = logits.shape
    if not 0 < vocab <= MAX_VOCAB:
        raise ValueError(f"logits must have 1 to {MAX_VOCAB} columns, not {described(logits)}")
    for name, tensor in params.tensors().items():
        check_tensor(name, tensor, DTYPES[name], (num_rows,))
    check_tensor("counts", counts, torch.int32, (-1, vocab))
    check_tensor("tokens_out", tokens_out, torch.int64, (num_rows,))
    check_tensor("tops_out", tops_out, torch.float32, (num_rows,))
    outputs = {"tokens_out": tokens_out, "tops_out": tops_out}
    check_place({"logits": logits, "counts": counts} | params.tensors() | outputs)
    return num_rows, vocab


# --- what kernels share -----------------------------------------------------------------------------------------------


@triton.jit
def _ordered(x):
    """Keys, uint32, in the order of the floats; both zeros are one."""
    bits = bits_of(x)
    bits = tl.where(x == 0.0, 0, bits)
    return bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000)


@triton.jit
def _unordered(key):
    """The float of a key."""
    return float_of(key ^ tl.where((key >> 31) != 0, 0x80000000, 0xFFFFFFFF))


@triton.jit
def _penalized(x, row, ids, exists, repetition, frequency, presence, counts, counts_row, VOCAB: tl.constexpr):
    """Logits of one row under its penalties, rounded to float32 where the CPU stores them."""
    place = tl.load(counts_row + row).to(tl.int64)
    if place >= 0:
        seen = tl.load(counts + place * VOCAB + ids, mask=exists, other=0)
        times = seen & (SEEN - 1)
        factor = tl.load(repetition + row)
        if factor != 1.0:
            wide = x.to(tl.float64)
            wide = tl.where(wide > 0, wide / factor, wide * factor)
            wide = tl.minimum(tl.maximum(wide, -LARGEST_LOGIT), LARGEST_LOGIT)
            x = tl.where(seen != 0, wide.to(tl.float32), x)
        penalty = tl.load(frequency + row) * times.to(tl.float64) + tl.load(presence + row)
        x = tl.where(times != 0, (x.to(tl.float64) - penalty).to(tl.float32), x)
    return x


@triton.jit
def _filters(row, temperature, top_k, top_p, VOCAB: tl.constexpr):
    """Whether a row that is drawn has an effective top_k, and a top_p."""
    random = tl.load(temperature + row) > 0
    k = tl.load(top_k + row)
    return random & (k > 0) & (k < VOCAB), random & (tl.load(top_p + row) < 1.0)


@triton.jit
def _weights(x, top, temperature):
    """Softmax without its denominator, float64: 1 for the largest logit, 0 for -inf."""
    return tl.where(x > float("-inf"), tl.exp((x.to(tl.float64) - top) / temperature), 0.0)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tops_kernel(
    logits, repetition, frequency, presence, counts, counts_row, temperature, top_k, top_p,
    chunk_raw, chunk_max, chunk_best, chunk_mass,
    VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    exists = ids < VOCAB
    raw = tl.load(logits + row * VOCAB + ids, mask=exists, other=float("-inf"))
    is_nan = raw != raw
    peak = tl.max(tl.where(is_nan, float("-inf"), raw), axis=0)
    place = row * NUM_CHUNKS + chunk
    tl.store(chunk_raw + place, tl.where(tl.max(is_nan.to(tl.int32), axis=0) > 0, float("nan"), peak))
    x = _penalized(raw, row, ids, exists, repetition, frequency, presence, counts, counts_row, VOCAB)
    # One number orders logits, and among equal ones the lower token first.
    best = ((_ordered(x).to(tl.int64) - (1 << 31)) << 32) | (0xFFFFFFFF - ids.to(tl.int64))
    best = tl.max(tl.where(exists, best, -(1 << 63)), axis=0)
    largest = _unordered(((best >> 32) + (1 << 31)).to(tl.uint32))
    tl.store(chunk_best + place, best)
    tl.store(chunk_max + place, largest)
    has_top_k, has_top_p = _filters(row, temperature, top_k, top_p, VOCAB)
    if has_top_p & (has_top_k == 0):
        weights = _weights(x, largest.to(tl.float64), tl.load(temperature + row))
        tl.store(chunk_mass + place, tl.sum(weights, axis=0))


@triton.jit
def _plan_kernel(
    temperature, top_k, top_p, min_p, forced, chunk_raw, chunk_max, chunk_best, chunk_mass,
    top, low, total, cutoff, num_gathered, tokens_out, tops_out,
    VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Cutoff infinity says that nothing is drawn, low infinity that nothing is to be filtered."""
    row = tl.program_id(0).to(tl.int64)
    BLOCK: tl.constexpr = triton.next_power_of_2(NUM_CHUNKS)
    chunks = tl.arange(0, BLOCK)
    exists = chunks < NUM_CHUNKS
    place = row * NUM_CHUNKS + chunks
    raw = tl.load(chunk_raw + place, mask=exists, other=float("-inf"))
    raw_top = tl.max(tl.where(raw != raw, float("-inf"), raw), axis=0)
    raw_top = tl.where(tl.max((raw != raw).to(tl.int32), axis=0) > 0, float("nan"), raw_top)
    tl.store(tops_out + row, raw_top)
    is_sound = (raw_top > float("-inf")) & (raw_top < float("inf"))
    best = tl.max(tl.load(chunk_best + place, mask=exists, other=-(1 << 63)), axis=0)
    must_be = tl.load(forced + row)
    token = tl.where(must_be >= 0, must_be, 0xFFFFFFFF - (best & 0xFFFFFFFF))
    tl.store(tokens_out + row, tl.where(is_sound, token, 0))

    largest = _unordered(((best >> 32) + (1 << 31)).to(tl.uint32))
    tl.store(top + row, largest)
    tl.store(num_gathered + row, 0)
    heat = tl.load(temperature + row)
    is_drawn = is_sound & (must_be < 0) & (heat > 0)
    has_top_k, has_top_p = _filters(row, temperature, top_k, top_p, VOCAB)
    floor = tl.full([], float("-inf"), tl.float64)
    bound = tl.full([], float("inf"), tl.float32)
    if is_drawn:
        lightest = tl.load(min_p + row)
        if lightest > 0:
            floor = largest.to(tl.float64) + heat * tl.log(lightest)
        if has_top_k:
            # Each of the k largest chunks holds a logit of at least the k-th of their maxima.
            k = tl.load(top_k + row)
            bound = tl.full([], float("-inf"), tl.float32)
            if k <= NUM_CHUNKS:
                maxima = chunk_max + row * NUM_CHUNKS
                bound = _unordered(_search(maxima, NUM_CHUNKS, k.to(tl.float64), 0.0, 1.0, BLOCK, WEIGHTED=False))
        elif has_top_p:
            # Tokens rarer than this together have less than 1 - top_p, so the nucleus is among the others.
            share = tl.load(top_p + row)
            maxima = tl.load(chunk_max + place, mask=exists, other=float("-inf"))
            masses = tl.load(chunk_mass + place, mask=exists, other=0.0)
            tl.store(total + row, tl.sum(masses * _weights(maxima, largest.to(tl.float64), heat), axis=0))
            wide = largest.to(tl.float64) + heat * (tl.log((1.0 - share) / VOCAB) - SLACK)
            bound = (wide - tl.abs(wide) * 1e-6).to(tl.float32)
    tl.store(low + row, bound)
    tl.store(cutoff + row, tl.where(is_drawn, floor, float("inf")))


@triton.jit
def _gather_kernel(
    logits, repetition, frequency, presence, counts, counts_row, chunk_max, low, gathered, num_gathered,
    VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Copy what is not below the bound to the front of the row's place, in any order."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    bound = tl.load(low + row)
    if bound == float("inf"):
        return
    if tl.load(chunk_max + row * NUM_CHUNKS + chunk) < bound:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    exists = ids < VOCAB
    x = tl.load(logits + row * VOCAB + ids, mask=exists, other=float("-inf"))
    x = _penalized(x, row, ids, exists, repetition, frequency, presence, counts, counts_row, VOCAB)
    lives = (exists & (x >= bound)).to(tl.int32)
    first = tl.atomic_add(num_gathered + row, tl.sum(lives, axis=0))
    place = first + tl.cumsum(lives, axis=0) - 1
    tl.store(gathered + row * VOCAB + place, x, mask=lives != 0)


@triton.jit
def _cutoff_kernel(
    temperature, top_k, top_p, top, low, total, gathered, num_gathered, cutoff,
    VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(low + row) == float("inf"):
        return
    values, num_values = gathered + row * VOCAB, tl.load(num_gathered + row)
    largest, heat = tl.load(top + row), tl.load(temperature + row)
    has_top_k, has_top_p = _filters(row, temperature, top_k, top_p, VOCAB)
    floor = _ordered(tl.full([], float("-inf"), tl.float32))
    if has_top_k:
        k = tl.load(top_k + row).to(tl.float64)
        floor = tl.maximum(floor, _search(values, num_values, k, 0.0, 1.0, CHUNK, WEIGHTED=False))
    if has_top_p:
        mass = tl.load(total + row)
        if has_top_k:
            mass = _mass(values, num_values, floor, largest, heat, CHUNK)
        goal = tl.load(top_p + row) * mass
        nucleus = _search(values, num_values, goal, largest, heat, CHUNK, WEIGHTED=True)
        floor = tl.maximum(floor, tl.minimum(nucleus, _ordered(largest)))
    tl.store(cutoff + row, tl.maximum(tl.load(cutoff + row), _unordered(floor).to(tl.float64)))


@triton.jit
def _draw_kernel(
    logits, repetition, frequency, presence, counts, counts_row, temperature, seed, index,
    chunk_max, top, cutoff, chunk_score, chunk_token,
    VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The best of (logit - top) / temperature + noise among a chunk's logits at or above the cutoff.

    Noise is below -log(1 - u), and nearly that where it is large. So a bound of each score is worked out in float32,
    and the scores themselves from the highest bound on, until no other can win: one or two of them.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    floor = tl.load(cutoff + row)
    if floor == float("inf"):
        return
    place = row * NUM_CHUNKS + chunk
    largest, heat = tl.load(top + row), tl.load(temperature + row)
    best, token = tl.full([], float("-inf"), tl.float64), tl.full([], VOCAB, tl.int32)
    # The largest logit's own noise is above -MIN_NOISE: with the luckiest, a chunk far enough below it still loses.
    reach = (tl.load(chunk_max + place).to(tl.float64) - largest) / heat + MAX_NOISE
    if (tl.load(chunk_max + place).to(tl.float64) >= floor) & (reach > -MIN_NOISE):
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        exists = ids < VOCAB
        x = tl.load(logits + row * VOCAB + ids, mask=exists, other=float("-inf"))
        x = _penalized(x, row, ids, exists, repetition, frequency, presence, counts, counts_row, VOCAB)
        words = _random_words(tl.load(seed + row), tl.load(index + row), chunk, CHUNK)
        coolness = tl.minimum(1.0 / heat, 1e30).to(tl.float32)
        rest = (0xFFFFFFFF - words).to(tl.float32) + 0.5  # (1 - u) * 2^32
        bound = (x - largest) * coolness + (32 * LN_2 - tl.log(rest))
        bound = tl.where(exists & (x.to(tl.float64) >= floor) & (x > float("-inf")), bound, float("-inf"))
        peak, at = tl.max(bound, axis=0, return_indices=True)
        while (peak > float("-inf")) & (peak + SLACK >= best):
            is_it = ids == chunk * CHUNK + at
            word = tl.sum(tl.where(is_it, words.to(tl.int64), 0), axis=0)
            logit = tl.max(tl.where(is_it, x, float("-inf")), axis=0)
            noise = -tl.log(-tl.log((word.to(tl.float64) + 0.5) * UNIT))
            score = (logit.to(tl.float64) - largest) / heat + noise
            better = (score > best) | ((score == best) & (chunk * CHUNK + at < token))
            token = tl.where(better, chunk * CHUNK + at, token)
            best = tl.where(better, score, best)
            bound = tl.where(is_it, float("-inf"), bound)
            peak, at = tl.max(bound, axis=0, return_indices=True)
    tl.store(chunk_score + place, best)
    tl.store(chunk_token + place, token)


@triton.jit
def _settle_kernel(
    cutoff, chunk_score, chunk_token, tokens_out,
    VOCAB: tl.constexpr, NUM_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The best of a row's chunks, the lowest token where scores tie."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(cutoff + row) == float("inf"):
        return
    chunks = tl.arange(0, triton.next_power_of_2(NUM_CHUNKS))
    exists = chunks < NUM_CHUNKS
    place = row * NUM_CHUNKS + chunks
    scores = tl.load(chunk_score + place, mask=exists, other=float("-inf"))
    tokens = tl.load(chunk_token + place, mask=exists, other=VOCAB)
    token = tl.min(tl.where(scores == tl.max(scores, axis=0), tokens, VOCAB), axis=0)
    tl.store(tokens_out + row, token.to(tl.int64))


@triton.jit(do_not_specialize=["num_tokens"])
def _count_kernel(counts, counts_row, tokens, num_tokens, vocab, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = place < num_tokens
    row = tl.load(counts_row + place, mask=exists, other=-1).to(tl.int64)
    token = tl.load(tokens + place, mask=exists, other=0)
    tl.atomic_add(counts + row * vocab + token, 1, mask=row >= 0)


@triton.jit
def _random_words(seed, index, chunk, CHUNK: tl.constexpr):
    """Philox words of a chunk's tokens: token id takes word id % 4 of the counter (id // 4, index, 0, 0)."""
    counter = (chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)).to(tl.uint32)
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, zero + (index & 0xFFFFFFFF).to(tl.uint32), zero, zero)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _mass(values, num_values, floor_key, top, temperature, TILE: tl.constexpr):
    """What the values at or above a key weigh together."""
    total = tl.zeros([TILE], tl.float64)
    for begin in range(0, num_values, TILE):
        place = begin + tl.arange(0, TILE)
        x = tl.load(values + place, mask=place < num_values, other=float("-inf"))
        total += tl.where(_ordered(x) >= floor_key, _weights(x, top, temperature), 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _search(values, num_values, goal, top, temperature, TILE: tl.constexpr, WEIGHTED: tl.constexpr):
    """The highest key at or above which values number at least ``goal`` (WEIGHTED: weigh so much).

    Digit by digit: of the 16 continuations of what is known, the highest that leaves enough.
    """
    known = tl.full([], 0, tl.uint32)
    digits = tl.arange(0, DIGITS)
    for step in range(0, 32 // DIGIT_BITS):
        shift = 32 - DIGIT_BITS * (step + 1)
        thresholds = known | (digits << shift).to(tl.uint32)
        found = tl.zeros([DIGITS], tl.float64)
        for begin in range(0, num_values, TILE):
            place = begin + tl.arange(0, TILE)
            x = tl.load(values + place, mask=place < num_values, other=float("-inf"))
            key = _ordered(x)
            if WEIGHTED:
                measure = _weights(x, top, temperature)
            else:
                measure = tl.where(place < num_values, 1.0, 0.0).to(tl.float64)
            above = key[None, :] >= thresholds[:, None]
            found += tl.sum(tl.where(above, measure[None, :], 0.0), axis=1)
        digit = tl.max(tl.where(found >= goal, digits, 0), axis=0)
        known = known | (digit << shift).to(tl.uint32)
    return known
