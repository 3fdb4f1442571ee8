"""Reads a decoder's structure from its own modules and from one observed pass, for the step program.

Names of modules say what is a norm, a projection, a gate; everything else is taken from what a pass really did: the
arguments that reached attention, the rotary tables that reached each layer, the factor on the embedding. Nothing here
is trusted: `mxn.runner.program` compares the program with the modules before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from mxn_kernels.cpu_decoder import Activation, Decoder, Layer, Norm, Rotation
from mxn_kernels.int8_linear import Int8Weight
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from mxn.attention.base import AttentionBackend, AttentionMetadata
from mxn.attention.paged import PagedCpuAttention
from mxn.runner.experts import KernelExperts
from mxn.runner.forward import ModuleForward
from mxn.runner.inputs import StepInputs
from mxn.runner.quantise import KernelRMSNorm, PackedLinear

NORM_ROLES = {
    ("input_layernorm", "post_attention_layernorm"): ("before_attention", "before_mlp"),
    ("post_attention_layernorm", "post_feedforward_layernorm"): ("after_attention", "after_mlp"),
    ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm"): (
        "before_attention",
        "after_attention",
        "after_mlp",
        "before_mlp",
    ),
}
"""What the norms of a layer do, by the sorted names of all of them."""

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class NotRecognised(Exception):
    """Why a model has no step program. Caught where programs are chosen."""


@dataclass(kw_only=True)
class LayerPass:
    """What one layer was given and gave in a pass. Hidden states are (T, hidden size)."""

    hidden_in: torch.Tensor
    hidden_out: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(kw_only=True)
class RotaryCall:
    """One call of a rotary module, so that it can be made again for other positions."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cos: torch.Tensor
    sin: torch.Tensor

    def table(self, num_positions: int, seen: torch.Tensor) -> Rotation:
        """cos and sin of positions 0 to `num_positions`. Args: seen: the positions of the observed call, (1, T)."""
        positions = torch.arange(num_positions)[None]
        args = [positions if _is_positions(a) else a for a in self.args]
        kwargs = {name: positions if _is_positions(a) else a for name, a in self.kwargs.items()}
        halves = []
        for whole, observed in zip(self.module(*args, **kwargs), (self.cos, self.sin), strict=True):
            rows, width = whole[0].float(), whole.shape[-1]
            if not torch.equal(rows[seen[0]], observed[0].float()):
                raise NotRecognised("its rotary embeddings depend on more than the position")
            # Most tables repeat themselves for the other half of a head; GPT-OSS's hold one half only.
            is_doubled = width % 2 == 0 and torch.equal(rows[:, : width // 2], rows[:, width // 2 :])
            halves.append(rows[:, : width // 2 if is_doubled else width].contiguous())
        return Rotation(cos=halves[0], sin=halves[1])


@dataclass(kw_only=True)
class Observation:
    """One pass of the model's own modules."""

    inputs: StepInputs
    layers: list[LayerPass] = field(default_factory=list)
    rotary: list[RotaryCall] = field(default_factory=list)
    attention: dict[int, dict[str, Any]] = field(default_factory=dict)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class _Watched(AttentionBackend):
    """Another attention backend, with a note of the arguments of each layer's call."""

    name = "watched"

    def __init__(self, real: AttentionBackend, calls: dict[int, dict[str, Any]]) -> None:
        super().__init__(real.layers, real.num_blocks, real.block_size)
        self._real, self._calls = real, calls

    @classmethod
    def bytes_per_block(cls, layers: Sequence[Any], block_size: int) -> int:
        return 0  # it has no cache of its own

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: AttentionMetadata,
        **options: Any,
    ) -> torch.Tensor:
        self._calls[layer] = {"num_heads": query.shape[0], **options}
        return self._real.forward(layer, query, key, value, meta, **options)

    def copy_blocks(self, moves: Sequence[tuple[int, int]]) -> None:
        self._real.copy_blocks(moves)


def observe(
    model: PreTrainedModel, attention: AttentionBackend, windows: Sequence[int | None], inputs: StepInputs
) -> Observation:
    """Runs the model's own modules once, writing keys and values to the cache. Raises: NotRecognised."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != len(windows):
        raise NotRecognised(f"{type(model).__name__} has no list of one module per attention layer")
    seen = Observation(inputs=inputs)
    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.register_forward_hook(_note_layer(seen), with_kwargs=True)
            hooks.callback(hook.remove)
        for module in model.modules():
            if "RotaryEmbedding" in type(module).__name__:
                hooks.callback(module.register_forward_hook(_note_rotary(seen), with_kwargs=True).remove)
        logits = ModuleForward(model, _Watched(attention, seen.attention), windows)(inputs)
    seen.logits = logits.float().clone()
    for below, above in zip(seen.layers, seen.layers[1:], strict=False):
        if not torch.equal(below.hidden_out, above.hidden_in):
            raise NotRecognised("something happens between its layers")
    return seen


def _note_layer(seen: Observation) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        out = output[0] if isinstance(output, tuple) else output
        seen.layers.append(
            LayerPass(
                hidden_in=hidden[0].clone(), hidden_out=out[0].clone(), rotation=kwargs.get("position_embeddings")
            )
        )

    return note


def _note_rotary(seen: Observation) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2:
            call = RotaryCall(module=module, args=args, kwargs=kwargs, cos=output[0], sin=output[1])
            seen.rotary.append(call)

    return note


def _is_positions(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.dtype is torch.int64


def recognise(model: PreTrainedModel, attention: PagedCpuAttention, seen: Observation, num_positions: int) -> Decoder:
    """The model as one description over its own packed weights and the backend's caches.

    Args: num_positions: how many positions rotary tables hold. Raises: NotRecognised naming what has no place in it.
    """
    base, head = model.base_model, model.get_output_embeddings()
    tables: dict[int, Rotation] = {}
    for call in seen.rotary:
        tables[call.cos.data_ptr()] = call.table(num_positions, seen.inputs.positions)
    layers = []
    for index, module in enumerate(base.layers):
        try:
            layers.append(_layer(module, attention, index, seen, tables))
        except NotRecognised as reason:
            raise NotRecognised(f"layer {index}: {reason}") from reason
    config, embedding = model.config, model.get_input_embeddings().weight
    return Decoder(
        embedding=embedding.detach(),
        embedding_scale=_embedding_scale(embedding, seen),
        layers=tuple(layers),
        final_norm=_norm(getattr(base, "norm", None), "the final norm"),
        head=_weight(head, "the output head"),
        logit_factor=1.0 / (getattr(config, "logits_scaling", None) or 1.0),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _layer(
    module: nn.Module, attention: PagedCpuAttention, index: int, seen: Observation, tables: dict[int, Rotation]
) -> Layer:
    parts = _children(module)
    self_attn, mlp = (_part(parts, name) for name in ("self_attn", "mlp"))
    norms = {role: _norm(parts[name], name) for name, role in norm_roles(module).items()}
    options = dict(seen.attention[index])
    sinks = options.pop("sinks", None)
    if not getattr(self_attn, "use_rope", True):
        rotation = None
    else:
        cos = seen.layers[index].rotation
        rotation = tables.get(cos[0].data_ptr()) if isinstance(cos, tuple) else None
        if rotation is None:
            raise NotRecognised("its positions are not rotary embeddings handed to the layer")
    return Layer(
        **_attention_parts(self_attn),
        **({} if has_experts(mlp) else _mlp_parts(mlp)),
        **norms,
        **options,
        cache=attention.caches[index],
        rotation=rotation,
        sinks=None if sinks is None else sinks.detach().float().contiguous(),
        residual_factor=float(getattr(module, "residual_multiplier", 1.0)),
    )


def norm_roles(layer: nn.Module) -> dict[str, str]:
    """What each norm of a layer does, by name. Raises: NotRecognised naming the parts that are there."""
    names = tuple(sorted(set(_children(layer)) - {"self_attn", "mlp"}))
    if names not in NORM_ROLES:
        raise NotRecognised(f"its parts are attention, mlp, {', '.join(names)}")
    return dict(zip(names, NORM_ROLES[names], strict=True))


def has_experts(module: nn.Module) -> bool:
    """Whether an mlp is a mixture with packed experts: it stays a module of its own between programs of layers."""
    return any(isinstance(part, KernelExperts) for part in module.modules())


def _attention_parts(module: nn.Module) -> dict[str, Any]:
    parts = _children(module)
    fused = parts.pop("qkv_proj", None)
    projections = [fused] if fused is not None else [_part(parts, name) for name in ("q_proj", "k_proj", "v_proj")]
    out = _part(parts, "o_proj")
    norms = {role: parts.pop(name, None) for role, name in (("query_norm", "q_norm"), ("key_norm", "k_norm"))}
    _refuse_rest(parts, "attention")
    return {
        "qkv": tuple(_weight(projection, "an attention projection") for projection in projections),
        "out": _weight(out, "o_proj"),
        **{role: _norm(norm, role) for role, norm in norms.items() if norm is not None},
    }


def _mlp_parts(module: nn.Module) -> dict[str, Any]:
    parts = _children(module)
    down = _weight(_part(parts, "down_proj"), "down_proj")
    if "gate_up_proj" in parts:
        both = _weight(parts.pop("gate_up_proj"), "gate_up_proj")
        try:
            gate, up = both.channels(0, both.n // 2), both.channels(both.n // 2, both.n)
        except ValueError as error:
            raise NotRecognised(f"gate_up_proj cannot be halved: {error}") from error
    else:
        gate, up = (_weight(_part(parts, name), name) for name in ("gate_proj", "up_proj"))
    activation = _activation(module)
    _refuse_rest(parts, "mlp")
    return {"gate": gate, "up": up, "down": down, "activation": activation}


def _activation(module: nn.Module) -> Activation:
    """By value: what `act_fn` computes."""
    function = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    if not callable(function):
        raise NotRecognised("its mlp has no activation function")
    x = torch.linspace(-6, 6, 97)
    for name, known in _ACTIVATIONS.items():
        if torch.allclose(function(x), known(x), rtol=0, atol=1e-6):
            return name
    raise NotRecognised(f"its activation is {function}; known: {', '.join(_ACTIVATIONS)}")


def _embedding_scale(embedding: torch.Tensor, seen: Observation) -> float:
    rows, found = embedding[seen.inputs.token_ids[0]], seen.layers[0].hidden_in
    at = rows.abs().argmax()
    return float(found.flatten()[at] / rows.flatten()[at])


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Children that hold something; activations and dropout do not."""
    return {
        name: child
        for name, child in module.named_children()
        if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None
    }


def _part(parts: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in parts:
        raise NotRecognised(f"it has no {name}; it has {', '.join(parts) or 'no parts'}")
    return parts.pop(name)


def _refuse_rest(parts: dict[str, nn.Module], where: str) -> None:
    if parts:
        raise NotRecognised(f"its {where} also has {', '.join(parts)}")


def _weight(module: nn.Module | None, name: str) -> Int8Weight:
    if not isinstance(module, PackedLinear):
        raise NotRecognised(f"{name} is {type(module).__name__}, not packed")
    return module.packed


def _norm(module: nn.Module | None, name: str) -> Norm:
    if not isinstance(module, KernelRMSNorm):
        raise NotRecognised(f"{name} is {type(module).__name__}, not a root-mean-square norm")
    return Norm(weight=module.weight.detach(), eps=module.eps, offset=module.offset)
