"""From a step's inputs to logits or likeliest tokens. One program per way of computing; the executor does not care."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from mxn.attention.base import AttentionBackend
from mxn.errors import UnsupportedModelError
from mxn.runner.attention_hook import AttentionCall
from mxn.runner.inputs import StepInputs
from mxn.runner.sampler import argmax


class ForwardProgram(Protocol):
    """Computes one step: writes the new tokens' keys and values and answers with logits.

    name: "step program", say; stamped on measurements. detail: what else a person may want to know of it, or "".
    loose_order: why a sequence's logits may differ in their last bits with what else is in a step, or "" where they
      never do.
    """

    name: str
    detail: str
    loose_order: str

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Logits (R, vocabulary) of `inputs.logit_rows`, any float dtype; they may be overwritten by the next call."""

    def greedy(self, inputs: StepInputs) -> tuple[list[int], np.ndarray]:
        """The same step, answered with each row's likeliest token and that token's logit.

        The logit is not finite where a row's logits hold NaN or infinity. See `sampler.argmax`.
        """


class ModuleForward:
    """Runs transformers' own modules with mxn's attention function."""

    name = "transformers modules"
    loose_order = "torch rounds SiLU, GELU and products of floats by where a row stands in a step"

    def __init__(self, model: PreTrainedModel, attention: AttentionBackend, windows: Sequence[int | None]) -> None:
        self.detail = ""
        self._model = model
        self._attention = attention
        self._windows = tuple(windows)
        self._slices_logits = model._supports_logits_to_keep()

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        call = AttentionCall(self._attention, inputs.attention, self._windows)
        model_inputs = {
            "input_ids": inputs.token_ids,
            "position_ids": inputs.positions,
            "use_cache": False,
            "mxn": call,
        }
        if not len(inputs.logit_rows):
            hidden = self._model.base_model(**model_inputs)[0]
            logits = hidden.new_empty(0, self._model.config.vocab_size)
        elif self._slices_logits:
            logits = self._model(**model_inputs, logits_to_keep=inputs.logit_rows).logits[0]
        else:  # what follows the head differs between models (softcap, scale), so the whole model runs
            logits = self._model(**model_inputs).logits[0, inputs.logit_rows]
        if call.num_calls != len(self._windows):
            raise UnsupportedModelError(
                f"{type(self._model).__name__} ran attention {call.num_calls} times in one pass, "
                f"expected {len(self._windows)}: once per layer"
            )
        return logits

    def greedy(self, inputs: StepInputs) -> tuple[list[int], np.ndarray]:
        return argmax(self(inputs))
