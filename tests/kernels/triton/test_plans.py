"""Launch plans, tiles and targets, as arithmetic: nothing here runs a kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from mxn_kernels import ops, tuning
from mxn_kernels.kv_cache import KVCache
from mxn_kernels.splits import MAX_SPLITS, decode_splits, prefix_splits
from mxn_kernels.target import Target
from mxn_kernels.testing.launches import cases, index, meta
from mxn_kernels.triton.launch import record_launches
from mxn_kernels.triton.ragged_prefill import num_query_blocks
from mxn_kernels.tuning import shared_bytes, tile_for

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@pytest.mark.parametrize(
    ("num_seqs", "context", "window", "splits"),
    [
        (1, 32768, None, 64),  # 8 programs unsplit; 528 wanted
        (16, 8192, None, 16),  # 2,048 programs of 512 tokens
        (16, 512, None, 4),
        (16, 200, None, 1),  # fewer than two tiles each
        (64, 8192, None, 4),  # 512 programs would leave a third of a second round
        (256, 2048, None, 1),  # 2,048 programs unsplit
        (1, 32768, 512, 4),  # a window has few tokens to share
        (1, 2**20, None, 128),
        (0, 100, None, 1),
    ],
)
def test_splits_fill_the_chip_and_no_more(num_seqs: int, context: int, window: int | None, splits: int) -> None:
    assert decode_splits(num_seqs, 8, context, window, 64, 132) == splits


def test_splits_are_powers_of_two_within_bounds() -> None:
    for num_seqs in (1, 2, 3, 7, 50, 300):
        for context in (1, 100, 5000, 10**6):
            for found in (
                decode_splits(num_seqs, 1, context, None, 16, 304),
                prefix_splits(num_seqs, 1, context, 16, 304),
            ):
                assert found & (found - 1) == 0
                assert 1 <= found <= MAX_SPLITS


def test_every_query_block_has_a_program() -> None:
    for lengths in ((1,), (5, 0, 33), (16,) * 4, (31, 1, 1, 64)):
        needed = sum(-(-length // 16) for length in lengths)
        assert needed <= num_query_blocks(sum(lengths), len(lengths), 16)
    assert num_query_blocks(0, 3, 16) == 0


def test_decode_plan_of_an_h100() -> None:
    cache = KVCache.allocate(4096, block_size=16, num_kv_heads=8, key_dim=128, device="meta")
    query, tables = meta(16, 32, 128), (index(16, 512), index(16))
    with record_launches() as launches:
        ops.paged_decode(query, cache, *tables, scaling=0.1, target=Target.named("sm_90"))
        ops.paged_decode(query, cache, *tables, scaling=0.1, max_context=100, target=Target.named("sm_90"))
    split, merge, direct = launches
    assert (split.name, split.grid) == ("paged_decode_kernel", (16, 8, 16))
    assert (merge.name, merge.grid) == ("merge_kernel", (32, 16))
    assert (direct.name, direct.grid) == ("paged_decode_kernel", (1, 8, 16))
    assert direct.arguments["out_ptr"].dtype is torch.bfloat16
    assert split.arguments["out_ptr"].dtype is torch.float32
    assert split.arguments["BLOCK_M"] == 16


@pytest.mark.parametrize("name", TARGETS)
def test_every_case_has_a_plan_on_every_target(name: str) -> None:
    target = Target.named(name)
    for case in cases(target):
        for launch in case.launches(target):
            assert launch.num_programs > 0
            assert all(size < 2**16 for size in launch.grid[1:]), "CUDA's limit on the second and third dimension"


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_fit_the_chip(name: str, dim: int, dtype: torch.dtype) -> None:
    target = Target.named(name)
    cache = KVCache.allocate(1, block_size=16, num_kv_heads=1, key_dim=dim, dtype=dtype, device="meta")
    for op in ("paged_decode", "ragged_prefill", "shared_prefix_decode"):
        for group in (1, 4, 7, 16, 128):
            tile = tile_for(op, target, dtype, cache, group)
            assert tile.block_m >= max(16, group)
            if group <= 16:
                assert shared_bytes(tile, target, dtype, 2 * dim) <= target.shared_memory_bytes


def test_vendor_options_go_to_their_vendor_only() -> None:
    cache = KVCache.allocate(1, block_size=16, num_kv_heads=1, key_dim=128, device="meta")
    for name in TARGETS:
        target = Target.named(name)
        options = tile_for("paged_decode", target, torch.bfloat16, cache, 4).options(target)
        assert ("waves_per_eu" in options) == (target.vendor == "amd")


@pytest.mark.parametrize("path", [p for p in files(tuning).iterdir() if p.name.endswith(".json")], ids=lambda p: p.name)
def test_every_row_of_a_table_says_where_it_comes_from(path) -> None:
    for rows in json.loads(path.read_text()).values():
        assert all(row["source"] for row in rows)


def test_vendor_tables_end_with_a_row_for_everything() -> None:
    for vendor in ("nvidia", "amd", "interpreter"):
        for rows in json.loads((files(tuning) / f"{vendor}.json").read_text()).values():
            assert "when" not in rows[-1]


def test_target_without_a_table_is_refused() -> None:
    target = Target(name="npu-1", vendor="npu", warp_size=1, num_multiprocessors=4, shared_memory_bytes=1 << 20)
    cache = KVCache.allocate(1, block_size=16, num_kv_heads=1, key_dim=64, device="meta")
    with pytest.raises(ValueError, match="no tuning table has a row for paged_decode on npu-1"):
        tile_for("paged_decode", target, torch.bfloat16, cache, 4)


def test_unknown_target_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"no target is named 'sm_1'; known here: sm_80, .*gfx950"):
        Target.named("sm_1")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_every_target_and_fits() -> None:
    """In a process of its own, where Triton compiles."""
    run_aot()


@pytest.mark.timeout(300)
def test_decode_compiles_for_both_vendors() -> None:
    run_aot("--targets", "sm_90", "gfx942", "--only", "paged_decode d64")


def run_aot(*arguments: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "mxn_kernels.aot", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
