"""What runners that make vectors share: uneven texts in padded batches, and pooling. No torch, as ONNX needs none."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mxn.errors import OutOfMemoryError
from mxn.store.embedding import EmbeddingRecipe

CALL_TOKENS = 32
"""Padding tokens that a batch may hold before another call of the model is made for the shorter texts."""

Ids = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""(texts, tokens): token ids, or a mask that is 1 for real tokens and 0 for the padding on the right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderFacts:
    """What was loaded and how.

    is_joint: texts in one batch would change each other, so each is computed alone.
    """

    recipe: EmbeddingRecipe
    pad_id: int
    dimensions: int
    vocab_size: int
    max_context: int
    quantisation: str
    program: str
    threads: int
    weight_bytes: int
    is_joint: bool = False
    notes: tuple[str, ...]


def check_room(name: str, needed_bytes: int, free_bytes: int) -> None:
    """Raises: OutOfMemoryError when a model does not fit."""
    if needed_bytes > free_bytes:
        raise OutOfMemoryError(f"{name} needs {needed_bytes / 2**30:.2f} GiB, {free_bytes / 2**30:.2f} GiB is free")


class EncoderRunner(ABC):
    """Turns texts into vectors with one model; children say how the vectors of all tokens are computed."""

    def __init__(self, facts: EncoderFacts) -> None:
        self.facts = facts

    @abstractmethod
    def encode(self, ids: Ids, mask: Ids) -> np.ndarray:
        """Vectors of all tokens, (texts, tokens, size); those of the padding are never read."""

    @abstractmethod
    def close(self) -> None:
        """Gives the weights' memory back."""

    def embed(self, texts: Sequence[Sequence[int]]) -> list[bytes]:
        """One float32 vector per text, in order, little endian."""
        vectors = [b""] * len(texts)
        for group, ids, mask in padded_batches(texts, self.facts.pad_id, 1 if self.facts.is_joint else len(texts)):
            pooled = pool(self.encode(ids, mask), mask, self.facts.recipe)
            for row, i in enumerate(group):
                vectors[i] = pooled[row].astype("<f4").tobytes()
        return vectors

    def warm_up(self, max_step_tokens: int) -> tuple[tuple[str, ...], float]:
        """Embeds a short text and a step's worth of long ones; gives what was computed and the seconds it took."""
        start = time.perf_counter()
        longest = min(self.facts.max_context, max_step_tokens)
        num_long = max(1, max_step_tokens // longest)
        self.embed([[self.facts.pad_id] * 2])
        self.embed([[self.facts.pad_id] * longest] * num_long)
        return (f"{num_long} x {longest} tokens",), time.perf_counter() - start


def padded_batches(texts: Sequence[Sequence[int]], pad_id: int, max_texts: int) -> list[tuple[list[int], Ids, Ids]]:
    """(indices of the texts, their ids, mask) of each call, longest texts first, with little padding in each."""
    groups: list[list[int]] = []
    padding = 0
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        padding += len(texts[groups[-1][0]]) - len(texts[i]) if groups else 0
        if not groups or padding > CALL_TOKENS or len(groups[-1]) == max_texts:
            groups.append([])
            padding = 0
        groups[-1].append(i)
    batches = []
    for group in groups:
        ids = np.full((len(group), len(texts[group[0]])), pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, i in enumerate(group):
            ids[row, : len(texts[i])] = texts[i]
            mask[row, : len(texts[i])] = 1
        batches.append((group, ids, mask))
    return batches


def pool(hidden: np.ndarray, mask: Ids, recipe: EmbeddingRecipe) -> np.ndarray:
    """One vector per text out of (texts, tokens, size), over its real tokens only."""
    hidden = hidden.astype(np.float32, copy=False)
    real = mask[:, :, None] == 1
    if recipe.pooling == "cls":
        pooled = hidden[:, 0]
    elif recipe.pooling == "lasttoken":
        pooled = hidden[np.arange(len(hidden)), mask.sum(1) - 1]
    elif recipe.pooling == "max":
        pooled = hidden.max(1, where=real, initial=-np.inf)
    else:
        pooled = hidden.sum(1, where=real) / mask.sum(1, dtype=np.float32)[:, None]
    if recipe.is_normalised:
        pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
    return pooled
