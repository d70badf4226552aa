"""The evaluation itself: every row answers every question that is not in the journal yet."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial

from hmad.edges.evaluation.client import Client, connected
from hmad.edges.evaluation.journal import Forced, Free, Journal, Traffic
from hmad.edges.evaluation.nodes import running_decode, running_prefill, while_alive
from hmad.edges.evaluation.questions import Item, Task, is_right
from hmad.edges.evaluation.settings import Row, Settings
from hmad.edges.evaluation.statistics import divergences, surprises

PROGRESS_S = 5.0

Ask = Callable[[Item], Awaitable[None]]


async def run(settings: Settings, tasks: Sequence[Task], journal: Journal) -> None:
    """Fill the journal: the baseline first, since the others are forced along what it wrote."""
    rows = [row for row in settings.rows if RowRun(settings, row, tasks, journal).has_work]
    if not rows:
        return
    async with running_decode(settings) as (decode, stream_port):
        for row in rows:
            async with running_prefill(settings, row, stream_port) as prefill, connected(prefill.url) as client:
                await while_alive(RowRun(settings, row, tasks, journal).run(client), [prefill, decode])


class RowRun:
    """One row's part."""

    def __init__(self, settings: Settings, row: Row, tasks: Sequence[Task], journal: Journal) -> None:
        self._settings = settings
        self._row = row
        self._tasks = tasks
        self._journal = journal
        self._is_baseline = row == settings.baseline_row

    @property
    def has_work(self) -> bool:
        return any(self._unanswered()) or any(self._unforced())

    async def run(self, client: Client) -> None:
        await self._ask_all("answers", list(self._unanswered()), partial(self._answer, client))
        await self._ask_all("logits", list(self._unforced()), partial(self._force, client))
        link_bytes = await client.counter("hmad_link_bytes_total")
        prompt_tokens = await client.counter("hmad_prompt_tokens_total")
        self._journal.add(Traffic(self._row.name, link_bytes, prompt_tokens))

    def _unanswered(self) -> Iterator[Item]:
        items = (item for task in self._tasks for item in task.answered)
        return (item for item in items if (self._row.name, *item.key) not in self._journal.free)

    def _unforced(self) -> Iterator[Item]:
        items = (item for task in self._tasks for item in task.items[: self._settings.kl_questions])
        return (item for item in items if (self._row.name, *item.key) not in self._journal.forced)

    async def _ask_all(self, what: str, items: list[Item], ask: Ask) -> None:
        """So many at once, until the list is empty."""
        progress = Progress(f"{self._row.name}: {what}", len(items))
        todo = iter(items)

        async def work() -> None:
            for item in todo:
                await ask(item)
                progress.step()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._row.concurrency):
                    group.create_task(work())
        except ExceptionGroup as errors:  # what broke the first broke the others, too
            raise errors.exceptions[0] from None

    async def _answer(self, client: Client, item: Item) -> None:
        answer = await client.answer(item)
        right = is_right(item.question, answer.text)
        self._journal.add(Free(self._row.name, *item.key, answer.token_ids, right))

    async def _force(self, client: Client, item: Item) -> None:
        token_ids = self._forced_tokens(item)
        logits = await client.logits_along(item, token_ids)
        if self._is_baseline:
            self._journal.save_logits(item, logits)
            kl: list[float] = []
        else:
            kl = divergences(self._journal.load_logits(item, len(token_ids)), logits).tolist()
        self._journal.add(Forced(self._row.name, *item.key, surprises(logits, token_ids).tolist(), kl))

    def _forced_tokens(self, item: Item) -> list[int]:
        """The baseline's own answer, or the text whose perplexity is asked for."""
        tokens = item.answer_token_ids
        if item.question.is_answered:
            tokens = self._journal.free[self._settings.baseline_row.name, *item.key].token_ids
        return tokens[: self._settings.kl_tokens]


class Progress:
    """A line on stderr now and then."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began_s = self._told_s = time.monotonic()

    def step(self) -> None:
        self._done += 1
        now_s = time.monotonic()
        if self._done < self._total and now_s - self._told_s < PROGRESS_S:
            return
        self._told_s = now_s
        rate = self._done / max(1e-9, now_s - self._began_s)
        left_s = (self._total - self._done) / rate
        print(
            f"{self._what} {self._done}/{self._total}, {rate:.1f}/s, {left_s:.0f} s left", file=sys.stderr, flush=True
        )
