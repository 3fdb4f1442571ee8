"""Every kernel in the forms that models need, as launches on the meta device: planned and compiled, but never run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from mxn_kernels import ops
from mxn_kernels.kv_cache import KVCache, Scaling
from mxn_kernels.shared_prefix import PrefixGroup, SharedPrefix
from mxn_kernels.target import Target
from mxn_kernels.triton.launch import Launch, record_launches


@dataclass(frozen=True, slots=True)
class Case:
    """A name and what to call for a target."""

    name: str
    call: Callable[[Target], object]

    def launches(self, target: Target) -> list[Launch]:
        with record_launches() as launches:
            self.call(target)
        return launches


def cases(target: Target) -> Iterator[Case]:
    """All forms that the target can run, head sizes and cache dtypes of common models among them."""
    for dim in (64, 80, 128, 256, 512):
        yield Case(f"paged_decode d{dim}", partial(_decode, dim=dim))
        yield Case(f"ragged_prefill d{dim}", partial(_prefill, dim=dim))
        yield Case(f"shared_prefix_decode d{dim}", partial(_shared, dim=dim))
    yield Case("paged_decode k192 v128", partial(_decode, dim=192, value_dim=128))
    yield Case("ragged_prefill k192 v128", partial(_prefill, dim=192, value_dim=128))
    yield Case("paged_decode d128 fp32", partial(_decode, dim=128, dtype=torch.float32))
    yield Case("ragged_prefill d128 fp32", partial(_prefill, dim=128, dtype=torch.float32))
    yield Case(
        "paged_decode d128 window softcap sinks", partial(_decode, dim=128, window=512, softcap=50.0, sinks=True)
    )
    yield Case(
        "ragged_prefill d128 window softcap sinks", partial(_prefill, dim=128, window=512, softcap=50.0, sinks=True)
    )
    for dtype in target.fp8_dtypes:
        for scaling in ("tensor", "token_head"):
            fp8 = {"dim": 128, "cache_dtype": dtype, "scaling": scaling}
            yield Case(f"paged_decode d128 {_short(dtype)} {scaling}", partial(_decode, **fp8))
            yield Case(f"ragged_prefill d128 {_short(dtype)} {scaling}", partial(_prefill, **fp8))
            yield Case(f"write_kv d128 {_short(dtype)} {scaling}", partial(_write, **fp8))
    yield Case("write_kv d128", partial(_write, dim=128))
    yield Case("rope d128", partial(_rope, has_cache=False))
    yield Case("rope d128 into cache", partial(_rope, has_cache=True))
    yield Case("rms_norm 4096", partial(_norm, width=4096))
    yield Case("rms_norm 128", partial(_norm, width=128))
    yield Case("rms_norm 4096 residual", partial(_norm, width=4096, residual=True))
    yield Case("silu_mul 14336", _silu)
    yield Case("move_blocks", _move)
    yield Case("sample", _sample)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.float8_")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def index(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def _cache(dim: int, value_dim: int | None, dtype: torch.dtype, scaling: Scaling = "none") -> KVCache:
    shape = {"block_size": 16, "num_kv_heads": 8, "key_dim": dim, "value_dim": value_dim}
    return KVCache.allocate(4096, **shape, dtype=dtype, scaling=scaling, device="meta")


def _attention(query: torch.Tensor, window: int | None = None, softcap: float | None = None, sinks: bool = False):
    sinks_tensor = meta(query.shape[1], dtype=torch.float32) if sinks else None
    return {"scaling": 0.1, "softcap": softcap, "sinks": sinks_tensor, **({"window": window} if window else {})}


def _decode(target, *, dim, value_dim=None, dtype=torch.bfloat16, cache_dtype=None, scaling="none", **options):
    query = meta(16, 32, dim, dtype=dtype)
    cache = _cache(dim, value_dim, cache_dtype or dtype, scaling)
    ops.paged_decode(
        query, cache, index(16, 512), index(16), **_attention(query, **options), return_lse=True, target=target
    )


def _prefill(target, *, dim, value_dim=None, dtype=torch.bfloat16, cache_dtype=None, scaling="none", **options):
    query = meta(8192, 32, dim, dtype=dtype)
    cache = _cache(dim, value_dim, cache_dtype or dtype, scaling)
    ops.ragged_prefill(query, cache, index(4, 512), index(5), index(4), **_attention(query, **options), target=target)


def _shared(target, *, dim):
    query, cache = meta(64, 32, dim), _cache(dim, None, torch.bfloat16)
    prefix = SharedPrefix.of([PrefixGroup(512, tuple(range(64)))], num_seqs=64, block_size=16, device="meta")
    tables = (index(64, 528), index(64))
    ops.shared_prefix_decode(query, cache, *tables, prefix, scaling=0.1, max_tail=256, target=target)


def _write(target, *, dim, cache_dtype=torch.bfloat16, scaling="none"):
    cache = _cache(dim, None, cache_dtype, scaling)
    ops.write_kv(meta(4096, 8, dim), meta(4096, 8, dim), cache, index(4096), target=target)


def _rope(target, *, has_cache):
    query, key, cos = meta(4096, 32, 128), meta(4096, 8, 128), meta(4096, 64, dtype=torch.float32)
    into = {"value": key, "cache": _cache(128, None, key.dtype), "slot_mapping": index(4096)} if has_cache else {}
    ops.rope(query, key, cos, cos, **into, target=target)


def _norm(target, *, width, residual=False):
    x = meta(4096, width)
    ops.rms_norm(x, meta(width), 1e-6, residual=x if residual else None, target=target)


def _silu(target):
    both = meta(4096, 2 * 14336)
    ops.silu_mul(both[:, :14336], both[:, 14336:], target=target)


def _move(target):
    blocks = _cache(128, None, torch.bfloat16).blocks
    ops.move_blocks(blocks, blocks, index(64), index(64), target=target)


def _sample(target):
    rows = [meta(64, dtype=torch.float32) for _ in range(3)]
    seeds = meta(64, dtype=torch.int64)
    ops.sample(meta(64, 151936), rows[0], index(64), rows[1], rows[2], seeds, index(64), target=target)
