"""FlashInfer for `ragged_prefill`, where its package is installed: NVIDIA chips, by name only.

Written after the package's documented interface (flashinfer.BatchPrefillWithPagedKVCacheWrapper); it has not been run
yet. Who uses it compares it with a reference first, as mxn does when it loads a model.

FlashInfer plans a step on the host and then runs the plan in every layer. A plan is kept while the tensors it was made
from are the same objects, so a step's layers share one; making it reads them back, which waits for the chip.
Source: Ye et al., FlashInfer (2025).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.ops.checks import need
from mxn_kernels.target import Target

_MODULE = "flashinfer"
_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 * 2**20
"""What its documentation recommends."""


def why_not_flashinfer(target: Target, caches: Sequence[KVCache]) -> str | None:
    """Why it cannot serve these caches on this chip, or None."""
    capability = target.name.removeprefix("sm_")
    if not capability.isdigit() or int(capability) < 80:
        return f"it runs on NVIDIA chips from sm_80 on, this is {target.name}"
    if importlib.util.find_spec(_MODULE) is None:
        return f"the Python module {_MODULE} is not installed"
    for cache in caches:
        if cache.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes caches of float16 and bfloat16, found {cache.dtype}"
        if cache.key_dim != cache.value_dim or cache.key_dim not in _DIMS:
            sizes = ", ".join(map(str, _DIMS))
            return f"it takes equal head sizes of {sizes}, found {cache.key_dim} and {cache.value_dim}"
    return None


def ragged_prefill(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    target: Target,
) -> None:
    """Fills out (T, num_heads, value_dim). Sinks and the log-sum-exp are refused."""
    need(sinks is None, "flashinfer has no sinks here; use the Triton implementation")
    need(lse is None, "flashinfer gives no log-sum-exp here; use the Triton implementation")
    shape = (query.shape[1], cache.num_kv_heads, cache.key_dim, cache.block_size)
    rules = {"sm_scale": scaling, "window_left": -1 if window is None else window - 1, "logits_soft_cap": softcap}
    step = (query_starts, block_table, context_lens)
    wrapper, num_tokens = _plans(query.device).wrapper(step, shape, rules, query.dtype)
    out[:num_tokens].copy_(wrapper.run(query[:num_tokens], (cache.keys, cache.values)))


class _Plans:
    """A wrapper for each kind of layer, and the step that each was planned for."""

    def __init__(self, device: torch.device) -> None:
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[Any, Any] = {}
        self._planned: dict[Any, tuple[torch.Tensor, ...]] = {}
        self._step: tuple[torch.Tensor, ...] = ()
        self._pages: tuple[torch.Tensor, ...] = ()

    def wrapper(
        self, step: tuple[torch.Tensor, ...], shape: tuple[int, ...], rules: dict[str, Any], dtype: torch.dtype
    ) -> tuple[Any, int]:
        """One that is planned for this step, and the step's number of tokens.

        Args: step: query_starts, block_table, context_lens. shape: query heads, KV heads, head size, block size.
        """
        if not _same(step, self._step):
            self._step, self._pages = step, _pages(*step, block_size=shape[3])
        key = (shape, dtype, *rules.values())
        if key not in self._wrappers:
            make = importlib.import_module(_MODULE).BatchPrefillWithPagedKVCacheWrapper
            self._wrappers[key] = make(self._workspace, "HND")
        wrapper = self._wrappers[key]
        if not _same(step, self._planned.get(key, ())):
            wrapper.plan(*self._pages, *shape, causal=True, **rules, q_data_type=dtype, kv_data_type=dtype)
            self._planned[key] = step
        return wrapper, int(self._pages[0][-1])


def _pages(
    query_starts: torch.Tensor, block_table: torch.Tensor, context_lens: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, ...]:
    """FlashInfer's form of a batch, on the host but for the ids: query starts, where each sequence's blocks begin, the
    block ids in a row, and how full each last block is."""
    contexts = context_lens.cpu()
    counts = -(-contexts // block_size)
    starts = torch.zeros(len(contexts) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    is_used = torch.arange(block_table.shape[1]) < counts[:, None]
    ids = block_table.cpu()[is_used].to(block_table.device)
    return query_starts.cpu(), starts, ids, contexts - (counts - 1).clamp(min=0) * block_size


def _same(step: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return len(step) == len(other) and all(a is b for a, b in zip(step, other, strict=True))


@lru_cache
def _plans(device: torch.device) -> _Plans:
    return _Plans(device)
