"""The C++ attention backend against the plain-torch one, step after step over one cache."""

from __future__ import annotations

import pytest
import torch

from mxn.attention.base import AttentionMetadata, LayerKV
from mxn.attention.paged import PagedCpuAttention, prepare_cpu_kernels
from mxn.attention.reference import ReferenceAttention
from mxn.errors import KernelUnavailableError

pytestmark = pytest.mark.torch

LAYERS = (
    LayerKV(num_kv_heads=2, key_dim=24, value_dim=24),
    LayerKV(num_kv_heads=1, key_dim=40, value_dim=20, window=9),
)


@pytest.fixture(autouse=True)
def _kernels() -> None:
    try:
        prepare_cpu_kernels()
    except KernelUnavailableError as error:
        pytest.skip(str(error))


def metadata(steps: list[tuple[list[int], int, int]], block_size: int = 16) -> AttentionMetadata:
    """steps: (block ids, tokens before, new tokens) per sequence."""
    width = max(len(blocks) for blocks, _, _ in steps)
    slots = [
        blocks[p // block_size] * block_size + p % block_size
        for blocks, before, new in steps
        for p in range(before, before + new)
    ]
    i32 = {"dtype": torch.int32}
    return AttentionMetadata(
        query_starts=torch.tensor([0, *(new for _, _, new in steps)]).cumsum(0).int(),
        context_lens=torch.tensor([before + new for _, before, new in steps], **i32),
        block_table=torch.tensor([blocks + [0] * (width - len(blocks)) for blocks, _, _ in steps], **i32),
        slot_mapping=torch.tensor(slots, **i32),
        max_query_len=max(new for _, _, new in steps),
    )


def operands(layer: LayerKV, tokens: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, layer.key_dim), (layer.num_kv_heads, layer.key_dim), (layer.num_kv_heads, layer.value_dim))
    return [torch.randn(tokens, *shape, generator=generator).transpose(0, 1) for shape in shapes]


def test_equals_the_reference_over_steps_and_block_copies() -> None:
    found = PagedCpuAttention(LAYERS, 12, 16, threads=2)
    expected = ReferenceAttention(LAYERS, 12, 16)
    steps = [
        metadata([([3, 7], 0, 20), ([1], 0, 1)]),
        metadata([([3, 7], 20, 1), ([1], 1, 5), ([9, 2, 4], 0, 40)]),
        metadata([([3, 7], 21, 1), ([1], 6, 1), ([9, 2, 4], 40, 1)]),
        metadata([([3, 11], 21, 1), ([10], 6, 3)]),
    ]
    for number, meta in enumerate(steps):
        if number == 3:
            for backend in (found, expected):
                backend.copy_blocks([(7, 11), (1, 10)])
        for index, layer in enumerate(LAYERS):
            rows = operands(layer, meta.num_tokens, 10 * number + index)
            options = {"scaling": 0.2, "window": layer.window, "softcap": 30.0 if index else None}
            options["sinks"] = torch.randn(4, generator=torch.Generator().manual_seed(0)) if index else None
            # The cache here is half precision (11 bits), the reference's is float32.
            torch.testing.assert_close(
                found.forward(index, *rows, meta, **options),
                expected.forward(index, *rows, meta, **options),
                rtol=0,
                atol=5e-3,
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_answers_in_the_dtype_of_the_query(dtype: torch.dtype) -> None:
    backend = PagedCpuAttention(LAYERS, 4, 16, threads=1)
    rows = [tensor.to(dtype) for tensor in operands(LAYERS[0], 5, 0)]
    out = backend.forward(0, *rows, metadata([([2], 0, 5)]), scaling=0.2, window=None)
    assert out.dtype is dtype
    assert out.shape == (5, 4, 24)


def test_any_strides_are_taken() -> None:
    backend = PagedCpuAttention(LAYERS, 4, 16, threads=1)
    meta = metadata([([2], 0, 5)])
    rows = operands(LAYERS[0], 5, 0)
    twisted = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in rows]
    assert twisted[0].stride(-1) != 1
    first = backend.forward(0, *rows, meta, scaling=0.2, window=None)
    assert torch.equal(first, backend.forward(0, *twisted, meta, scaling=0.2, window=None))


def test_block_outside_the_cache_is_refused() -> None:
    backend = PagedCpuAttention(LAYERS, 4, 16, threads=1)
    with pytest.raises(ValueError, match="names block 4; blocks are 0 to 4"):
        backend.forward(0, *operands(LAYERS[0], 1, 0), metadata([([4], 0, 1)]), scaling=0.2, window=None)


def test_bytes_per_block_counts_every_layer() -> None:
    backend = PagedCpuAttention(LAYERS, 5, 32, threads=1)
    stored = sum(t.numel() * t.element_size() for cache in backend.caches for t in (cache.keys, cache.values))
    assert PagedCpuAttention.bytes_per_block(LAYERS, 32) * 5 == stored


def test_unfit_instruction_set_is_an_error_for_users() -> None:
    with pytest.raises(KernelUnavailableError, match="'neon' is not available"):
        PagedCpuAttention(LAYERS, 4, 16, threads=1, isa="neon")
