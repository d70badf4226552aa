"""Files of questions: JSON lines, each with a prompt, the right answer, and how to compare (docs/evaluation.md)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from hmad.facts.errors import ConfigError

Comparison = Literal["exact", "prefix", "contains", "likelihood"]
OnBrokenLine = Literal["stop", "skip"]


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a file. With ``likelihood`` nothing is generated: the answer is the text whose perplexity counts."""

    prompt: Annotated[str, Meta(min_length=1)]
    answer: Annotated[str, Meta(min_length=1)]
    compare: Comparison = "exact"
    chat: bool = False  # the prompt is a user's message, put into the model's chat template without thinking
    max_tokens: Annotated[int, Meta(ge=1, le=65536)] = 64

    @property
    def is_answered(self) -> bool:
        """Whether the model writes an answer that is right or wrong."""
        return self.compare != "likelihood"


def is_right(question: Question, text: str) -> bool:
    """Whether a generated text is the right answer; spaces around either do not count."""
    given, right = text.strip(), question.answer.strip()
    if question.compare == "prefix":
        return given.startswith(right)
    return right in given if question.compare == "contains" else given == right


class BrokenLineError(Exception):
    """A question that cannot be asked, and why."""


Encode = Callable[[Question], tuple[list[int], list[int]]]  # prompt and answer as token ids, or BrokenLineError


@dataclass(frozen=True)
class Item:
    """A question that can be asked: where it stands, and its tokens."""

    task: str
    line: int
    question: Question
    prompt_token_ids: list[int]
    answer_token_ids: list[int]

    @cached_property
    def key(self) -> tuple[str, str]:
        """Results go by what was asked, not by where it stood: a file may grow, and what is done stays done."""
        return self.task, blake2b(msgspec.json.encode(self.question), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Task:
    """One file: its name without the suffix, and its questions."""

    name: str
    items: tuple[Item, ...]

    @property
    def answered(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.question.is_answered)


def read_tasks(
    paths: Sequence[Path],
    encode: Encode,
    limit: int | None,
    on_broken_line: OnBrokenLine,
    warn: Callable[[str], object],
) -> list[Task]:
    """At most ``limit`` questions of each file. Raises ConfigError at a broken line, or where a file has no other."""
    tasks: dict[str, Task] = {}
    for path in paths:
        if path.stem in tasks:
            raise ConfigError(f"{path}: another file is called {path.stem!r}, too; a task goes by its file's name")
        items = tuple(_items(path, encode, limit, on_broken_line, warn))
        if not items:
            raise ConfigError(f"{path}: no question in it")
        tasks[path.stem] = Task(path.stem, items)
    return list(tasks.values())


def _items(
    path: Path, encode: Encode, limit: int | None, on_broken_line: OnBrokenLine, warn: Callable[[str], object]
) -> Iterator[Item]:
    num_left = limit
    for number, line in _lines(path):
        if num_left == 0:
            return
        try:
            question = msgspec.json.decode(line, type=Question)
            prompt, answer = encode(question)
        except (msgspec.DecodeError, UnicodeDecodeError, BrokenLineError) as error:
            if on_broken_line == "stop":
                raise ConfigError(f"{path}:{number}: {error} (--on-broken-line skip leaves such lines out)") from error
            warn(f"{path}:{number}: left out: {error}")
            continue
        num_left = None if num_left is None else num_left - 1
        yield Item(path.stem, number, question, prompt, answer)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())
