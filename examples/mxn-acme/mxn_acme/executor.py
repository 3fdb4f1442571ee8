"""Llama and Qwen2 in numpy over a paged KV cache in the chip's memory."""

import json
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from mxn.backends.base import Executor, ExecutorInfo, PagedKV, WarmUp
from mxn.core.batch import StepResult
from mxn.core.host_sampler import prompt_logprobs, sample
from mxn_acme.chip import X1


class AcmeExecutor(Executor):
    def __init__(self, model, settings, num_blocks, progress):
        self.chip, spec, folder = X1(), model.spec, Path(model.folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {}
        for name, tensor in (item for path in folder.glob("*.safetensors") for item in load_file(path).items()):
            self.weights[name] = self.chip.allocate(*tensor.shape)
            self.weights[name][...] = tensor
        progress("weights", 1.0)
        self.kv = PagedKV(num_blocks=num_blocks, block_size=settings.block_size)
        shape = (spec.num_layers, 2, num_blocks, settings.block_size, spec.num_kv_heads, spec.key_dim)
        self.cache = self.chip.allocate(*shape)
        context = min(settings.context_length or spec.max_context, spec.max_context)
        names = {"attention": "numpy", "quantisation": "fp32", "device": "acme-x1", "threads": None}
        sizes = {"weight_bytes": sum(w.nbytes for w in self.weights.values()), "kv_bytes": self.cache.nbytes}
        self.info = ExecutorInfo(**names, **sizes, max_context=context, vocab_size=spec.vocab_size)

    def warm_up(self):
        return WarmUp(compiled=(), seconds=0.0, memory_bytes=self.info.weight_bytes + self.info.kv_bytes)

    def execute(self, batch):
        start_s = time.monotonic()
        pairs = [(step, self._forward(step)) for step in batch.sequences]
        ends = [(step, rows[-1]) for step, rows in pairs if step.is_sampled]
        drawn = sample(np.reshape([row for _, row in ends], (-1, self.info.vocab_size)), [step for step, _ in ends])
        asked = [(step, rows) for step, rows in pairs if step.sampling.num_prompt_logprobs is not None]
        prompts = tuple((step.seq_id, prompt_logprobs(rows, step)) for step, rows in asked)
        self.chip.work(start_s, batch.num_tokens)
        return StepResult(tokens=drawn.tokens, prompt_logprobs=prompts, failed=drawn.failed)

    def copy_kv(self, copies):
        for copy in copies:
            self.cache[:, :, copy.destination, : copy.num_tokens] = self.cache[:, :, copy.source, : copy.num_tokens]

    def close(self):
        self.chip.free()

    def _forward(self, step):
        """Logits of the step's tokens, whose keys and values go into the cache."""
        end, size = step.start + len(step.token_ids), self.kv.block_size
        blocks, places = np.array(step.block_ids)[np.arange(end) // size], np.arange(end) % size
        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[list(step.token_ids)]
        for layer, cache in enumerate(self.cache):
            at = f"model.layers.{layer}."
            x = x + self._attention(self._norm(x, at + "input_layernorm"), at + "self_attn.", cache, blocks, places)
            y = self._norm(x, at + "post_attention_layernorm")
            gate, up = self._linear(y, at + "mlp.gate_proj"), self._linear(y, at + "mlp.up_proj")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, at + "mlp.down_proj")
        return self._norm(x, "model.norm") @ self.weights.get("lm_head.weight", embedding).T

    def _attention(self, x, at, cache, blocks, places):
        q, k, v = (self._linear(x, f"{at}{name}_proj").reshape(len(x), -1, cache.shape[-1]) for name in "qkv")
        positions = np.arange(len(blocks) - len(x), len(blocks))
        cache[:, blocks[positions], places[positions]] = self._rotate(k, positions), v
        k, v = (np.repeat(t, q.shape[1] // t.shape[1], axis=1) for t in cache[:, blocks, places])
        scores = np.einsum("qhd,khd->hqk", self._rotate(q, positions), k) / np.sqrt(cache.shape[-1])
        scores[:, positions[:, None] < np.arange(len(blocks))] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v)
        return self._linear(mixed.reshape(len(x), -1), at + "o_proj")

    def _rotate(self, x, positions):
        half = x.shape[-1] // 2
        angles = positions[:, None, None] * self.config.get("rope_theta", 1e4) ** (-np.arange(half) / half)
        a, b, cos, sin = x[..., :half], x[..., half:], np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def _norm(self, x, name):
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[name + ".weight"]

    def _linear(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0.0)
