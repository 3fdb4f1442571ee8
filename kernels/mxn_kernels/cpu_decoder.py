"""A decoder as the step program takes it: layers described over packed weights and caches, checked part by part."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch

from mxn_kernels.cpu_cache import LayerCache
from mxn_kernels.packed_linear import PackedWeight

Activation = Literal["silu", "gelu_tanh"]
_COMBINE = {"silu": 2, "gelu_tanh": 3}
_MAX_QKV = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """Root-mean-square norm over spans of the weight's length: the hidden size, a head, or all heads."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """Rotary tables (positions, dims / 2), float32; the first `dims` of a head are rotated, half against half."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One decoder layer. Norms and rotation are None where the model has none.

    qkv: q, k and v, or one weight that holds them in that order. window: tokens a query sees including itself.
    residual_factor: what a sublayer's result is multiplied with before it is added.
    gate, up, down: all None where the layer ends with its attention and something else computes the rest.
    """

    qkv: tuple[PackedWeight, ...]
    out: PackedWeight
    cache: LayerCache
    num_heads: int
    scaling: float
    gate: PackedWeight | None = None
    up: PackedWeight | None = None
    down: PackedWeight | None = None
    activation: Activation = "silu"
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    rotation: Rotation | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    residual_factor: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoder:
    """A decoder from token ids to logits. embedding: (vocabulary, hidden size) float32.

    Logits are multiplied by `logit_factor`, then capped to +-`logit_softcap` by tanh if that is set.
    """

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: PackedWeight
    embedding_scale: float = 1.0
    logit_factor: float = 1.0
    logit_softcap: float | None = None


def check_decoder(decoder: Decoder) -> None:
    """Raises: ValueError naming the first part of a decoder that does not fit the others."""
    hidden = decoder.embedding.shape[1]
    check_tensor("embedding", decoder.embedding, (decoder.head.n, hidden))
    _check_norm("final_norm", decoder.final_norm, hidden)
    _check_weight("head", decoder.head, (decoder.head.n, hidden))
    for index, layer in enumerate(decoder.layers):
        try:
            _check_layer(layer, hidden)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error


def _check_layer(layer: Layer, hidden: int) -> None:
    cache = layer.cache
    if layer.num_heads < 1 or layer.num_heads % cache.num_kv_heads:
        raise ValueError(f"heads must be a multiple of {cache.num_kv_heads} KV heads, found {layer.num_heads}")
    queries, keys = layer.num_heads * cache.key_dim, cache.num_kv_heads * cache.key_dim
    widths = (queries, keys, cache.num_kv_heads * cache.value_dim)
    if len(layer.qkv) == 1:
        widths = (sum(widths),)
    if len(layer.qkv) != len(widths):
        raise ValueError(f"qkv must be one weight or {_MAX_QKV}, found {len(layer.qkv)}")
    for weight, width in zip(layer.qkv, widths, strict=True):
        _check_weight("qkv", weight, (width, hidden))
    _check_weight("out", layer.out, (hidden, layer.num_heads * cache.value_dim))
    _check_mlp(layer, hidden)
    for name in ("before_attention", "after_attention", "before_mlp", "after_mlp"):
        _check_norm(name, getattr(layer, name), hidden)
    for name, width in (("query_norm", queries), ("key_norm", keys)):
        norm = getattr(layer, name)
        if norm is not None:
            _check_norm(name, norm, cache.key_dim if norm.weight.shape == (cache.key_dim,) else width)
    if layer.rotation is not None:
        cos, sin = layer.rotation.cos, layer.rotation.sin
        if cos.dim() != 2 or not 1 <= cos.shape[1] <= cache.key_dim // 2:
            raise ValueError(f"rotation must be (positions, at most {cache.key_dim // 2}), found {tuple(cos.shape)}")
        check_tensor("rotation.cos", cos, tuple(cos.shape))
        check_tensor("rotation.sin", sin, tuple(cos.shape))
    if layer.sinks is not None:
        check_tensor("sinks", layer.sinks, (layer.num_heads,))
    if layer.window is not None and layer.window < 1:
        raise ValueError(f"window must be None or at least 1, found {layer.window}")
    if layer.softcap is not None and not layer.softcap > 0:
        raise ValueError(f"softcap must be None or positive, found {layer.softcap}")
    if layer.activation not in _COMBINE:
        raise ValueError(f"activation must be one of {', '.join(_COMBINE)}, found {layer.activation}")


def _check_mlp(layer: Layer, hidden: int) -> None:
    missing = [name for name in ("gate", "up", "down") if getattr(layer, name) is None]
    if len(missing) == 3:
        return
    if missing:
        raise ValueError(f"gate, up and down must be there together, {', '.join(missing)} is not")
    for name in ("gate", "up"):
        _check_weight(name, getattr(layer, name), (layer.down.k, hidden))
    _check_weight("down", layer.down, (hidden, layer.down.k))


def _check_weight(name: str, weight: PackedWeight, shape: tuple[int, int]) -> None:
    if (weight.n, weight.k) != shape:
        raise ValueError(f"{name} must be {shape[0]} x {shape[1]}, found {weight.n} x {weight.k}")


def _check_norm(name: str, norm: Norm | None, width: int) -> None:
    if norm is not None:
        check_tensor(f"{name}.weight", norm.weight, (width,))


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype is not torch.float32 or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 {shape}, found {tensor.dtype} {tuple(tensor.shape)}")


# ---------------------------------------------------------------- the structures of step.h


class _Norm(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("width", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("offset", ctypes.c_float),
    ]


class _Rotation(ctypes.Structure):
    _fields_ = [
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("dims", ctypes.c_int32),
        ("positions", ctypes.c_int32),
    ]


_NORMS = ("before_attention", "query_norm", "key_norm", "after_attention", "before_mlp", "after_mlp")
_WEIGHTS = ("out", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, _Norm) for name in _NORMS],
        ("qkv", ctypes.c_void_p * _MAX_QKV),
        *[(name, ctypes.c_void_p) for name in (*_WEIGHTS, "cache", "sinks")],
        ("rotation", _Rotation),
        *[(name, ctypes.c_int32) for name in ("num_heads", "window")],
        *[(name, ctypes.c_float) for name in ("scaling", "softcap", "residual_factor")],
        ("activation", ctypes.c_int32),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("layers", "embedding", "head")],
        ("final_norm", _Norm),
        *[(name, ctypes.c_int32) for name in ("num_layers", "hidden_size", "vocab_size")],
        *[(name, ctypes.c_float) for name in ("embedding_scale", "logit_factor", "logit_softcap")],
    ]


def _norm_struct(norm: Norm | None) -> _Norm:
    return _Norm() if norm is None else _Norm(norm.weight.data_ptr(), norm.weight.shape[0], norm.eps, norm.offset)


def _layer_struct(layer: Layer) -> _Layer:
    rotation = _Rotation()
    if layer.rotation is not None:
        cos, sin = layer.rotation.cos, layer.rotation.sin
        rotation = _Rotation(cos.data_ptr(), sin.data_ptr(), 2 * cos.shape[1], cos.shape[0])
    return _Layer(
        *(_norm_struct(getattr(layer, name)) for name in _NORMS),
        (ctypes.c_void_p * _MAX_QKV)(*(weight.address for weight in layer.qkv)),
        *(None if weight is None else weight.address for weight in (getattr(layer, name) for name in _WEIGHTS)),
        layer.cache.address,
        None if layer.sinks is None else layer.sinks.data_ptr(),
        rotation,
        layer.num_heads,
        layer.window or 0,
        layer.scaling,
        layer.softcap or 0.0,
        layer.residual_factor,
        _COMBINE[layer.activation],
    )


def decoder_struct(decoder: Decoder) -> tuple[ctypes.Structure, object]:
    """The decoder for C++, and what must stay in memory as long; the decoder itself must, too."""
    layers = (_Layer * len(decoder.layers))(*map(_layer_struct, decoder.layers))
    struct = _Decoder(
        ctypes.addressof(layers),
        decoder.embedding.data_ptr(),
        decoder.head.address,
        _norm_struct(decoder.final_norm),
        len(decoder.layers),
        decoder.embedding.shape[1],
        decoder.head.n,
        decoder.embedding_scale,
        decoder.logit_factor,
        decoder.logit_softcap or 0.0,
    )
    return struct, layers
