"""Compares an attention backend with the torch reference on a model's own head shapes, before it serves anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mxn.attention.base import AttentionBackend, AttentionMetadata, LayerKV
from mxn.attention.reference import ReferenceAttention
from mxn.core.model import ModelSpec

_BLOCK_SIZE = 16
_NUM_BLOCKS = 8
_TOLERANCE, _INT8_TOLERANCE, _HALF_TOLERANCE = 5e-3, 3e-2, 4e-2
"""Relative to the largest output, for float32, for float32 over an int8 cache, and for half precision or an fp8 cache.
A float16 cache costs up to 1e-3, an int8 one 6e-3 to 9e-3 with heads of 16 to 256, bfloat16 outputs and weights 8e-3,
fp8 keys and values 3e-2; a wrong kernel is off by 0.1 and more."""

# Steps of three sequences: (tokens before, new tokens) each. Prompts, then a continued prompt beside two decodes.
_STEPS = (((0, 21), (0, 1), (0, 5)), ((21, 12), (1, 1), (5, 1)))
_TABLES = ([4, 1, 6], [0, 0, 0], [7, 0, 0])


def disagreement(
    make: Callable[[Sequence[LayerKV], int, int], AttentionBackend],
    spec: ModelSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kv_dtype: str = "fp16",
) -> str | None:
    """Where a backend differs from the reference for layers of this model, or None when it does not.

    Args: device, dtype: what the backend is given; the reference gets the same numbers as float32 on the host.
      kv_dtype: numbers of the backend's cache where it is given float32.
    """
    exact = _INT8_TOLERANCE if kv_dtype == "int8" else _TOLERANCE
    tolerance = exact if dtype is torch.float32 else _HALF_TOLERANCE
    windows = sorted({min(window, 9) for window in spec.layer_windows if window is not None})
    has_full = not spec.layer_windows or None in spec.layer_windows
    layers = [
        LayerKV(num_kv_heads=spec.num_kv_heads, key_dim=spec.key_dim, value_dim=spec.value_dim, window=window)
        for window in [*([None] if has_full else []), *windows[:1]]
    ]
    found, expected = make(layers, _NUM_BLOCKS, _BLOCK_SIZE), ReferenceAttention(layers, _NUM_BLOCKS, _BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    for step in _STEPS:
        meta = _metadata(step)
        for index, layer in enumerate(layers):
            shapes = (
                (spec.num_heads, spec.key_dim),
                (spec.num_kv_heads, spec.key_dim),
                (spec.num_kv_heads, spec.value_dim),
            )
            tensors = [torch.randn(heads, meta.num_tokens, dim, generator=generator).to(dtype) for heads, dim in shapes]
            options = {"scaling": spec.key_dim**-0.5, "window": layer.window}
            a = found.forward(index, *(tensor.to(device) for tensor in tensors), meta, **options).float().cpu()
            b = expected.forward(index, *(tensor.float() for tensor in tensors), meta, **options)
            error = float((a - b).abs().max() / b.abs().max())
            if not error <= tolerance:
                window = "full attention" if layer.window is None else f"a window of {layer.window}"
                return (
                    f"attention {found.name} differs from the torch reference by {error:.2g} of its scale with "
                    f"{spec.num_heads}/{spec.num_kv_heads} heads of {spec.key_dim} and {window}"
                )
    return None


def _metadata(step: Sequence[tuple[int, int]]) -> AttentionMetadata:
    starts, slots = [0], []
    for (before, new), table in zip(step, _TABLES, strict=True):
        starts.append(starts[-1] + new)
        slots += [table[p // _BLOCK_SIZE] * _BLOCK_SIZE + p % _BLOCK_SIZE for p in range(before, before + new)]

    def int32(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return AttentionMetadata(
        query_starts=int32(starts),
        context_lens=int32([before + new for before, new in step]),
        block_table=int32(_TABLES),
        slot_mapping=int32(slots),
        max_query_len=max(new for _, new in step),
    )
