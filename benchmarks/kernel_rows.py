"""What benchmarks/kernels.py measures: each row's inputs, its least bytes and operations, its check, and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mxn_kernels import ops
from mxn_kernels.kv_cache import KVCache
from mxn_kernels.shared_prefix import PrefixGroup, SharedPrefix
from mxn_kernels.target import Target
from mxn_kernels.testing.tolerances import POINTWISE, ROWS, row_error

BF16 = torch.bfloat16
HEADS, KV_HEADS, BLOCK = 32, 8, 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """A row, ready to run: what is timed, what it must do at least, and how it is checked.

    bytes: each input read once, each output written once. rivals: the same work by other libraries.
    """

    run: Callable[[], Any]
    bytes: int
    flops: int = 0
    check: Callable[[], float] | None = None
    tolerance: float = 0.0
    rivals: dict[str, Callable[[], Callable[[], Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table. goal: ("copy" share, "tflops" or "times" over the baseline row, number)."""

    name: str
    make: Callable[[str, Target], Work]
    gib: float
    goal: tuple[str, float] | None = None
    baseline: str | None = None


def rows() -> Iterator[Row]:
    for batch, context in ((16, 2048), (16, 8192), (64, 2048), (64, 8192), (256, 2048)):
        gib = 2.5 * batch * context * 4 / 2**20
        yield Row(
            f"paged_decode B{batch} {context}", lambda d, t, b=batch, c=context: decode(d, t, b, c), gib, ("copy", 0.90)
        )
    yield Row("paged_decode B1 32768", lambda d, t: decode(d, t, 1, 32768), 1, ("copy", 0.75))
    yield Row("paged_decode B64 8192 fp8", lambda d, t: decode(d, t, 64, 8192, t.fp8_dtypes[0]), 2, ("copy", 0.90))
    yield Row("paged_decode B64 uneven", lambda d, t: decode(d, t, 64, 8192, uneven=True), 3)
    yield Row("paged_decode B64 8192 window 1024", lambda d, t: decode(d, t, 64, 8192, window=1024), 3)
    yield Row("ragged_prefill 1 x 16384", lambda d, t: prefill(d, t, [16384]), 5, ("tflops", 400))
    yield Row("ragged_prefill 8 x 2048", lambda d, t: prefill(d, t, [2048] * 8), 5)
    yield Row("ragged_prefill uneven 16384", lambda d, t: prefill(d, t, [37, 4000, 1, 9000, 300, 3046]), 5)
    yield Row("ragged_prefill 2048 after 14336", lambda d, t: prefill(d, t, [2048], 14336), 5)
    yield Row("ragged_prefill 1 x 16384 window 1024", lambda d, t: prefill(d, t, [16384], window=1024), 5)
    shape = (64, 8192, 256)
    yield Row("64 x (8192 shared + 256), paged_decode", lambda d, t: shared(d, t, *shape, is_shared=False), 1)
    baseline = "64 x (8192 shared + 256), paged_decode"
    yield Row("64 x (8192 shared + 256), shared", lambda d, t: shared(d, t, *shape), 1, ("times", 5.0), baseline)
    for name, make in (("write_kv", write), ("rms_norm", norm), ("rope", rotate), ("silu_mul", gate)):
        yield Row(name, make, 2, ("copy", 0.85))
    yield Row("rms_norm + residual", lambda d, t: norm(d, t, has_residual=True), 2, ("copy", 0.85))
    yield Row("rms_norm of heads", lambda d, t: norm(d, t, width=128), 2, ("copy", 0.85))
    yield Row("rope into cache", lambda d, t: rotate(d, t, has_cache=True), 2, ("copy", 0.85))
    yield Row("move_blocks", move, 2, ("copy", 0.85))
    yield Row("sample 64 x 151936, plain", lambda d, t: draw(d, t, top_p=1.0), 1)
    yield Row("sample 64 x 151936, top-p 0.9", lambda d, t: draw(d, t, top_p=0.9), 1)


# ---------------------------------------------------------------- rows


