"""The built library behind ctypes: entry points, the structures they take, and scratch memory."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from mxn_kernels.cpu.build import best_isa, build
from mxn_kernels.errors import KernelUnavailable

_POINTER = ctypes.c_void_p
_INT = ctypes.c_int
_LONG = ctypes.c_int64
_FLOAT = ctypes.c_float

ENTRY_POINTS = {
    "mxn_workspace_create": (_POINTER, [_INT]),
    "mxn_workspace_destroy": (None, [_POINTER]),
    "mxn_plan_create": (_POINTER, []),
    "mxn_plan_destroy": (None, [_POINTER]),
    "mxn_pack_int8": (_LONG, [_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER]),
    "mxn_pack_groups": (_LONG, [_POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER]),
    "mxn_take_blocks": (_LONG, [_POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER]),
    "mxn_linear": (_INT, [_POINTER, _POINTER, _POINTER, _LONG, _POINTER]),
    "mxn_int8_experts": (_LONG, [_POINTER, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT, _POINTER]),
    "mxn_rms_norm": (None, [_POINTER, _POINTER, _POINTER, _LONG, _INT, _FLOAT, _FLOAT, _POINTER]),
    "mxn_paged_attention": (_INT, [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "mxn_copy_blocks": (None, [_POINTER, _LONG, _POINTER, _LONG]),
    "mxn_step_plans_create": (_POINTER, []),
    "mxn_step_plans_destroy": (None, [_POINTER]),
    "mxn_step": (_INT, [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
}

WITHOUT_LOCK = {"mxn_step"}
"""Calls of milliseconds, during which other Python threads may run."""


class Library:
    """One loaded kernel library. `isa` is the instruction set it was built for."""

    def __init__(self, isa: str, path: Path) -> None:
        self.isa = isa
        self.path = path
        # PyDLL keeps the interpreter lock: a step makes hundreds of calls of a few microseconds, and giving the lock
        # away each time lets another thread hold it for milliseconds.
        self._dll, self._unlocked = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
        for name, (result, arguments) in ENTRY_POINTS.items():
            function = getattr(self._unlocked if name in WITHOUT_LOCK else self._dll, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("mxn_"), function)


@cache
def load_library(isa: str | None = None) -> Library:
    """Builds if needed, loads once per process. Args: isa: a key of `build.ISAS`, None for the best this CPU has.

    Raises: KernelUnavailable with the reason.
    """
    isa = isa or best_isa()
    path = build(isa)
    try:
        return Library(isa, path)
    except (OSError, AttributeError) as error:
        raise KernelUnavailable(f"the kernel library {path} was built but does not load: {error}") from error


class Workspace:
    """Threads and scratch memory for one caller at a time; further callers wait.

    Its threads run only while an op does and fall asleep 100 us later; ops that alternate should share one: `shared`.
    """

    def __init__(self, threads: int, isa: str | None = None) -> None:
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads must be between 1 and 1024, found {threads}")
        self.library = load_library(isa)
        self.threads = threads
        self.handle = self.library.workspace_create(threads)
        self.plan = self.library.plan_create()
        if not self.handle or not self.plan:
            raise MemoryError("no memory for a kernel workspace")
        destroy_with(self, self.library.workspace_destroy, self.handle)
        destroy_with(self, self.library.plan_destroy, self.plan)

    @staticmethod
    def shared(threads: int, isa: str | None = None) -> Workspace:
        """The process's workspace of that size: two would have twice the threads awake."""
        return _shared(threads, isa or best_isa())


@cache
def _shared(threads: int, isa: str) -> Workspace:
    return Workspace(threads, isa)


def destroy_with(owner: object, destroy: Callable[[int], None], handle: int) -> None:
    """Destroys a handle when its owner goes; not at exit, where another thread may still be inside a call with it."""
    weakref.finalize(owner, destroy, handle).atexit = False


_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def aligned_empty(num_bytes: int) -> torch.Tensor:
    """Uninitialised uint8 memory, 64-byte aligned; from 2 MiB on aligned to huge pages, which it asks for."""
    step = _HUGE_PAGE if num_bytes >= _HUGE_PAGE else 64
    raw = torch.empty(num_bytes + step, dtype=torch.uint8)
    start = -raw.data_ptr() % step
    if step == _HUGE_PAGE:  # advice only: a refusal costs speed, not correctness
        _libc().madvise(_POINTER(raw.data_ptr() + start), ctypes.c_size_t(num_bytes), _MADV_HUGEPAGE)
    return raw[start : start + num_bytes]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
