"""What a model is, and how a deployment wants it loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["generate", "embed"]
"""What a model is for: continuing token sequences, or making one vector of each text."""

QuantisationName = Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8", "int4"]

_SLOT_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Architecture facts that memory planning and checks need; all counts, no tensors.

    architecture: transformers' `model_type` ("llama", "qwen3_moe", ...).
    layer_windows: per layer, tokens a query sees including itself, or None for full attention.
    num_active_parameters: parameters that one token uses (less than `num_parameters` for mixture of experts).
    max_context: tokens of a sequence, prompt and output together; tokens of a text where the task is to embed.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    max_context: int
    num_parameters: int | None
    num_active_parameters: int | None = None
    layer_windows: tuple[int | None, ...] = ()
    task: Task = "generate"

    def kv_bytes_per_token(self, bytes_per_element: float) -> float:
        """Bytes that one token occupies in the KV cache over all layers."""
        return self.num_layers * self.num_kv_heads * (self.key_dim + self.value_dim) * bytes_per_element


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model whose files are on this disk, ready to be loaded.

    name: the name clients ask for.
    folder: local folder in Hugging Face layout (config.json, tokenizer.json, *.safetensors).
    revision: content hash of the weights; part of the prefix cache's root.
    """

    name: str
    folder: str
    revision: str
    spec: ModelSpec
    licence: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSettings:
    """How a replica loads a model and runs it.

    quantisation: "auto" lets the backend choose; what it chose is in `ReplicaInfo`.
    context_length: longest prompt + output a sequence may have; None means the model's own limit.
    kv_bytes: memory for the KV cache; None means "auto", a figure the backend computes and prints.
    max_num_seqs: sequences in one step at most. max_step_tokens: tokens computed in one step at most.
    threads: compute threads on a CPU; None lets the backend measure or decide.
    attention: name of an attention backend, or "auto".
    """

    quantisation: QuantisationName = "auto"
    context_length: int | None = None
    kv_bytes: int | None = None
    block_size: int = 16
    max_num_seqs: int = 64
    max_step_tokens: int = 512
    prefix_cache: bool = True
    threads: int | None = None
    attention: str = "auto"
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, low in (("block_size", 1), ("max_num_seqs", 1), ("max_step_tokens", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")

    def auto_kv_tokens(self, max_context: int) -> int:
        """Tokens an "auto" KV cache is made for: every sequence at 1,024 tokens, or two at full length if that is more.

        More would help only if all sequences were long at once; then some wait, and none fails.
        """
        return max(self.max_num_seqs * min(max_context, 1024), min(self.max_num_seqs, 2) * max_context)

    def divide_slots(self, max_context: int, kv_tokens: int) -> tuple[int, int]:
        """(slots, tokens of each) of a KV cache of `kv_tokens` tokens that gives each sequence one whole slot.

        A set `context_length` is the length. Otherwise slots hold 2,048 tokens or more, so that many sequences run at
        once: a few slots of a model's whole context would make the others wait. No slots when not even one fits.
        """
        if self.context_length is not None:
            length = min(self.context_length, max_context)
            return min(kv_tokens // length, self.max_num_seqs), length
        shortest = min(max_context, _SLOT_TOKENS)
        num_slots = min(kv_tokens // shortest, self.max_num_seqs)
        return num_slots, min(max_context, kv_tokens // num_slots) if num_slots else shortest
