"""A decoder in plain numpy that backends are compared with: one sequence, no cache, float64, nothing clever.

Covers llama, mistral, qwen2 and qwen3; the project's tests compare it with transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mxn.conformance.tiny_models import ARCHITECTURES, read_safetensors
from mxn.errors import UnsupportedModelError

Floats = npt.NDArray[np.float64]


class Reference:
    """A model's next-token log probabilities after every prefix of a sequence."""

    def __init__(self, folder: Path) -> None:
        """Raises: UnsupportedModelError when the folder's architecture is not one the reference covers."""
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        kind = self.config["model_type"]
        if kind not in ARCHITECTURES or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UnsupportedModelError(f"the reference covers {', '.join(ARCHITECTURES)} with plain RoPE, not {kind}")
        self._theta = float(rope.get("rope_theta", self.config.get("rope_theta", 10000.0)))
        self._weights = {
            name: weight.astype(np.float64)
            for path in sorted(folder.glob("*.safetensors"))
            for name, weight in read_safetensors(path).items()
        }

    def logprobs(self, token_ids: Sequence[int]) -> Floats:
        """Log probabilities, (tokens, vocabulary): row i is what follows `token_ids[: i + 1]`."""
        config, weights = self.config, self._weights
        x = weights["model.embed_tokens.weight"][np.asarray(token_ids)]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(self._norm(x, prefix + "input_layernorm"), prefix + "self_attn.")
            y = self._norm(x, prefix + "post_attention_layernorm")
            gate, up = (self._linear(y, f"{prefix}mlp.{name}_proj") for name in ("gate", "up"))
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, prefix + "mlp.down_proj")
        is_tied = "lm_head.weight" not in weights
        logits = self._norm(x, "model.norm") @ weights["model.embed_tokens.weight" if is_tied else "lm_head.weight"].T
        logits -= logits.max(-1, keepdims=True)
        result: Floats = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return result

    def _attention(self, x: Floats, prefix: str) -> Floats:
        config, length = self.config, len(x)
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        q, k, v = (self._linear(x, f"{prefix}{name}_proj").reshape(length, -1, head_dim) for name in "qkv")
        if prefix + "q_norm.weight" in self._weights:
            q, k = self._norm(q, prefix + "q_norm"), self._norm(k, prefix + "k_norm")
        q, k = self._rotate(q), self._rotate(k)
        k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
        distance = np.arange(length)[:, None] - np.arange(length)
        is_seen = (distance >= 0) & (distance < (self._window() or length))
        scores = np.where(is_seen, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim), -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return self._linear(np.einsum("hqk,khd->qhd", shares, v).reshape(length, -1), prefix + "o_proj")

    def _window(self) -> int | None:
        """Tokens a query sees; mistral's only, as the others use theirs on demand."""
        return self.config.get("sliding_window") if self.config["model_type"] == "mistral" else None

    def _rotate(self, x: Floats) -> Floats:
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * self._theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def _norm(self, x: Floats, name: str) -> Floats:
        scale: Floats = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x * scale * self._weights[name + ".weight"]

    def _linear(self, x: Floats, name: str) -> Floats:
        y: Floats = x @ self._weights[name + ".weight"].T
        return y + self._weights[name + ".bias"] if name + ".bias" in self._weights else y
