"""Runs kernels, or writes down what would run: the same code plans, launches, is compiled ahead and is tested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from mxn_kernels.target import triton_is_interpreted

# Kernels are made for one or the other when they are imported, so it holds for the life of the process.
INTERPRET = triton_is_interpreted()


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with its grid, its arguments by name, and Triton's options (warps, stages, vendor's own)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")

    @property
    def num_programs(self) -> int:
        product = 1
        for size in self.grid:
            product *= size
        return product


def launch(kernel: Any, grid: tuple[int, ...], *, options: dict[str, Any] | None = None, **arguments: Any) -> None:
    """Launches unless the grid is empty or the arguments are on the meta device, which has no memory."""
    options = options or {}
    record = _record.get()
    if record is not None:
        record.append(Launch(kernel, grid, arguments, options))
    if 0 in grid or any(isinstance(value, torch.Tensor) and value.is_meta for value in arguments.values()):
        return
    kernel[grid](**arguments, **options)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collects the launches made inside; with meta tensors as inputs nothing runs and the list is a plan."""
    record: list[Launch] = []
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


_record: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)
