"""The guard of conftest.py itself: a test in which something holds the event loop must fail."""

import re
from pathlib import Path

import pytest

SCENES = """
import asyncio, time

def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass

async def burn_in_task():
    burn(0.1)

async def test_held_by_task():
    await asyncio.create_task(burn_in_task())

async def test_held_by_callback():
    asyncio.get_running_loop().call_soon(burn, 0.1)
    await asyncio.sleep(0)

async def test_forgotten_await():
    burn_in_task()

async def test_free_when_the_test_computes():
    burn(0.1)

async def test_free_when_a_thread_computes():
    await asyncio.to_thread(burn, 0.1)

async def test_free_in_debug_mode():
    assert asyncio.get_running_loop().get_debug()
"""


def test_held_loops_fail_and_free_ones_pass(pytester: pytest.Pytester) -> None:
    root = Path(__file__).parent.parent
    guard = (root / "tests/conftest.py").read_text()
    pytester.makeconftest(re.sub(r"^pytest_plugins = .*$", "", guard, flags=re.MULTILINE))
    pytester.makepyprojecttoml((root / "pyproject.toml").read_text())
    scenes = pytester.makepyfile(SCENES)

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rA", scenes)

    result.assert_outcomes(passed=5, failed=1, errors=2)
    result.stdout.fnmatch_lines_random(
        [
            "<Task*burn_in_task*held the event loop for * ms of CPU time",
            "<Handle burn*held the event loop for * ms of CPU time",
            "ERROR *test_held_by_task*",
            "ERROR *test_held_by_callback*",
            "FAILED *test_forgotten_await*",
        ]
    )
