"""The report: JSON for programs, Markdown for people."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from hmad.edges.evaluation.measures import Divergence, RowMeasures, TaskMeasures
from hmad.edges.evaluation.settings import Settings
from hmad.edges.evaluation.statistics import PairedLoss

Line = Sequence[object]


def as_json(settings: Settings, rows: Sequence[RowMeasures], head: dict[str, Any]) -> dict[str, Any]:
    return head | {
        "model": str(settings.model),
        "baseline": str(settings.baseline),
        "margin": settings.margin,
        "max_kl": settings.max_kl,
        "is_valid": not trouble(settings, rows),
        "trouble": trouble(settings, rows),
        "rows": [row_as_json(settings, row) for row in rows],
    }


def row_as_json(settings: Settings, row: RowMeasures) -> dict[str, Any]:
    return {
        "name": row.row.name,
        "precision": row.row.pair.precision,
        "kv_format": row.row.pair.kv_format,
        "at_once": row.row.concurrency,
        "flag": row.flag(settings),
        "kl": kl_as_json(row.divergence),
        "identical": None if math.isnan(row.identical) else row.identical,
        "median_first_difference": row.median_first_difference,
        "kv_bytes_per_token": row.kv_bytes_per_token,
        "link_bytes_per_prompt_token": row.link_bytes_per_token,
        "tasks": {task.task: task_as_json(task, settings) for task in row.tasks},
    }


def task_as_json(task: TaskMeasures, settings: Settings) -> dict[str, Any]:
    told: dict[str, Any] = {
        "perplexity": None if math.isnan(task.perplexity) else task.perplexity,
        "kl": kl_as_json(task.divergence),
    }
    if task.loss:
        told |= {
            "questions": task.loss.num_questions,
            "exact": task.exact,
            "lost": task.loss.lost,
            "gained": task.loss.gained,
            "loss": task.loss.loss,
            "loss_95": [task.loss.low, task.loss.high],
            "verdict": task.loss.verdict(settings.margin),
            "identical": task.identical / task.loss.num_questions,
            "median_first_difference": task.median_first_difference,
        }
    return told


def kl_as_json(divergence: Divergence | None) -> dict[str, Any] | None:
    if divergence is None:
        return None
    return {"tokens": divergence.num_tokens, "mean": divergence.mean, "p99": divergence.p99}


def as_markdown(settings: Settings, rows: Sequence[RowMeasures], head: dict[str, Any]) -> str:
    """One table of all rows, and one of every row's tasks."""
    title = ", ".join(str(value) for value in head.values())
    parts = [
        f"{settings.model.name}, {title}",
        table(*overview(settings, rows)),
        legend(settings),
        table(*by_task(rows)),
        *trouble(settings, rows),
    ]
    return "\n\n".join(parts) + "\n"


def overview(settings: Settings, rows: Sequence[RowMeasures]) -> tuple[Line, list[Line]]:
    answered = list(rows[0].losses)
    header = (
        "prefill / KV",
        *(f"{name} ({rows[0].losses[name].num_questions})" for name in answered),
        *(f"perplexity of {name}" for name in rows[0].perplexities),
        *("against the baseline", "KL mean", "KL p99", "same answers"),
        *("KV bytes a token", "on the wire"),
    )
    return header, [
        (
            row.row.name,
            *(exact_cell(task, row is rows[0]) for task in row.tasks if task.loss),
            *(f"{perplexity:.4g}" for perplexity in row.perplexities.values()),
            "the baseline" if row is rows[0] else row.flag(settings),
            *kl_cells(row.divergence),
            percent(row.identical, 1),
            f"{row.kv_bytes_per_token:,.0f}",
            "-" if row.link_bytes_per_token is None else f"{row.link_bytes_per_token:,.0f}",
        )
        for row in rows
    ]


def by_task(rows: Sequence[RowMeasures]) -> tuple[Line, list[Line]]:
    header = (
        *("prefill / KV", "task", "lost", "gained", "loss, 95 % interval", "same answers", "first difference at token"),
        *("perplexity", "KL mean", "KL p99", "tokens"),
    )
    return header, [
        (
            row.row.name,
            task.task,
            *(("-",) * 5 if row is rows[0] else loss_cells(task)),
            f"{task.perplexity:.4g}",
            *kl_cells(task.divergence),
            task.divergence.num_tokens if task.divergence else "-",
        )
        for row in rows
        for task in row.tasks
    ]


def legend(settings: Settings) -> str:
    return (
        "In brackets the loss against the baseline in percentage points and the upper end of its 95 % interval "
        f"(Tango's, paired). Non-inferior: below {100 * settings.margin:g} points on every task, mean KL below "
        f"{settings.max_kl:g} nats. First differences are medians over the answers that differ."
    )


def trouble(settings: Settings, rows: Sequence[RowMeasures]) -> list[str]:
    """Why the evaluation says nothing, where that is so."""
    by_row = {row.row: row for row in rows}
    troubles = []
    if not by_row[settings.control_row].is_found_out(settings):
        troubles.append("NOT VALID: KV of 3 bits was not told from the baseline. Ask more, or harder questions.")
    if by_row[settings.noise_row].is_found_out(settings):
        troubles.append("NOT VALID: the baseline differs from itself at another number of questions at once.")
    return troubles


# --- cells ---


def exact_cell(task: TaskMeasures, is_baseline: bool) -> str:
    if not task.loss or task.exact is None:
        return "-"
    exact = percent(task.exact, 2)
    return exact if is_baseline else f"{exact} ({points(task.loss.loss)}, at most {points(task.loss.high)})"


def loss_cells(task: TaskMeasures) -> Line:
    loss: PairedLoss | None = task.loss
    if not loss:
        return ("-",) * 5
    interval = f"{points(loss.loss)} ({points(loss.low)} to {points(loss.high)})"
    place = task.median_first_difference
    same = percent(task.identical / loss.num_questions, 1)
    return loss.lost, loss.gained, interval, same, "-" if place is None else f"{place:g}"


def kl_cells(divergence: Divergence | None) -> Line:
    return (f"{divergence.mean:.1e}", f"{divergence.p99:.1e}") if divergence else ("-", "-")


def percent(share: float, digits: int) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def points(share: float) -> str:
    return f"{100 * share:+.2f}"


def table(header: Line, lines: Iterable[Line]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
