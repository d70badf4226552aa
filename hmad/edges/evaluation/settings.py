"""What is to be evaluated: files, pairs of prefill precision and KV format, and how many of everything."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from hmad.edges.evaluation.questions import OnBrokenLine
from hmad.facts.config import Precision
from hmad.facts.errors import ConfigError
from hmad.facts.formats import FORMATS

PROGRAM, COARSE_PROGRAM = "hmad.edges.evaluation.node_program", "hmad.edges.evaluation.coarse_node"


@dataclass(frozen=True)
class Pair:
    """A prefill precision and the KV format on the wire."""

    precision: str
    kv_format: str

    def __str__(self) -> str:
        return f"{self.precision}/{self.kv_format}"

    @classmethod
    def parse(cls, text: str) -> "Pair":
        precision, _, kv_format = text.partition("/")
        if precision not in get_args(Precision) or kv_format not in FORMATS:
            raise ConfigError(
                f"{text!r} should be PRECISION/FORMAT, with a precision of {', '.join(get_args(Precision))} "
                f"and a KV format of {', '.join(FORMATS)}"
            )
        return cls(precision, kv_format)


DEFAULT_BASELINE = Pair("bf16", "bf16")
DEFAULT_CANDIDATES = tuple(map(Pair.parse, ("int8/int8", "fp8/fp8_e4m3", "bfp8/bfp8", "bf16/mxfp8")))


@dataclass(frozen=True)
class Row:
    """One line of the table: who answers, and how many questions at once."""

    name: str
    pair: Pair
    concurrency: int
    program: str = PROGRAM

    @property
    def file_stem(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


def half_of_the_cores() -> int:
    """Two nodes share this machine, and teams of threads that fight for cores take five times as long."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


@dataclass(frozen=True)
class Settings:
    """One evaluation. ``margin`` is a share of all questions."""

    model: Path
    files: tuple[Path, ...]
    output: Path = Path("build/eval")
    baseline: Pair = DEFAULT_BASELINE
    candidates: tuple[Pair, ...] = DEFAULT_CANDIDATES
    num_questions: int | None = None
    kl_questions: int = 100
    kl_tokens: int = 32
    concurrency: int = 16
    margin: float = 0.005
    max_kl: float = 1e-3
    on_broken_line: OnBrokenLine = "stop"
    node_config: Path | None = None  # an hmad.toml for both nodes
    threads: int = field(default_factory=half_of_the_cores)

    @property
    def baseline_row(self) -> Row:
        return Row(str(self.baseline), self.baseline, self.concurrency)

    @property
    def noise_row(self) -> Row:
        """The baseline again in other batches: what differs here is no format's fault."""
        concurrency = max(1, self.concurrency // 2) if self.concurrency > 1 else 2
        return Row(f"{self.baseline}, {concurrency} at once", self.baseline, concurrency)

    @property
    def control_row(self) -> Row:
        """KV of 3 bits, which must be found out."""
        return Row("bf16/3 bits", Pair("bf16", "bf16"), self.concurrency, COARSE_PROGRAM)

    @property
    def rows(self) -> tuple[Row, ...]:
        """Each once, the baseline first."""
        candidates = (Row(str(pair), pair, self.concurrency) for pair in self.candidates)
        return tuple(dict.fromkeys((self.baseline_row, self.noise_row, self.control_row, *candidates)))
