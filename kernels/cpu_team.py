"""Runs compiled code on the thread team that torch's own operators use.

A kernel gets its arguments as words: 64-bit integers, among them addresses and the bits of floats.

A second team beside torch's would fight it for the cores: idle OpenMP threads spin for milliseconds before they sleep,
each team believing itself alone. So a job goes to the OpenMP runtime that torch has loaded; between two matrix
products its threads are still awake, and a launch costs two or three microseconds. Call from the thread that also
calls torch's operators: a team belongs to the thread that started it.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import binding  # type: ignore[import-untyped]
from numba import cfunc, njit, types

from hmad_kernels.cpu_common import COMPILE, HELPER

JOB = types.void(types.CPointer(types.int64))  # signature of a body: it gets the job's words


class Body(NamedTuple):
    """A function compiled with the signature ``JOB``: as ctypes calls it, and where it is."""

    call: Callable[["ctypes.Array[ctypes.c_int64]"], None]
    address: int


def body(function: Callable[..., None]) -> Body:
    """Compile a function of the job's words, or read it from the cache."""
    compiled = cfunc(JOB, cache=True)(function)
    return Body(compiled.ctypes, compiled.address)


@njit(**(HELPER | {"_nrt": True}))
def by_dtype(kernel, job):
    """Call ``kernel(job, tag)``, the tag being of the element type that the job's first word tells."""
    if job[0]:  # bfloat16 travels as its bits
        kernel(job, np.uint16(0))
    else:
        kernel(job, np.float32(0))


@functools.cache
def float_word(value: float) -> int:
    """The word that stands for a float."""
    return int(np.float64(value).view(np.int64))


@njit(forceinline=True, **HELPER)
def word_float(word):
    """The float64 that a word stands for."""
    return np.int64(word).view(np.float64)


def _torch_openmp() -> ctypes.CDLL | None:
    """The runtime torch has loaded, or None where torch was built with another.

    Wheels bring it under names of their own, so the process itself is asked what it has mapped.
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.split(maxsplit=5)[-1] for line in maps if "libgomp" in line}  # a path may hold spaces
    if not mapped:
        return None
    path = min(mapped, key=lambda name: "torch" not in name)  # torch's own where there are several
    runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    runtime.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    runtime.GOMP_parallel.restype = None
    return runtime


@cfunc("int32()", cache=True)
def _index_alone():
    return 0


@cfunc("int32()", cache=True)
def _size_alone():
    return 1


OPENMP = _torch_openmp()


def _bind(symbol: str, openmp_name: str, alone: int) -> types.ExternalFunction:
    """A function that compiled code calls by symbol, so that its cache holds no address."""
    address = alone if OPENMP is None else ctypes.cast(getattr(OPENMP, openmp_name), ctypes.c_void_p).value
    binding.add_symbol(symbol, address)
    return types.ExternalFunction(symbol, types.int32())


team_index = _bind("hmad_team_index", "omp_get_thread_num", _index_alone.address)
team_size = _bind("hmad_team_size", "omp_get_num_threads", _size_alone.address)


@njit(inline="always", **COMPILE)
def part_of(count, index, size):
    """Part ``index`` of ``count`` items dealt into ``size`` equal runs: [begin, end)."""
    return count * index // size, count * (index + 1) // size


@njit(inline="always", **COMPILE)
def share_of(count):
    """This thread's [begin, end) of ``count`` items. Outside a team that is all of them."""
    return part_of(count, team_index(), team_size())


def run(body: Body, words: Sequence[int], parallel: bool) -> None:
    """Call a body, without the GIL, here or on every thread of the team at once."""
    job = (ctypes.c_int64 * len(words))(*words)
    if parallel and OPENMP is not None:
        OPENMP.GOMP_parallel(body.address, ctypes.addressof(job), torch.get_num_threads(), 0)
    else:
        body.call(job)
