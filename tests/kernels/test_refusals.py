"""Every op's wrapper refuses what does not fit before anything is launched, and says what it found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn_kernels import ops  # noqa: E402
from mxn_kernels.kv_cache import KVCache  # noqa: E402
from mxn_kernels.ops.swap_blocks import HostTier  # noqa: E402
from mxn_kernels.shared_prefix import PrefixGroup, SharedPrefix  # noqa: E402
from mxn_kernels.testing.batches import make_batch  # noqa: E402

INT = torch.int32
Arguments = dict[str, Any]


def write_kv() -> Arguments:
    cache = KVCache.allocate(2, block_size=16, num_kv_heads=2, key_dim=16, dtype=torch.float32)
    new = torch.zeros(3, 2, 16)
    return {"key": new, "value": new.clone(), "cache": cache, "slot_mapping": torch.tensor([0, 5, -1], dtype=INT)}


def paged_decode() -> Arguments:
    return make_batch((20, 5), num_kv_heads=2).arguments()


def ragged_prefill() -> Arguments:
    batch = make_batch((20, 5), (3, 1), num_kv_heads=2)
    return {**batch.arguments(), "query_starts": batch.query_starts}


def shared_prefix_decode() -> Arguments:
    batch = make_batch((40, 37), num_kv_heads=2, shared_blocks=[(2, 0, 1)])
    prefix = SharedPrefix.of([PrefixGroup(2, (0, 1))], num_seqs=2, block_size=16, device="cpu")
    return {**batch.arguments(), "prefix": prefix}


def move_blocks() -> Arguments:
    blocks = torch.zeros((3, 32), dtype=torch.uint8)
    ids = {"source_ids": torch.tensor([0], dtype=INT), "destination_ids": torch.tensor([1], dtype=INT)}
    return {"source": blocks, "destination": blocks.clone(), **ids}


def copy_blocks() -> Arguments:
    return {"caches": [KVCache.allocate(3, block_size=16, num_kv_heads=1, key_dim=16)], "moves": [(0, 1)]}


def swap_blocks() -> Arguments:
    return {"caches": [KVCache.allocate(3, block_size=16, num_kv_heads=1, key_dim=16)], "moves": [(0, 1)]}


def rms_norm() -> Arguments:
    return {"x": torch.zeros(2, 8), "weight": torch.zeros(8), "eps": 1e-6}


def rope() -> Arguments:
    angles = torch.zeros(3, 8)
    return {"query": torch.zeros(3, 4, 16), "key": torch.zeros(3, 2, 16), "cos": angles, "sin": angles.clone()}


def silu_mul() -> Arguments:
    return {"gate": torch.zeros(2, 8), "up": torch.zeros(2, 8)}


def sample() -> Arguments:
    floats, ints = torch.zeros(2), torch.zeros(2, dtype=INT)
    rules = {"temperatures": floats, "top_k": ints, "top_p": floats + 1, "min_p": floats}
    return {"logits": torch.zeros(2, 9), **rules, "seeds": ints.long(), "steps": ints}


def swap(caches: list[KVCache], moves: list[tuple[int, int]]) -> None:
    HostTier(caches, 2, implementation="reference").swap_out(moves)


OPS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "write_kv": (ops.write_kv, write_kv),
    "paged_decode": (ops.paged_decode, paged_decode),
    "ragged_prefill": (ops.ragged_prefill, ragged_prefill),
    "shared_prefix_decode": (ops.shared_prefix_decode, shared_prefix_decode),
    "move_blocks": (ops.move_blocks, move_blocks),
    "copy_blocks": (ops.copy_blocks, copy_blocks),
    "swap_blocks": (swap, swap_blocks),
    "rms_norm": (ops.rms_norm, rms_norm),
    "rope": (ops.rope, rope),
    "silu_mul": (ops.silu_mul, silu_mul),
    "sample": (ops.sample, sample),
}


def spread(name: str) -> Callable[[Arguments], None]:
    """The same tensor with gaps in its last dimension."""

    def change(arguments: Arguments) -> None:
        tensor = arguments[name]
        arguments[name] = torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]

    return change


def to(dtype: torch.dtype, *names: str) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update({name: arguments[name].to(dtype) for name in names})


def cut(name: str, *where: slice) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update({name: arguments[name][where]})


def put(name: str, value: int, index: int = 0, **others: Any) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments[name] = arguments[name].clone()
        arguments[name].view(-1)[index] = value
        arguments.update(check_ids=True, **others)

    return change


def give(**changes: Any) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update(changes)


ALL = slice(None)
ATTENTION = [
    ("dtype", to(torch.float64, "query"), "query must be float16 or bfloat16 or float32, found float64"),
    ("index dtype", to(torch.int64, "block_table"), "block_table must be int32, found int64"),
    ("stride", spread("query"), "query must be contiguous in its last dimension, found strides"),
    ("heads", cut("query", ALL, slice(3)), "query heads must be a multiple of 2 KV heads, found 3"),
    ("head size", cut("query", ALL, ALL, slice(32)), r"query must have shape \(any, any, 64\)"),
    ("rows", cut("context_lens", slice(1)), r"must have shape \(1, any\)"),
    ("block id", put("block_table", 99), "block_table row 0 names block 99; blocks are 0 to"),
    ("context", put("context_lens", 999), r"context_lens\[0\] is 999; its row of the block table holds 0 to"),
]
REFUSED: dict[str, list[tuple[str, Callable[[Arguments], None], str]]] = {
    "write_kv": [
        ("dtype", to(torch.float64, "key", "value"), "key must be float16 or bfloat16 or float32, found float64"),
        ("other dtype", to(torch.float16, "key", "value"), "the cache must be torch.float16 like the keys"),
        ("stride", spread("value"), "value must be contiguous in its last dimension"),
        ("heads", cut("key", ALL, slice(1)), r"key must have shape \(any, 2, 16\), found \(3, 1, 16\)"),
        ("slot", put("slot_mapping", 32), r"slots are -1 \(not written\) or 0 to 32 \(exclusive\), found 32"),
    ],
    "paged_decode": ATTENTION,
    "ragged_prefill": [
        *ATTENTION,
        ("fewer tokens than new", put("context_lens", 2), r"context_lens\[0\] is 2, fewer than its 3 new tokens"),
    ],
    "shared_prefix_decode": [
        *ATTENTION,
        ("context below the prefix", put("context_lens", 20), "row 0 has 20 tokens, fewer than the prefix"),
        ("not shared", put("block_table", 0, index=4), "row 1 does not share its first 2 blocks"),
    ],
    "move_blocks": [
        ("dtype", to(torch.int32, "source"), "source must be uint8"),
        ("stride", spread("source"), "source must hold contiguous blocks"),
        ("block id", put("destination_ids", 3), r"destination_ids must be 0 to 3 \(exclusive\), found \[3\]"),
    ],
    "copy_blocks": [
        ("block id", give(moves=[(0, 3)]), r"blocks are 0 to 3 \(exclusive\), found move 0 -> 3"),
        ("negative id", give(moves=[(-1, 0)]), "found move -1 -> 0"),
    ],
    "swap_blocks": [
        ("host block", give(moves=[(0, 2)]), "found host block 2 and block 0"),
        ("block id", give(moves=[(3, 0)]), "found host block 0 and block 3"),
        ("twice", give(moves=[(0, 1), (1, 1)]), "a destination comes twice"),
    ],
    "rms_norm": [
        ("dtype", to(torch.float64, "x"), "x must be float16 or bfloat16 or float32, found float64"),
        ("width", cut("weight", slice(4)), r"weight must have shape \(8\), found \(4,\)"),
        ("residual", give(residual=torch.zeros(2, 8).half()), "residual must be like x"),
    ],
    "rope": [
        ("dtype", to(torch.float64, "query", "key"), "query must be float16 or bfloat16 or float32"),
        ("other dtype", to(torch.float16, "key"), "key must be float32, found float16"),
        ("stride", spread("query"), "query must be contiguous in its last dimension"),
        ("angles", give(cos=torch.zeros(3, 9), sin=torch.zeros(3, 9)), "rotate 18 dimensions of a head, which has 16"),
        ("half a cache", give(value=torch.zeros(3, 2, 16)), "value, cache and slot_mapping come together"),
    ],
    "silu_mul": [
        ("dtype", to(torch.float64, "gate"), "gate must be float16 or bfloat16 or float32, found float64"),
        ("rows", cut("up", slice(1)), r"up must have shape \(2, 8\), found \(1, 8\)"),
        ("stride", spread("up"), "up must be contiguous in its last dimension"),
    ],
    "sample": [
        ("dtype", to(torch.float64, "logits"), "logits must be float16 or bfloat16 or float32, found float64"),
        ("rule's dtype", to(torch.int32, "seeds"), "seeds must be int64, found int32"),
        ("rows", cut("steps", slice(1)), r"steps must have shape \(2\), found \(1,\)"),
        ("stride", spread("logits"), "logits must be contiguous in its last dimension"),
        ("no vocabulary", cut("logits", ALL, slice(0)), "the vocabulary must have 1 to 1048576 tokens, found 0"),
    ],
}
CASES = [
    pytest.param(op, change, text, id=f"{op}: {name}") for op, rows in REFUSED.items() for name, change, text in rows
]


@pytest.mark.parametrize(("op", "change", "message"), CASES)
def test_a_wrapper_says_what_it_found_and_what_it_expected(
    op: str, change: Callable[[Arguments], None], message: str
) -> None:
    run, make = OPS[op]
    arguments = make()
    change(arguments)
    with pytest.raises(ValueError, match=message):
        run(**arguments)


@pytest.mark.parametrize("op", OPS)
def test_what_the_cases_change_was_right_before(op: str) -> None:
    """Else a case would pass by another fault than its own."""
    run, make = OPS[op]
    extra = {} if op == "swap_blocks" else {"implementation": "reference"}
    run(**make(), **extra)
    assert op in REFUSED


@pytest.mark.parametrize("op", ["paged_decode", "ragged_prefill"])
def test_a_context_of_zero_is_a_padded_row_and_sees_nothing(op: str) -> None:
    batch = make_batch((20, 0), (1, 0) if op == "ragged_prefill" else (1, 1), num_kv_heads=2)
    arguments = batch.arguments()
    if op == "ragged_prefill":
        arguments["query_starts"] = batch.query_starts
    out = OPS[op][0](**arguments, check_ids=True, implementation="reference")
    assert torch.isfinite(out).all()
    if op == "paged_decode":
        assert (out[1] == 0).all()
