"""What a comparison of paired answers can claim, and how far apart two distributions are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054  # the two-sided 95 % point of the normal distribution
BISECTIONS = 60

Verdict = Literal["non-inferior", "worse", "cannot tell"]
Logits = NDArray[np.float32]  # [tokens, vocab]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairedLoss:
    """How many of ``num_questions`` only the baseline answered right (``lost``), and only the candidate (``gained``).

    The loss is a share of all questions, positive where the candidate is worse. Its 95 % interval is Tango's score
    interval for paired proportions (Statistics in Medicine 17, 1998): unlike a bootstrap it stays honest where nothing
    or next to nothing differs, which is the case that matters here.
    """

    num_questions: int
    lost: int
    gained: int

    @classmethod
    def of(cls, baseline: Sequence[bool], candidate: Sequence[bool]) -> "PairedLoss":
        pairs = list(zip(baseline, candidate, strict=True))
        return cls(len(pairs), pairs.count((True, False)), pairs.count((False, True)))

    @property
    def loss(self) -> float:
        return (self.lost - self.gained) / self.num_questions

    @property
    def low(self) -> float:
        return _bisect(lambda loss: self._score(loss) - Z_95, -1.0, self.loss)

    @property
    def high(self) -> float:
        return _bisect(lambda loss: self._score(loss) + Z_95, self.loss, 1.0)

    def verdict(self, margin: float) -> Verdict:
        """``non-inferior`` where the interval ends below the margin; ``worse`` where it begins above zero."""
        if self.high < margin:
            return "non-inferior"
        return "worse" if self.low > 0 else "cannot tell"

    def _score(self, loss: float) -> float:
        """Standard deviations between what was seen and a true loss of so much; falls as the loss grows."""
        n = self.num_questions
        difference = self.lost - self.gained - n * loss
        variance = n * (2 * self._gained_share(loss) + loss * (1 - loss))
        if variance <= 0:
            return math.copysign(math.inf, difference) if difference else 0.0
        return difference / math.sqrt(variance)

    def _gained_share(self, loss: float) -> float:
        """The most likely share of questions that only the candidate gets right, if the true loss is so much."""
        n = self.num_questions
        b = (2 * n - self.lost + self.gained) * loss - self.lost - self.gained
        c = -self.gained * loss * (1 - loss)
        return max(0.0, -loss, (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n))


def _bisect(falling: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def log_softmax(logits: Logits) -> Floats:
    """Natural-log probabilities, in float64: [tokens, vocab]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def divergences(baseline: Logits, candidate: Logits) -> Floats:
    """KL(baseline || candidate) of each token's distribution, in nats: [tokens]."""
    log_p, log_q = log_softmax(baseline), log_softmax(candidate)
    result: Floats = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return result.clip(min=0.0)


def surprises(logits: Logits, token_ids: Sequence[int]) -> Floats:
    """-log p of each token: [tokens]."""
    result: Floats = -log_softmax(logits)[np.arange(len(token_ids)), list(token_ids)]
    return result


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """At which token two continuations part; None where they are the same."""
    pairs = zip(one, other, strict=False)
    differing = (place for place, (a, b) in enumerate(pairs) if a != b)
    return next(differing, None if len(one) == len(other) else min(len(one), len(other)))