def decode(device, target, batch, context, cache_dtype=BF16, *, uneven=False, window=None) -> Work:
    lengths = torch.linspace(context // 8, context, batch).int().tolist() if uneven else [context] * batch
    cache, table = paged(device, lengths, cache_dtype)
    query = normal(device, batch, HEADS, 128)
    contexts = ints(device, lengths)
    out = poison(query)
    options = {"scaling": 128**-0.5, "window": window}

    def run():
        ops.paged_decode(query, cache, table, contexts, **options, max_context=max(lengths), out=out, target=target)

    def check() -> float:
        picked = sorted({0, batch // 2, batch - 1})
        wanted = ops.paged_decode(
            query[picked], cache, table[picked], contexts[picked], **options, implementation="reference"
        )
        return row_error(out[picked], wanted)

    seen = sum(min(length, window or length) for length in lengths)
    needed = seen * KV_HEADS * 256 * cache_dtype.itemsize + 2 * query.numel() * 2
    plain = cache_dtype is BF16 and not uneven and window is None
    rivals = {"sdpa": lambda: sdpa_decode(device, query, context)} if plain else {}
    if plain:
        rivals["flashinfer"] = lambda: flashinfer_decode(query, cache, table, lengths)
    flops = 4 * 128 * HEADS * seen
    return Work(run=run, bytes=needed, flops=flops, check=check, tolerance=ROWS[BF16], rivals=rivals)


def prefill(device, target, chunks, cached=0, *, window=None) -> Work:
    lengths = [chunk + cached for chunk in chunks]
    cache, table = paged(device, lengths, BF16)
    query = normal(device, sum(chunks), HEADS, 128)
    starts = ints(device, [sum(chunks[:i]) for i in range(len(chunks) + 1)])
    contexts = ints(device, lengths)
    out = poison(query)
    options = {"scaling": 128**-0.5, "window": window}

    def run():
        ops.ragged_prefill(query, cache, table, starts, contexts, **options, out=out, target=target)

    def check() -> float:
        """The last tokens of each chunk, as chunks of their own, and the first of the first."""
        worst = 0.0
        for seq, chunk in enumerate(chunks):
            for count, skipped in ((min(64, chunk), 0), (min(64, chunk), chunk - min(64, chunk))):
                end = sum(chunks[: seq + 1]) - skipped
                part = query[end - count : end]
                where = (table[seq : seq + 1], ints(device, [0, count]), contexts[seq : seq + 1] - skipped)
                wanted = ops.ragged_prefill(part, cache, *where, **options, implementation="reference")
                worst = max(worst, row_error(out[end - count : end], wanted))
        return worst

    pairs = sum(
        min(position, window or position) for chunk in chunks for position in range(cached + 1, cached + chunk + 1)
    )
    rivals = {}
    if len(set(chunks)) == 1 and not cached and window is None:
        rivals = {
            "sdpa": lambda: sdpa_prefill(device, query, len(chunks)),
            "flex_attention": lambda: flex_prefill(device, query, len(chunks)),
            "flashinfer": lambda: flashinfer_prefill(query, cache, table, chunks),
        }
    needed = sum(lengths) * KV_HEADS * 256 * 2 + 2 * query.numel() * 2
    flops = 4 * 128 * HEADS * pairs
    return Work(run=run, bytes=needed, flops=flops, check=check, tolerance=ROWS[BF16], rivals=rivals)


def shared(device, target, batch, prefix_len, tail, *, is_shared=True) -> Work:
    """Both rows attend over the same tables: a prefix that all share, then tails of their own."""
    prefix_blocks, tail_blocks = prefix_len // BLOCK, tail // BLOCK
    cache = make_cache(device, prefix_blocks + batch * tail_blocks, BF16)
    order = shuffled(device, cache.num_blocks)
    tails = order[prefix_blocks:].view(batch, tail_blocks)
    table = torch.cat([order[:prefix_blocks].expand(batch, -1), tails], 1).contiguous()
    contexts = ints(device, [prefix_len + tail] * batch)
    query = normal(device, batch, HEADS, 128)
    out = poison(query)
    groups = [PrefixGroup(prefix_blocks, tuple(range(batch)))]
    prefix = SharedPrefix.of(groups, num_seqs=batch, block_size=BLOCK, device=device)
    common = {"scaling": 128**-0.5, "out": out, "target": target}

    def run():
        if is_shared:
            ops.shared_prefix_decode(query, cache, table, contexts, prefix, **common, max_tail=tail)
        else:
            ops.paged_decode(query, cache, table, contexts, **common, max_context=prefix_len + tail)

    def check() -> float:
        picked = [0, batch // 2, batch - 1]
        arguments = (query[picked], cache, table[picked], contexts[picked])
        return row_error(out[picked], ops.paged_decode(*arguments, scaling=128**-0.5, implementation="reference"))

    tokens = prefix_len + batch * tail if is_shared else batch * (prefix_len + tail)
    needed = tokens * KV_HEADS * 256 * 2 + 2 * query.numel() * 2
    flops = 4 * 128 * HEADS * batch * (prefix_len + tail)
    return Work(run=run, bytes=needed, flops=flops, check=check, tolerance=ROWS[BF16])


def write(device, target, tokens=65536) -> Work:
    cache = make_cache(device, tokens // BLOCK, BF16)
    key, value = normal(device, tokens, KV_HEADS, 128), normal(device, tokens, KV_HEADS, 128)
    slots = shuffled(device, tokens)

    def check() -> float:
        rows_at = slots.long()
        found = cache.keys[rows_at // BLOCK, :, rows_at % BLOCK], cache.values[rows_at // BLOCK, :, rows_at % BLOCK]
        return max(row_error(found[0], key), row_error(found[1], value))

    return Work(
        run=lambda: ops.write_kv(key, value, cache, slots, target=target), bytes=2 * 2 * key.numel() * 2, check=check
    )


def norm(device, target, size=2**26, *, width=4096, has_residual=False) -> Work:
    x, weight = normal(device, size // width, width), normal(device, width)
    residual = normal(device, *x.shape) if has_residual else None
    results: list[Any] = []

    def run():
        results[:] = [ops.rms_norm(x, weight, 1e-6, residual=residual, target=target)]

    def check() -> float:
        part = slice(0, 256)
        tail = None if residual is None else residual[part]
        wanted = ops.rms_norm(x[part], weight, 1e-6, residual=tail, implementation="reference")
        pairs = zip(results[0], wanted, strict=True) if has_residual else [(results[0], wanted)]
        return max(row_error(found[part], want) for found, want in pairs)

    rivals = {} if has_residual else {"torch": lambda: lambda: torch.nn.functional.rms_norm(x, (width,), weight, 1e-6)}
    passes = 4 if has_residual else 2
    return Work(run=run, bytes=passes * x.numel() * 2, check=check, tolerance=POINTWISE[BF16], rivals=rivals)


def rotate(device, target, tokens=16384, *, has_cache=False) -> Work:
    query, key = normal(device, tokens, HEADS, 128), normal(device, tokens, KV_HEADS, 128)
    angles = normal(device, tokens, 64, dtype=torch.float32)
    cos, sin = angles.cos(), angles.sin()
    cache = make_cache(device, tokens // BLOCK, BF16) if has_cache else None
    into = {"value": key, "cache": cache, "slot_mapping": shuffled(device, tokens)} if has_cache else {}
    results: list[Any] = []

    def run():
        results[:] = [ops.rope(query, key, cos, sin, **into, target=target)]

    def check() -> float:
        part = slice(0, 256)
        arguments = (query[part], key[part], cos[part], sin[part])
        wanted, wanted_key = ops.rope(*arguments, implementation="reference")
        if not has_cache:
            return max(row_error(results[0][0][part], wanted), row_error(results[0][1][part], wanted_key))
        slots = into["slot_mapping"][part].long()
        stored = cache.keys[slots // BLOCK, :, slots % BLOCK]
        return max(row_error(results[0][part], wanted), row_error(stored, wanted_key))

    moved = 2 * (query.numel() + key.numel()) * 2 + 2 * cos.numel() * 4 + (2 * key.numel() * 2 if has_cache else 0)
    return Work(run=run, bytes=moved, check=check, tolerance=POINTWISE[BF16])


def gate(device, target, tokens=8192) -> Work:
    both = normal(device, tokens, 2 * 14336)
    left, right = both[:, :14336], both[:, 14336:]
    results: list[torch.Tensor] = []

    def run():
        results[:] = [ops.silu_mul(left, right, target=target)]

    def check() -> float:
        wanted = ops.silu_mul(left[:64], right[:64], implementation="reference")
        return row_error(results[0][:64], wanted)

    rivals = {"torch": lambda: lambda: torch.nn.functional.silu(left) * right}
    return Work(run=run, bytes=3 * left.numel() * 2, check=check, tolerance=POINTWISE[BF16], rivals=rivals)


def move(device, target, count=4096) -> Work:
    blocks = make_cache(device, 2 * count, BF16).blocks
    order = shuffled(device, 2 * count)
    from_ids, to_ids = order[:count].contiguous(), order[count:].contiguous()

    def check() -> float:
        return 0.0 if torch.equal(blocks[from_ids.long()], blocks[to_ids.long()]) else float("inf")

    return Work(
        run=lambda: ops.move_blocks(blocks, blocks, from_ids, to_ids, target=target),
        bytes=2 * count * blocks.shape[1],
        check=check,
    )


def draw(device, target, vocab_size=151936, *, top_p) -> Work:
    """Logits as peaked as a language model's: a few tokens hold most of the mass."""
    logits = normal(device, 64, vocab_size) * 2.5
    full = {name: torch.full((64,), number, device=device) for name, number in (("t", 1.0), ("p", top_p), ("m", 0.0))}
    counts = ints(device, [0] * 64)
    seeds = torch.arange(64, device=device)
    arguments = (logits, full["t"], counts, full["p"], full["m"], seeds, counts)
    results: list[torch.Tensor] = []

    def run():
        results[:] = [ops.sample(*arguments, target=target)]

    def check() -> float:
        """Chips' exponentials differ in the last digit, which may move a draw at a border once in many."""
        wanted = ops.sample(*arguments, implementation="reference")
        return float((results[0] != wanted).double().mean())

    return Work(run=run, bytes=logits.numel() * 2, check=check, tolerance=1 / 64)


# ---------------------------------------------------------------- other libraries


def sdpa_decode(device, query, context):
    """Over a contiguous cache, which spares it the block table."""
    batch = query.shape[0]
    keys, values = (normal(device, batch, KV_HEADS, context, 128) for _ in range(2))
    dense = query[:, :, None]
    return lambda: torch.nn.functional.scaled_dot_product_attention(dense, keys, values, enable_gqa=True)


def sdpa_prefill(device, query, batch):
    dense = query.view(batch, -1, HEADS, 128).transpose(1, 2)
    keys, values = (normal(device, batch, KV_HEADS, dense.shape[2], 128) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(dense, keys, values, is_causal=True, enable_gqa=True)


def flex_prefill(device, query, batch):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    dense = query.view(batch, -1, HEADS, 128).transpose(1, 2).contiguous()
    length = dense.shape[2]
    keys, values = (normal(device, batch, KV_HEADS, length, 128) for _ in range(2))
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(dense, keys, values, block_mask=mask, enable_gqa=True)


def flashinfer_decode(query, cache, table, lengths):
    import flashinfer

    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(*flashinfer_pages(table, lengths), HEADS, KV_HEADS, 128, BLOCK, q_data_type=BF16, kv_data_type=BF16)
    return lambda: wrapper.run(query, (cache.keys, cache.values))


def flashinfer_prefill(query, cache, table, chunks):
    import flashinfer

    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    starts = ints(query.device, [sum(chunks[:i]) for i in range(len(chunks) + 1)])
    pages = flashinfer_pages(table, chunks)
    wrapper.plan(starts, *pages, HEADS, KV_HEADS, 128, BLOCK, causal=True, q_data_type=BF16, kv_data_type=BF16)
    return lambda: wrapper.run(query, (cache.keys, cache.values))


def flashinfer_pages(table, lengths):
    """Its form of a block table: row starts, block ids in a row, and how full each last block is."""
    counts = [-(-length // BLOCK) for length in lengths]
    ids = torch.cat([table[row, :count] for row, count in enumerate(counts)])
    starts = ints(table.device, [sum(counts[:i]) for i in range(len(counts) + 1)])
    return starts, ids, ints(table.device, [(length - 1) % BLOCK + 1 for length in lengths])


# ---------------------------------------------------------------- inputs


def normal(device, *shape, dtype=BF16):
    return torch.randn(shape, dtype=dtype, device=device)


def ints(device, numbers: Sequence[int]):
    return torch.tensor(numbers, dtype=torch.int32).to(device)


def shuffled(device, count: int):
    return torch.randperm(count, dtype=torch.int32, device="cpu").to(device)


def poison(query):
    return torch.full_like(query, float("nan"))


def make_cache(device, num_blocks: int, dtype) -> KVCache:
    scaling = "tensor" if dtype.itemsize == 1 else "none"
    shape = {"block_size": BLOCK, "num_kv_heads": KV_HEADS, "key_dim": 128}
    cache = KVCache.allocate(num_blocks, **shape, dtype=dtype, scaling=scaling, device=device)
    if not cache.blocks.is_meta:
        for part in (cache.keys, cache.values):
            for first in range(0, num_blocks, 4096):
                chunk = part[first : first + 4096]
                chunk.copy_(torch.randn(chunk.shape, device=device))
    return cache


def paged(device, lengths: Sequence[int], dtype):
    """A cache just large enough and a table of shuffled blocks."""
    counts = [-(-length // BLOCK) for length in lengths]
    cache = make_cache(device, sum(counts), dtype)
    order = shuffled("cpu", cache.num_blocks)
    table = torch.zeros((len(lengths), max(counts)), dtype=torch.int32)
    used = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[used : used + count]
        used += count
    return cache, table.to(device)
