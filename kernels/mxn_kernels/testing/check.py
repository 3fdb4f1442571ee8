"""Compares every op with its reference on the chip, without a test runner: `python -m mxn_kernels.testing.check`.

The shapes are the small ones that find faults (one token, a full block, a block and one, nothing, uneven ends), with
caches that are NaN wherever nothing was written. That makes it fit to be run under a memory checker too:
`compute-sanitizer --tool memcheck python -m mxn_kernels.testing.check`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mxn_kernels import ops
from mxn_kernels.shared_prefix import PrefixGroup, SharedPrefix, find_groups
from mxn_kernels.target import Target
from mxn_kernels.testing.batches import Batch, guard_is_intact, guarded_cache, make_batch
from mxn_kernels.testing.tolerances import ATTENTION, LSE, POINTWISE, error

CONTEXTS = (1, 16, 17, 0, 45)
QUERIES = (1, 5, 17, 0, 20)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One comparison. found: error over what is allowed, so 1 at most; None where it could not be made."""

    name: str
    state: str
    found: float | None = None


def checks(target: Target, device: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """Names, and what gives the largest error over the allowed one; infinite where a guard band was touched."""
    dtypes = [dtype for dtype in DTYPES if target.supports(dtype)]
    for dtype in dtypes:
        for dim, group in ((64, 1), (80, 4), (128, 8), (256, 3)):
            shape = {"key_dim": dim, "num_heads": 2 * group, "num_kv_heads": 2, "dtype": dtype, "device": device}
            name = f"{short(dtype)} d{dim} group {group}"
            yield f"paged_decode {name}", partial(_decode, shape, {})
            yield f"ragged_prefill {name}", partial(_prefill, shape, {})
    plain = {"num_heads": 4, "num_kv_heads": 1, "device": device}
    for rules in ({"window": 7}, {"softcap": 2.0}, {"sinks": True}, {"window": 20, "softcap": 2.0, "sinks": True}):
        name = " ".join(map(str, rules))
        yield f"paged_decode {name}", partial(_decode, plain, rules)
        yield f"ragged_prefill {name}", partial(_prefill, plain, rules)
    yield "paged_decode more splits than tiles", partial(_decode, plain, {"num_splits": 40})
    for dtype in target.fp8_dtypes[:1]:
        for scaling in ("tensor", "token_head"):
            shape = {**plain, "dtype": torch.float16, "cache_dtype": dtype, "scaling": scaling}
            yield f"paged_decode {short(dtype)} {scaling}", partial(_decode, shape, {})
            yield f"ragged_prefill {short(dtype)} {scaling}", partial(_prefill, shape, {})
            yield f"write_kv {short(dtype)} {scaling}", partial(_write, torch.float16, dtype, scaling, device)
    yield "shared_prefix_decode", partial(_shared, plain, as_room=False)
    yield "shared_prefix_decode, groups filled in later", partial(_shared, plain, as_room=True)
    for dtype in dtypes:
        yield f"write_kv {short(dtype)}", partial(_write, dtype, dtype, "none", device)
        yield f"rope {short(dtype)}", partial(_rope, dtype, device)
        yield f"rms_norm {short(dtype)}", partial(_norm, dtype, device)
        yield f"silu_mul {short(dtype)}", partial(_gate, dtype, device)
        yield f"sample {short(dtype)}", partial(_sample, dtype, device)
    yield "move_blocks", partial(_move, device)


def run_checks(device: str, only: str = "") -> list[Checked]:
    """All checks whose names contain `only`; one that fails or raises leaves the others to run."""
    results = []
    for name, check in checks(Target.of(device), device):
        if only not in name:
            continue
        torch.manual_seed(0)
        try:
            found = check()
            state = "ok" if found <= 1 else f"wrong: {found:.3g} times the allowed error"
            results.append(Checked(name=name, state=state, found=found))
        except Exception as fault:
            results.append(Checked(name=name, state=f"failed: {type(fault).__name__}: {str(fault)[:300]}"))
    return results


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").removeprefix("float8_")


# ---------------------------------------------------------------- attention


def _decode(shape: dict[str, Any], rules: dict[str, Any]) -> float:
    batch = make_batch(CONTEXTS, **shape)
    arguments = {**batch.arguments(), **_rules(rules, batch), "query": padded_queries(batch), "return_lse": True}
    return _attention_error(batch, partial(ops.paged_decode, **arguments))


def _prefill(shape: dict[str, Any], rules: dict[str, Any]) -> float:
    batch = make_batch(CONTEXTS, QUERIES, **shape)
    arguments = {**batch.arguments(), **_rules(rules, batch), "query_starts": batch.query_starts, "return_lse": True}
    return _attention_error(batch, partial(ops.ragged_prefill, **arguments))


def _shared(shape: dict[str, Any], *, as_room: bool) -> float:
    """A group of three, a group of two, a sequence alone, a padded row."""
    batch = make_batch((50, 48, 100, 20, 64, 33, 0), shared_blocks=[(3, 0, 1, 2), (2, 4, 5)], **shape)
    groups = find_groups(batch.block_table.cpu(), batch.context_lens.cpu(), 16)
    num_seqs = batch.context_lens.shape[0]
    device = batch.query.device
    prefix = SharedPrefix.of(groups, num_seqs=num_seqs, block_size=16, device=device)
    if as_room:
        prefix = room_for(groups, num_seqs, batch.block_table.shape[1], device)
    arguments = {**batch.arguments(), "query": padded_queries(batch), "prefix": prefix, "return_lse": True}
    return _attention_error(batch, partial(ops.shared_prefix_decode, **arguments))


def room_for(
    groups: Sequence[PrefixGroup], num_seqs: int, max_blocks: int, device: torch.device, num_groups: int = 4
) -> SharedPrefix:
    """A captured plan's tensors with these groups in them, and whatever a group before left behind."""
    lengths = SharedPrefix.room_shapes(num_seqs, num_groups)
    tensors = {name: torch.zeros(length, dtype=torch.int32) for name, length in lengths.items()}
    SharedPrefix.fill({name: tensor.numpy() for name, tensor in tensors.items()}, groups, 16)
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return SharedPrefix.room(moved, max_prefix_blocks=max_blocks, num_seqs=num_seqs, block_size=16)


def _attention_error(batch: Batch, op: Callable[..., Any]) -> float:
    found, wanted = op(), op(implementation="reference")
    if not guard_is_intact(batch.cache):
        return float("inf")
    dtype = batch.query.dtype
    return max(error(found[0], wanted[0]) / ATTENTION[dtype], error(found[1], wanted[1]) / LSE[dtype])


def padded_queries(batch: Batch) -> torch.Tensor:
    """One row per sequence, also for empty ones, as a padded decode batch has."""
    lengths = batch.query_starts.diff().long()
    padded = batch.query.new_full((lengths.shape[0], *batch.query.shape[1:]), float("nan"))
    padded[lengths == 1] = batch.query
    return padded


def _rules(rules: dict[str, Any], batch: Batch) -> dict[str, Any]:
    if not rules.get("sinks"):
        return rules
    return {**rules, "sinks": torch.linspace(-1, 2, batch.query.shape[1], device=batch.query.device)}


# ---------------------------------------------------------------- the rest


def _write(dtype: torch.dtype, cache_dtype: torch.dtype, scaling: Any, device: str) -> float:
    key, value = (torch.randn(7, 2, 80, device=device).to(dtype) for _ in range(2))
    slots = torch.tensor([3, -1, 17, 40, -1, 0, 63], dtype=torch.int32, device=device)
    written = []
    for implementation in (None, "reference"):
        shape = {"block_size": 16, "num_kv_heads": 2, "key_dim": 80, "dtype": cache_dtype, "scaling": scaling}
        cache = guarded_cache(4, **shape, device=device)
        if scaling == "tensor":
            cache.key_scale.fill_(0.5)
            cache.value_scale.fill_(0.5)
        ops.write_kv(key, value, cache, slots, implementation=implementation)
        written.append(cache)
    if not guard_is_intact(written[0]):
        return float("inf")
    # What was never written is NaN in both, so the bytes are compared; a chip may round fp8 at a border differently.
    differing = float((written[0].blocks != written[1].blocks).double().mean())
    allowed = 2e-3 if cache_dtype.itemsize == 1 else 0.0
    return differing / allowed if allowed else (float("inf") if differing else 0.0)


def _rope(dtype: torch.dtype, device: str) -> float:
    query, key = torch.randn(9, 4, 80, device=device).to(dtype), torch.randn(9, 2, 80, device=device).to(dtype)
    angles = torch.rand(9, 32, device=device) * 6
    found = ops.rope(query, key, angles.cos(), angles.sin())
    wanted = ops.rope(query, key, angles.cos(), angles.sin(), implementation="reference")
    return max(error(a, b) for a, b in zip(found, wanted, strict=True)) / POINTWISE[dtype]


def _norm(dtype: torch.dtype, device: str) -> float:
    x, residual = (torch.randn(5, 1000, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(1000, device=device).to(dtype)
    found = ops.rms_norm(x, weight, 1e-6, residual=residual)
    wanted = ops.rms_norm(x, weight, 1e-6, residual=residual, implementation="reference")
    return max(error(a, b) for a, b in zip(found, wanted, strict=True)) / POINTWISE[dtype]


def _gate(dtype: torch.dtype, device: str) -> float:
    both = torch.randn(5, 2000, device=device).to(dtype)
    gate, up = both[:, :1000], both[:, 1000:]
    return error(ops.silu_mul(gate, up), ops.silu_mul(gate, up, implementation="reference")) / POINTWISE[dtype]


def _sample(dtype: torch.dtype, device: str) -> float:
    """A draw may differ where a chip's exponential differs in its last digit; that is rare."""
    rows = 32
    logits = (3 * torch.randn(rows, 5000, device=device)).to(dtype)
    kinds = torch.arange(rows, device=device) % 4
    arguments = (
        torch.where(kinds == 0, 0.0, 0.8),
        torch.where(kinds == 1, 40, 0).int(),
        torch.where(kinds == 2, 0.9, 1.0),
        torch.where(kinds == 3, 0.02, 0.0),
        torch.arange(rows, device=device) * 7919 - 5,
        torch.arange(rows, device=device).int(),
    )
    found = ops.sample(logits, *arguments)
    differing = (found != ops.sample(logits, *arguments, implementation="reference")).double().mean()
    return float(differing) / (2 / rows)


def _move(device: str) -> float:
    cache = guarded_cache(8, block_size=16, num_kv_heads=2, key_dim=64, dtype=torch.float16, device=device)
    cache.blocks.random_(0, 255)
    before = cache.blocks.clone()
    ops.copy_blocks([cache], [(0, 3), (3, 5), (2, 0)])
    wanted = before.clone()
    wanted[3], wanted[5], wanted[0] = before[0], before[0], before[2]
    return 0.0 if torch.equal(cache.blocks, wanted) and guard_is_intact(cache) else float("inf")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mxn_kernels.testing.check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="checks whose names contain this")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    options = parser.parse_args(arguments)
    begin_s = time.perf_counter()
    results = run_checks(options.device, options.only)
    for result in results:
        number = "" if result.found is None else f"{result.found:8.3f} of the allowed error"
        print(f"{result.name:52} {number:32} {result.state}")
    bad = [result for result in results if result.state != "ok"]
    print(f"{len(results)} checks, {len(bad)} not ok, {time.perf_counter() - begin_s:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 1 if bad or not results else 0


if __name__ == "__main__":
    sys.exit(main())
