"""Gumbel-max sampling with Philox4x32-10: noise is a pure function of (seed, token index, vocabulary id).

Adding Gumbel noise to logits / temperature and taking the argmax draws from the softmax (Gumbel, 1954). The noise
comes from the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011):
key = the 64-bit seed, counter = (id // 4, token index, 0, 0), and id takes word id % 4 of the four. Scores are
float64, so that the last bit of a device's log decides nothing in practice.
"""

import math

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from hmad_kernels.cpu_common import COMPILE

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
ROUNDS = 10
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)
UNIT = 2.0**-32
# No noise is larger: u is at most 1 - 2^-33, whose Gumbel value is 22.87.
MAX_NOISE = 23.0
# Below this many logits the start of the thread team costs more than it saves.
PARALLEL_LOGITS = 1 << 20


@njit(inline="always", **COMPILE)
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four random 32-bit words of a 128-bit counter and a 64-bit key; every word in a uint64."""
    for _ in range(ROUNDS):
        left = MULTIPLIERS[0] * c0
        right = MULTIPLIERS[1] * c2
        c0, c1 = (right >> WORD_BITS) ^ c1 ^ k0, right & LOW_WORD
        c2, c3 = (left >> WORD_BITS) ^ c3 ^ k1, left & LOW_WORD
        k0 = (k0 + KEY_STEPS[0]) & LOW_WORD
        k1 = (k1 + KEY_STEPS[1]) & LOW_WORD
    return c0, c1, c2, c3


@njit(inline="always", **COMPILE)
def noise_bound(word):
    """A number no smaller than the noise of a word, without its logarithms.

    Gumbel noise is below -log(1 - u), and 1 - u is at least 2^(exponent - 32).
    """
    rest = np.float64(np.float64(LOW_WORD - word) + 0.5)  # (1 - u) * 2^32, exact
    exponent = np.int64(rest.view(np.uint64) >> np.uint64(52)) - 1023
    return (32 - exponent) * math.log(2.0)


@njit(inline="always", **COMPILE)
def gumbel(word):
    return -math.log(-math.log((np.float64(word) + 0.5) * UNIT))


@njit(**COMPILE)
def pick(logits, top, cutoff, temperature, seed, index):
    """The argmax of (logit - top) / temperature + noise over one row's logits at or above the cutoff."""
    best, best_id, floor = -np.inf, np.int64(-1), cutoff
    for first in range(0, logits.size, 4):
        last = min(first + 4, logits.size)
        alive = False
        for token_id in range(first, last):
            alive |= logits[token_id] >= floor
        if not alive:
            continue
        words = philox4x32(
            np.uint64(first // 4), np.uint64(index), np.uint64(0), np.uint64(0), seed & LOW_WORD, seed >> WORD_BITS
        )
        for token_id in range(first, last):
            if logits[token_id] < floor:
                continue
            score = (np.float64(logits[token_id]) - top) / temperature
            word = words[token_id - first]
            if score + noise_bound(word) > best and score + gumbel(word) > best:
                best, best_id = score + gumbel(word), np.int64(token_id)
                # With the luckiest noise, a logit below this still loses.
                floor = max(cutoff, top + (best - MAX_NOISE) * temperature)
    return best_id


@njit(**COMPILE)
def pick_rows(logits, rows, tops, cutoffs, temperatures, seeds, indices, picks):
    for i in range(rows.size):
        picks[i] = pick(logits[rows[i]], tops[i], cutoffs[i], temperatures[i], seeds[i], indices[i])


@njit(parallel=True, **COMPILE)
def pick_rows_parallel(logits, rows, tops, cutoffs, temperatures, seeds, indices, picks):
    for i in prange(rows.size):
        picks[i] = pick(logits[rows[i]], tops[i], cutoffs[i], temperatures[i], seeds[i], indices[i])


def gumbel_argmax(
    logits: NDArray[np.float32],  # [N, vocab]
    rows: NDArray[np.int64],  # [M], which rows of logits to draw from
    tops: NDArray[np.float64],  # [M], the largest logit of each
    cutoffs: NDArray[np.float64],  # [M], logits below are filtered out; at most the top
    temperatures: NDArray[np.float64],  # [M], above 0
    seeds: NDArray[np.uint64],  # [M]
    indices: NDArray[np.uint32],  # [M], token index
) -> NDArray[np.int64]:
    """Draw one token id from each chosen row; the lowest id where scores tie. Finite logits or -inf only."""
    if logits.dtype != np.float32 or not logits.flags.c_contiguous:
        raise ValueError("gumbel_argmax takes contiguous float32 logits")
    picks = np.empty(rows.size, np.int64)
    launch = pick_rows_parallel if rows.size > 1 and rows.size * logits.shape[1] >= PARALLEL_LOGITS else pick_rows
    launch(logits, rows, tops, cutoffs, temperatures, seeds, indices, picks)
    return picks


def gumbel_argmax_reference(
    logits: NDArray[np.float32],
    rows: NDArray[np.int64],
    tops: NDArray[np.float64],
    cutoffs: NDArray[np.float64],
    temperatures: NDArray[np.float64],
    seeds: NDArray[np.uint64],
    indices: NDArray[np.uint32],
) -> NDArray[np.int64]:
    """The same in plain numpy: every noise of every row is drawn."""
    chosen = logits[rows].astype(np.float64)
    scores = (chosen - tops[:, None]) / temperatures[:, None]
    noise = np.stack([noise_reference(logits.shape[1], *row) for row in zip(seeds, indices, strict=True)])
    picks: NDArray[np.int64] = np.where(chosen >= cutoffs[:, None], scores + noise, -np.inf).argmax(1)
    return picks


def noise_reference(vocab_size: int, seed: np.uint64, index: np.uint32) -> NDArray[np.float64]:
    """Gumbel noise of one row, [vocab]."""
    blocks = np.arange(-(-vocab_size // 4), dtype=np.uint64)
    counter = np.stack([blocks, np.full_like(blocks, index), np.zeros_like(blocks), np.zeros_like(blocks)])
    words = philox4x32_reference(counter, int(seed) & 0xFFFFFFFF, int(seed) >> 32).T.reshape(-1)[:vocab_size]
    noise: NDArray[np.float64] = -np.log(-np.log((words + 0.5) * UNIT))
    return noise


def philox4x32_reference(counter: NDArray[np.uint64], key_low: int, key_high: int) -> NDArray[np.uint64]:
    """Philox4x32-10 of a whole array of counters: [4, n] words in, [4, n] words out."""
    c0, c1, c2, c3 = counter
    for number in range(ROUNDS):
        k0 = np.uint64((key_low + number * int(KEY_STEPS[0])) & 0xFFFFFFFF)
        k1 = np.uint64((key_high + number * int(KEY_STEPS[1])) & 0xFFFFFFFF)
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (right >> WORD_BITS) ^ c1 ^ k0, right & LOW_WORD
        c2, c3 = (left >> WORD_BITS) ^ c3 ^ k1, left & LOW_WORD
    return np.stack([c0, c1, c2, c3])


def warm_up() -> None:
    """Compile both variants, or load them from the cache."""
    logits = np.zeros((2, 4), np.float32)
    ones = np.ones(2)
    tail = (np.arange(2), ones, ones - 1, ones, np.zeros(2, np.uint64), np.zeros(2, np.uint32), np.empty(2, np.int64))
    for launch in (pick_rows, pick_rows_parallel):
        launch(logits, *tail)
