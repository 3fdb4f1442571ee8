"""Makes vectors of texts with transformers' model of any architecture that AutoModel knows, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from mxn.core.model import LoadSettings, Model
from mxn.errors import ConfigError, UnsupportedModelError
from mxn.runner.encoder import EncoderFacts, EncoderRunner, Ids, check_room
from mxn.runner.loading import LoadProgress, check_weight_files, count_weights, load_encoder
from mxn.store.embedding import read_recipe

_SPARE = 1.1
"""Room that loading needs beyond the weights themselves."""


class TorchEncoderRunner(EncoderRunner):
    """A transformers model called with padded batches."""

    def __init__(self, model: PreTrainedModel, facts: EncoderFacts) -> None:
        super().__init__(facts)
        self._model: PreTrainedModel | None = model

    @torch.inference_mode()
    def encode(self, ids: Ids, mask: Ids) -> np.ndarray:
        if self._model is None:
            raise RuntimeError("the runner is closed")
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return self._model(**given).last_hidden_state.numpy()

    def close(self) -> None:
        self._model = None


def load_embedding_runner(
    model: Model, settings: LoadSettings, *, cores: int, free_bytes: Callable[[], int], progress: LoadProgress
) -> TorchEncoderRunner:
    """Loads a model that embeds for this process's CPU cores.

    Raises: ConfigError for a setting it does not offer; ModelError; UnsupportedModelError; OutOfMemoryError.
    """
    if settings.quantisation not in ("auto", "fp32"):
        raise ConfigError(
            f'quantisation "{settings.quantisation}" is not offered for models that embed; available: auto, fp32'
        )
    if settings.options:
        raise ConfigError(f'the cpu backend has no option "{settings.options[0][0]}" for models that embed')
    recipe = read_recipe(Path(model.folder))
    if recipe is None:
        raise UnsupportedModelError(f"{model.folder}: no modules.json says how its token vectors become one")
    threads = settings.threads or cores
    torch.set_num_threads(threads)
    check_room(model.name, int(4 * _SPARE * count_weights(check_weight_files(model.folder))), free_bytes())
    module = load_encoder(model.folder, progress=progress)
    facts = EncoderFacts(
        recipe=recipe,
        pad_id=int(module.config.pad_token_id or 0),
        dimensions=int(module.config.hidden_size),
        vocab_size=int(module.config.vocab_size),
        max_context=min(settings.context_length or model.spec.max_context, model.spec.max_context),
        quantisation="fp32",
        program="transformers modules",
        threads=threads,
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in module.parameters()),
        notes=(f"numbers fp32; {recipe}", f"{threads} compute threads"),
    )
    return TorchEncoderRunner(module, facts)
