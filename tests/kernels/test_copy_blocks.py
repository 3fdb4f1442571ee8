"""Copying KV blocks: in order, whole, and nothing else."""

from __future__ import annotations

import pytest
import torch
from mxn_kernels.copy_blocks import copy_blocks, copy_blocks_reference
from mxn_kernels.cpu import Workspace
from mxn_kernels.cpu_cache import KvDtype, LayerCache

pytestmark = pytest.mark.torch


def caches(kv_dtype: KvDtype = "fp16") -> tuple[LayerCache, LayerCache]:
    shape = {"kv_dtype": kv_dtype, "num_blocks": 6, "block_size": 32, "num_kv_heads": 3, "key_dim": 20, "value_dim": 40}
    pair = LayerCache.allocate(**shape), LayerCache.allocate(**shape)
    for cache in pair:
        generator = torch.Generator().manual_seed(0)
        cache.keys.random_(generator=generator)
        cache.values.random_(generator=generator)
    return pair


@pytest.mark.parametrize("moves", [[], [(0, 5)], [(2, 2)], [(0, 1), (1, 2), (2, 3)], [(3, 1), (0, 3)]])
@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
def test_equals_the_reference(workspace: Workspace, moves: list[tuple[int, int]], kv_dtype: KvDtype) -> None:
    found, expected = caches(kv_dtype)
    copy_blocks(found, moves, workspace=workspace)
    copy_blocks_reference(expected, moves)
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)


def test_block_outside_the_cache_is_refused_and_nothing_copied(workspace: Workspace) -> None:
    found, untouched = caches()
    with pytest.raises(ValueError, match=r"blocks are 0 to 6 \(exclusive\), found move 1 -> 6"):
        copy_blocks(found, [(0, 1), (1, 6)], workspace=workspace)
    assert torch.equal(found.keys, untouched.keys)
