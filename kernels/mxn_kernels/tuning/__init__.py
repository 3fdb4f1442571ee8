"""Tile sizes by chip, as data: one JSON file per target, then per vendor. Nothing is tuned while serving.

A file maps an op to rows; the first whose conditions all hold is taken. Conditions: `dim_max` (larger of the key and
value
sizes, padded), `dtype` (of the query), `fp8` (whether the cache is), `group_min` (query heads per KV head). A row's
`source` says where its numbers come from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.target import Target

VENDOR_OPTIONS = {"amd": ("waves_per_eu", "matrix_instr_nonkdim", "kpack")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Query rows and tokens of a program's tile, with Triton's warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    vendor_options: tuple[tuple[str, int], ...] = ()
    source: str = ""

    def options(self, target: Target) -> dict[str, Any]:
        known = VENDOR_OPTIONS.get(target.vendor, ())
        extra = {name: value for name, value in self.vendor_options if name in known}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **extra}


def tile_for(op: str, target: Target, dtype: torch.dtype, cache: KVCache, group: int) -> Tile:
    """The tile of an attention op, shrunk until it fits the chip's shared memory.

    Args: dtype: of the query. group: query heads per KV head. Raises: ValueError if no table has a row for it.
    """
    return _tile(op, target, dtype, cache.dtype, cache.key_dim, cache.value_dim, group)


@cache
def _tile(
    op: str, target: Target, dtype: torch.dtype, cache_dtype: torch.dtype, key_dim: int, value_dim: int, group: int
) -> Tile:
    dims = [max(16, 1 << (dim - 1).bit_length()) for dim in (key_dim, value_dim)]
    facts = {
        "dim_max": max(dims),
        "dtype": str(dtype).removeprefix("torch."),
        "fp8": cache_dtype.itemsize == 1,
        "group_min": group,
    }
    tables = [table for table in (target.name, target.vendor) if _table(table)]
    for name in tables:
        for row in _table(name).get(op, ()):
            if _holds(row.get("when", {}), facts):
                return _fitted(_from_row(row, name, op, group), target, dtype, sum(dims), group)
    raise ValueError(f"no tuning table has a row for {op} on {target.name} with {facts}; looked in {tables or 'none'}")


def _from_row(row: dict[str, Any], table: str, op: str, group: int) -> Tile:
    # A decode tile holds all query heads of a KV head; matrix units want at least 16 rows.
    rows = (
        max(16, 1 << (group - 1).bit_length())
        if op == "paged_decode"
        else max(row["block_m"], 1 << (group - 1).bit_length())
    )
    extra = {name: value for name, value in row.items() if any(name in names for names in VENDOR_OPTIONS.values())}
    return Tile(
        block_m=rows,
        block_n=row["block_n"],
        num_warps=row["warps"],
        num_stages=row["stages"],
        vendor_options=tuple(extra.items()),
        source=f"{table}: {row.get('source', 'no source given')}",
    )


def _holds(when: dict[str, Any], facts: dict[str, Any]) -> bool:
    for name, wanted in when.items():
        found = facts[name]
        if name.endswith("_max"):
            good = found <= wanted
        elif name.endswith("_min"):
            good = found >= wanted
        elif isinstance(wanted, list):
            good = found in wanted
        else:
            good = found == wanted
        if not good:
            return False
    return True


def _fitted(tile: Tile, target: Target, dtype: torch.dtype, dims: int, group: int) -> Tile:
    """Takes stages away, then halves tokens, then query rows, until the tile fits shared memory."""
    fewest_rows = max(16, 1 << (group - 1).bit_length())
    while shared_bytes(tile, target, dtype, dims) > target.shared_memory_bytes:
        if tile.num_stages > 1:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.block_n > 16:
            tile = replace(tile, block_n=tile.block_n // 2)
        elif tile.block_m > fewest_rows:
            tile = replace(tile, block_m=tile.block_m // 2)
        else:
            break
    return tile


def shared_bytes(tile: Tile, target: Target, dtype: torch.dtype, dims: int) -> int:
    """An upper estimate for a tile; `python -m mxn_kernels.aot` prints what the compiler takes.

    Seen in compiled kernels: with the block table's load in the pipeline, 5 stages make 2 or 3 buffers of keys and
    values, 3
    make 1 or 2. AMD keeps the newest, and the queries, in registers.
    """
    if target.vendor == "amd":
        return max(1, tile.num_stages - 1) * tile.block_n * dims * dtype.itemsize
    return ((tile.num_stages // 2 + 1) * tile.block_n * dims + tile.block_m * dims // 2) * dtype.itemsize


def add_table(name: str, table: dict[str, list[dict[str, Any]]]) -> None:
    """Gives a target or vendor a table in the form of the files here; its ops go before the file's."""
    _added[name] = table
    _tile.cache_clear()


def _table(name: str) -> dict[str, Any]:
    return {**_shipped(name), **_added.get(name, {})}


@cache
def _shipped(name: str) -> dict[str, Any]:
    path = files(__package__) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


_added: dict[str, dict[str, Any]] = {}
