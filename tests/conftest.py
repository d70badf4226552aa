"""What all tests share: nothing may hold up the event loop.

pyproject.toml makes warnings errors and switches asyncio's debug mode on; here every callback that an event loop runs
in a test is charged its thread's CPU time, and one above the budget fails the test.
"""

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest_plugins = ["pytester"]

LOOP_BUDGET_S = 0.05  # about one decode step: whoever holds the loop longer is felt as a stutter in every stream


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first: they would be waited for in the end."""
    items.sort(key=lambda item: (item.path.stem != "test_triton_kernels", item.path.stem != "test_triton_compile"))
    again = [nodeid for nodeid, number in Counter(item.nodeid for item in items).items() if number > 1]
    if again:
        raise pytest.UsageError(f"of tests that share an id a worker runs one: give {again} names of their own")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Take the imported world out of the collector's sight, or its sweeps would be charged to innocent callbacks."""
    gc.collect()
    gc.freeze()


class Sweeps(threading.local):
    """CPU time of each thread's garbage collections: they walk what a thousand tests have left, and hit anyone."""

    spent_s = 0.0

    def __enter__(self) -> None:
        gc.callbacks.append(self._count)

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._count)

    def _count(self, phase: str, info: dict[str, int]) -> None:
        self.spent_s += time.thread_time() * (1 if phase == "stop" else -1)


@pytest.fixture(autouse=True)
def unblocked_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test when a callback took more CPU time than the budget. Steps of the test function itself are free:
    a test may compute what it expects."""
    slow: list[str] = []
    run: Callable[[asyncio.Handle], None] = asyncio.Handle._run
    sweeps = Sweeps()

    def run_charged(handle: asyncio.Handle) -> None:
        start_s = time.thread_time() - sweeps.spent_s
        run(handle)
        taken_s = time.thread_time() - sweeps.spent_s - start_s
        task = task_of(handle)
        if taken_s > LOOP_BUDGET_S and not (task and is_step_of_test(task)):
            slow.append(f"{task or handle} held the event loop for {taken_s * 1e3:.0f} ms of CPU time")

    monkeypatch.setattr(asyncio.Handle, "_run", run_charged)
    with sweeps:
        yield
    if slow:
        pytest.fail("\n".join(slow), pytrace=False)


def task_of(handle: Any) -> Any:
    """The task whose step a callback is, or None."""
    owner = getattr(handle._callback, "__self__", None)
    return owner if isinstance(owner, asyncio.Task) else None


def is_step_of_test(task: Any) -> bool:
    """Whether a task runs a test function or an async fixture."""
    coroutine = task.get_coro()
    return coroutine.__name__.startswith("test_") or "pytest_asyncio" in coroutine.cr_code.co_filename
