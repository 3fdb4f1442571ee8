"""Puts an encoder runner behind the embedder interface. Imports no library that computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mxn.backends.base import Embedder, ExecutorInfo, WarmUp

if TYPE_CHECKING:
    from mxn.runner.encoder import EncoderRunner


class EncoderEmbedder(Embedder):
    """A model that some library runs; the same for all of them."""

    def __init__(self, runner: EncoderRunner, max_step_tokens: int) -> None:
        facts = runner.facts
        self._runner = runner
        self._max_step_tokens = max_step_tokens
        self.dimensions = facts.dimensions
        self.info = ExecutorInfo(
            attention="the model's own",
            quantisation=facts.quantisation,
            device="cpu",
            threads=facts.threads,
            weight_bytes=facts.weight_bytes,
            kv_bytes=0,
            max_context=facts.max_context,
            vocab_size=facts.vocab_size,
            program=facts.program,
            notes=facts.notes,
        )

    def warm_up(self) -> WarmUp:
        shapes, seconds = self._runner.warm_up(self._max_step_tokens)
        return WarmUp(compiled=shapes, seconds=seconds, memory_bytes=self.info.weight_bytes)

    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        return self._runner.embed(batch)

    def close(self) -> None:
        self._runner.close()
