"""From the journal to figures: what each row lost against the baseline, task by task and altogether."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hmad.edges.evaluation.journal import Forced, Journal
from hmad.edges.evaluation.questions import Task
from hmad.edges.evaluation.settings import Row, Settings
from hmad.edges.evaluation.statistics import PairedLoss, Verdict, first_difference
from hmad.facts.formats import FORMATS, KVGeometry


@dataclass(frozen=True)
class Divergence:
    """KL of next-token distributions from the baseline's, in nats, over ``num_tokens`` tokens."""

    num_tokens: int
    mean: float
    p99: float

    @classmethod
    def of(cls, records: Iterable[Forced]) -> "Divergence | None":
        values = [value for record in records for value in record.divergences]
        return cls(len(values), float(np.mean(values)), float(np.quantile(values, 0.99))) if values else None


@dataclass(frozen=True)
class TaskMeasures:
    """One row at one task. ``loss`` and ``identical`` are None where nothing is answered (text for perplexity)."""

    task: str
    num_right: int
    loss: PairedLoss | None
    identical: int
    first_differences: tuple[int, ...]  # of the answers that are not identical: at which token
    perplexity: float
    forced: tuple[Forced, ...]

    @cached_property
    def divergence(self) -> Divergence | None:
        return Divergence.of(self.forced)

    @property
    def exact(self) -> float | None:
        return self.num_right / self.loss.num_questions if self.loss else None

    @property
    def median_first_difference(self) -> float | None:
        return statistics.median(self.first_differences) if self.first_differences else None


@dataclass(frozen=True)
class RowMeasures:
    """One row of the table."""

    row: Row
    tasks: tuple[TaskMeasures, ...]
    kv_bytes_per_token: float
    link_bytes_per_token: float | None  # measured: with the last block of each prompt, which may be part full

    @cached_property
    def divergence(self) -> Divergence | None:
        return Divergence.of(record for task in self.tasks for record in task.forced)

    @property
    def losses(self) -> dict[str, PairedLoss]:
        return {task.task: task.loss for task in self.tasks if task.loss}

    @property
    def identical(self) -> float:
        """Share of all answers that are the baseline's, token by token."""
        total = sum(loss.num_questions for loss in self.losses.values())
        return sum(task.identical for task in self.tasks) / total if total else math.nan

    @property
    def median_first_difference(self) -> float | None:
        places = [place for task in self.tasks for place in task.first_differences]
        return statistics.median(places) if places else None

    @property
    def perplexities(self) -> dict[str, float]:
        """Of the tasks whose right answers are text to be predicted."""
        return {task.task: task.perplexity for task in self.tasks if not task.loss}

    def tasks_with(self, verdict: Verdict, margin: float) -> list[str]:
        return [name for name, loss in self.losses.items() if loss.verdict(margin) == verdict]

    def flag(self, settings: Settings) -> str:
        """The worst that can be said of it, in words."""
        divergence = self.divergence
        verdicts: tuple[Verdict, ...] = ("worse", "cannot tell")
        found = {verdict: self.tasks_with(verdict, settings.margin) for verdict in verdicts}
        findings = [f"{verdict}: {', '.join(names)}" for verdict, names in found.items() if names]
        findings += ["KL too large"] if divergence and divergence.mean >= settings.max_kl else []
        return "; ".join(findings) or "non-inferior"

    def is_found_out(self, settings: Settings) -> bool:
        """Whether it is certainly not as good as the baseline."""
        divergence = self.divergence
        has_large_kl = divergence is not None and divergence.mean >= settings.max_kl
        return has_large_kl or bool(self.tasks_with("worse", settings.margin))


def measure_all(settings: Settings, tasks: Sequence[Task], journal: Journal, geometry: KVGeometry) -> list[RowMeasures]:
    return [measure(settings, row, tasks, journal, geometry) for row in settings.rows]


def measure(settings: Settings, row: Row, tasks: Sequence[Task], journal: Journal, geometry: KVGeometry) -> RowMeasures:
    fmt = FORMATS[row.pair.kv_format]
    return RowMeasures(
        row,
        tuple(measure_task(settings, row, task, journal) for task in tasks),
        geometry.num_layers * geometry.block_bytes(fmt) / fmt.tokens_per_block,
        link_bytes_per_token(row, journal),
    )


def measure_task(settings: Settings, row: Row, task: Task, journal: Journal) -> TaskMeasures:
    baseline = [journal.free[settings.baseline_row.name, *item.key] for item in task.answered]
    answers = [journal.free[row.name, *item.key] for item in task.answered]
    places = [first_difference(a.token_ids, b.token_ids) for a, b in zip(baseline, answers, strict=True)]
    forced = tuple(journal.forced[row.name, *item.key] for item in task.items[: settings.kl_questions])
    surprises = [value for record in forced for value in record.surprises]
    return TaskMeasures(
        task.name,
        sum(answer.right for answer in answers),
        PairedLoss.of([a.right for a in baseline], [a.right for a in answers]) if answers else None,
        places.count(None),
        tuple(place for place in places if place is not None),
        math.exp(statistics.fmean(surprises)) if surprises else math.nan,
        forced,
    )


def link_bytes_per_token(row: Row, journal: Journal) -> float | None:
    """Of all runs of the row that came to their end."""
    traffic = [record for record in journal.traffic if record.row == row.name]
    prompt_tokens = sum(record.prompt_tokens for record in traffic)
    return sum(record.link_bytes for record in traffic) / prompt_tokens if prompt_tokens else None
