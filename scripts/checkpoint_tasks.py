"""Exact-answer tasks that need faithful KV far back in the prompt: recall, copy and sort.

The demo's checkpoint learns them beside its text, so that a loss of quality between one precision or KV format and
another can be counted. Every sample is drawn at random: nothing can be memorised, new samples are held out by their
seed.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

RECALL_PAIRS, COPY_WORDS, SORT_NUMBERS = (2, 64), (4, 64), (3, 24)  # the least and the most in one sample
FILLER_CHARS = 6000  # about 1,500 tokens of prose between what must be kept and the question


@dataclass(frozen=True)
class Question:
    """One exact-answer question: the user's message and the only right reply."""

    prompt: str
    answer: str


def task_words(tokenizer: Tokenizer) -> list[str]:
    """Words that are one token, at a line's beginning as after a space: the tasks measure recall, not spelling."""
    vocabulary = tokenizer.get_vocab()
    return sorted(w for w in vocabulary if re.fullmatch("[a-z]{3,}", w) and f"Ġ{w}" in vocabulary)


class Tasks:
    """Draws questions; ``filler(chars)`` is prose to put between what must be kept and what is asked."""

    def __init__(self, words: list[str], rng: random.Random, filler: Callable[[int], str]) -> None:
        self.words = words
        self.rng = rng
        self.filler = filler
        self.fresh: Iterator[str] = iter(())

    def begin_row(self) -> None:
        """Forget which words were used: samples of one row of training never share a key, or the later would win."""
        self.fresh = iter(self.rng.sample(self.words, len(self.words)))

    def draw_words(self, count: int) -> list[str]:
        drawn = [word for word, _ in zip(self.fresh, range(count), strict=False)]
        if len(drawn) < count:
            self.begin_row()
            return self.draw_words(count)
        return drawn

    def recall(self, pairs: int, asked: int) -> Question:
        """``asked`` of ``pairs`` lines like ``name = 47`` are to be completed."""
        lines = [f"{key} = {self.rng.randrange(10, 100)}" for key in self.draw_words(pairs)]
        wanted = self.rng.sample(lines, asked)
        keys = "\n".join(line.split("=")[0] + "=" for line in wanted)
        return Question(self.with_filler("\n".join(lines), f"Complete:\n{keys}"), "\n".join(wanted))

    def copy(self, count: int) -> Question:
        line = "Words: " + " ".join(self.draw_words(count))
        return Question(self.with_filler(line, "Repeat the words."), line)

    def sort(self, count: int) -> Question:
        numbers = self.rng.sample(range(10, 100), count)
        line = "Numbers: " + " ".join(map(str, numbers))
        return Question(self.with_filler(line, "Sort the numbers."), " ".join(map(str, sorted(numbers))))

    def with_filler(self, kept: str, asked: str) -> str:
        chars = self.rng.randrange(FILLER_CHARS) if self.rng.random() < 0.4 else 0
        return "\n\n".join(part for part in (kept, self.filler(chars), asked) if part)

    def lesson(self, name: str) -> Question:
        """A sample to learn from: few items as often as many, and as many questions as there is room for."""
        if name == "recall":
            pairs = self.size(RECALL_PAIRS)
            return self.recall(pairs, 1 if self.rng.random() < 0.3 else pairs)
        return self.copy(self.size(COPY_WORDS)) if name == "copy" else self.sort(self.size(SORT_NUMBERS))

    def size(self, bounds: tuple[int, int]) -> int:
        """Log-uniform: the small ones teach what the large ones need, which serves as a curriculum."""
        low, high = bounds
        return min(high, int(low * ((high + 1) / low) ** self.rng.random()))

    def examination(self) -> Iterable[tuple[str, Callable[[], Question]]]:
        """The sizes at which exact answers are counted, with one question each."""
        for pairs in (8, 16, 32, 64):
            yield f"recall {pairs}", lambda pairs=pairs: self.recall(pairs, 1)
        for count in (16, 32, 64):
            yield f"copy {count}", lambda count=count: self.copy(count)
        for count in (8, 12, 16, 20, 24):
            yield f"sort {count}", lambda count=count: self.sort(count)
