"""Reference attention against attention written out densely, over every shape a step can have."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.attention.base import AttentionMetadata, LayerKV  # noqa: E402
from mxn.attention.reference import ReferenceAttention  # noqa: E402

pytestmark = pytest.mark.torch

BLOCK_SIZE = 4
NUM_BLOCKS = 16


def metadata(sequences: list[tuple[int, int, list[int]]]) -> AttentionMetadata:
    """From (tokens before, new tokens, block ids) of each sequence."""
    starts, slots = [0], []
    for before, new, blocks in sequences:
        starts.append(starts[-1] + new)
        slots += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(before, before + new)]
    widest = max(len(blocks) for *_, blocks in sequences)

    def int32(values: Any) -> Any:
        return torch.tensor(values, dtype=torch.int32)

    return AttentionMetadata(
        query_starts=int32(starts),
        context_lens=int32([before + new for before, new, _ in sequences]),
        block_table=int32([blocks + [0] * (widest - len(blocks)) for *_, blocks in sequences]),
        slot_mapping=int32(slots),
        max_query_len=max(new for _, new, _ in sequences),
    )


def dense(query: Any, key: Any, value: Any, *, scaling: float, window: Any, softcap: Any, sinks: Any) -> Any:
    """Attention of one whole sequence, (heads, tokens, dim) each, in float64. Returns (tokens, heads, value dim)."""
    group = query.shape[0] // key.shape[0]
    key, value = key.double().repeat_interleave(group, 0), value.double().repeat_interleave(group, 0)
    scores = query.double() @ key.transpose(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows, columns = torch.arange(query.shape[1])[:, None], torch.arange(query.shape[1])
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    weights = scores.masked_fill(hidden, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return ((weights / total) @ value).transpose(0, 1)


# Blocks of 4: one token, a full block, a block and one, three blocks and a half.
LENGTHS = (1, 4, 5, 14)
TABLES = ([9], [3, 0], [12, 1], [2, 15, 4, 7])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dims", [(16, 16), (24, 12)])
@pytest.mark.parametrize(
    "rules", [{}, {"window": 3}, {"window": 100}, {"softcap": 5.0}, {"sinks": True}, {"window": 5, "sinks": True}]
)
def test_chunks_and_decodes_equal_dense_attention(
    heads: tuple[int, int], dims: tuple[int, int], rules: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    num_heads, num_kv_heads = heads
    sinks = randn(num_heads) if rules.get("sinks") else None
    window, softcap = rules.get("window"), rules.get("softcap")
    attention = ReferenceAttention(
        [LayerKV(num_kv_heads=num_kv_heads, key_dim=dims[0], value_dim=dims[1], window=window)], NUM_BLOCKS, BLOCK_SIZE
    )
    for cache in (*attention.keys, *attention.values):
        cache.fill_(float("nan"))  # a slot that was never written must never be read
    tensors = [
        (randn(num_heads, n, dims[0]), randn(num_kv_heads, n, dims[0]), randn(num_kv_heads, n, dims[1]))
        for n in LENGTHS
    ]
    options = {"scaling": dims[0] ** -0.5, "window": window, "softcap": softcap, "sinks": sinks}
    expected = [dense(*three, **options) for three in tensors]
    done = [0] * len(LENGTHS)
    for chunk in (3, 1, 1, 2, 100):
        alive = [i for i, n in enumerate(LENGTHS) if done[i] < n]
        if not alive:
            break
        sizes = {i: min(chunk, LENGTHS[i] - done[i]) for i in alive}
        meta = metadata([(done[i], sizes[i], TABLES[i]) for i in alive])
        flat = [torch.cat([tensors[i][k][:, done[i] : done[i] + sizes[i]] for i in alive], 1) for k in range(3)]
        out = attention.forward(0, *flat, meta, **options)
        assert out.is_contiguous()
        at = 0
        for i in alive:
            found = out[at : at + sizes[i]].double()
            assert torch.allclose(found, expected[i][done[i] : done[i] + sizes[i]], atol=1e-5)
            at += sizes[i]
            done[i] += sizes[i]
    assert done == list(LENGTHS)


def one_layer(**options: Any) -> ReferenceAttention:
    return ReferenceAttention([LayerKV(num_kv_heads=1, key_dim=8, value_dim=8)], NUM_BLOCKS, BLOCK_SIZE, **options)


def test_slot_minus_one_is_not_written() -> None:
    attention = one_layer()
    meta = metadata([(0, 3, [5])])
    meta.slot_mapping[1] = -1
    ones = torch.ones(1, 3, 8)
    attention.forward(0, ones, ones, ones, meta, scaling=1.0, window=None)
    assert attention.keys[0][5, :, 0, 0].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_copied_blocks_hold_the_same_keys_and_values() -> None:
    attention = one_layer()
    attention.keys[0][2] = 3.0
    attention.values[0][2] = 4.0
    attention.copy_blocks([(2, 7), (7, 8)])
    assert attention.keys[0][8].unique().tolist() == [3.0]
    assert attention.values[0][8].unique().tolist() == [4.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_query(dtype: Any) -> None:
    attention = one_layer(dtype=dtype)
    assert attention.keys[0].dtype is dtype
    query = torch.randn(1, 6, 8, dtype=dtype)
    for rules in ({}, {"softcap": 4.0}, {"sinks": torch.zeros(1, dtype=dtype)}):
        meta = metadata([(0, 5, [0, 1]), (0, 1, [2])])
        out = attention.forward(0, query, query, query, meta, scaling=0.3, window=None, **rules)
        assert out.dtype is dtype


def test_bytes_per_block_are_what_is_allocated() -> None:
    layers = [LayerKV(num_kv_heads=2, key_dim=24, value_dim=12), LayerKV(num_kv_heads=1, key_dim=8, value_dim=8)]
    attention = ReferenceAttention(layers, NUM_BLOCKS, BLOCK_SIZE, dtype=torch.bfloat16)
    allocated = sum(t.numel() * t.element_size() for t in (*attention.keys, *attention.values))
    assert ReferenceAttention.bytes_per_block(layers, BLOCK_SIZE, dtype=torch.bfloat16) * NUM_BLOCKS == allocated


def test_wrong_shapes_are_named() -> None:
    attention = one_layer()
    good, bad = torch.zeros(1, 1, 8), torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match=r"key has shape \(1, 1, 4\), expected \(1, 1, 8\)"):
        attention.forward(0, good, bad, good, metadata([(0, 1, [0])]), scaling=1.0, window=None)
