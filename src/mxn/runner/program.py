"""The step program: a recognised int8 decoder computed in one C++ call per step instead of module by module.

What is compared before it is used: the quantised modules run two small steps (two prompts; then a chunk, a decode and a
new sequence) on the real weights and the real cache, and every part of the program (embedding, each layer, final norm
with head) gets the very inputs its counterpart got and must give the same. Both sides quantise alike, so right programs
differ only where a last bit tips a rounding. How far the quantised modules are from float32 is `quantise`'s check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from mxn_kernels.cpu import Workspace
from mxn_kernels.cpu_step import DecoderStep
from mxn_kernels.paged_attention import PagedBatch
from transformers import PreTrainedModel

from mxn.attention.base import AttentionBackend
from mxn.attention.paged import PagedCpuAttention
from mxn.core.batch import SequenceStep, StepBatch
from mxn.core.request import SamplingParams
from mxn.errors import OutOfMemoryError, UnsupportedModelError
from mxn.runner.forward import ForwardProgram, ModuleForward
from mxn.runner.inputs import StepInputs, build_inputs
from mxn.runner.recognise import NotRecognised, Observation, has_experts, norm_roles, observe, recognise
from mxn.runner.sampler import argmax
from mxn.store.spec import spec_from_config

MAX_ERROR = 0.01
"""Largest relative error (2-norm of a row) of a layer's change or of the logits. Right programs differ by 1e-7, or by
up to 1e-3 where a few of thousands of values round to another 127th; a wrong flag gives 0.1 and more."""

_KEPT_ROWS = 64

_STEPS = (((0, 0, 6), (1, 0, 9)), ((0, 6, 3), (1, 9, 1), (2, 0, 2)))
"""The two steps of the comparison: (sequence, first position, tokens)."""


class StepForward:
    """Runs a recognised decoder in one call per step, without the interpreter lock."""

    name = "step program"
    loose_order = ""

    def __init__(self, step: DecoderStep, error: float) -> None:
        """Args: error: how far it is from the modules, see `compare`."""
        self.detail = f"within {error:.1g} of transformers modules"
        self._step = step
        # Logits of decode steps go to memory that is kept: new pages for 32 rows would cost a millisecond each step.
        self._logits = torch.empty(_KEPT_ROWS, step.vocab_size)

    @property
    def workspace(self) -> Workspace:
        """What it computes with; another one may be set between steps."""
        return self._step.workspace

    @workspace.setter
    def workspace(self, workspace: Workspace) -> None:
        self._step.workspace = workspace

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        rows = inputs.logit_rows.shape[0]
        out = self._logits[:rows] if rows <= _KEPT_ROWS else None
        return _run(partial(self._step, out=out), inputs)

    def greedy(self, inputs: StepInputs) -> tuple[list[int], np.ndarray]:
        token_ids, best = _run(self._step.greedy, inputs)
        return token_ids.tolist(), best.numpy()


class LayerForward:
    """Runs a decoder with mixtures of experts: attention of a layer in one call, then its mixture as a module."""

    name = "layer programs"
    loose_order = "routers are products of floats, which torch sums in an order that changes with the rows of a step"

    def __init__(
        self, step: DecoderStep, mixtures: Sequence[Callable[[torch.Tensor], torch.Tensor] | None], error: float
    ) -> None:
        """Args: mixtures: per layer what follows its program, or None where that is all."""
        self.detail = f"experts by modules, within {error:.1g} of transformers modules"
        self._step, self._mixtures = step, tuple(mixtures)

    @property
    def workspace(self) -> Workspace:
        """What its programs compute with; another one may be set between steps."""
        return self._step.workspace

    @workspace.setter
    def workspace(self, workspace: Workspace) -> None:
        self._step.workspace = workspace

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        try:
            return self._logits(inputs)
        except MemoryError as error:
            raise OutOfMemoryError(str(error)) from error

    def greedy(self, inputs: StepInputs) -> tuple[list[int], np.ndarray]:
        return argmax(self(inputs))

    def _logits(self, inputs: StepInputs) -> torch.Tensor:
        batch, positions = _paged(inputs), inputs.positions[0]
        hidden = self._step.embed(inputs.token_ids[0], positions, batch)
        for layer, mixture in enumerate(self._mixtures):
            hidden = self._step.run_layer(layer, hidden, positions, batch)
            if mixture is not None:
                hidden = mixture(hidden)
        return self._step.project(hidden, positions, batch, inputs.logit_rows)


def choose_program(
    model: PreTrainedModel, attention: AttentionBackend, windows: Sequence[int | None], *, wanted: str
) -> ForwardProgram:
    """The step program if the model is recognised and the program agrees with it, else its modules, with the reason.

    Args: wanted: "auto", "modules" or "step". Raises: UnsupportedModelError with the reason when "step" cannot be had.
    """
    modules = ModuleForward(model, attention, windows)
    if wanted == "modules":
        return modules
    try:
        step, error = make_step(model, attention, windows)
    except NotRecognised as reason:
        if wanted == "step":
            raise UnsupportedModelError(f"no step program for {type(model).__name__}: {reason}") from reason
        modules.detail = f"no step program: {reason}"
        return modules
    mixtures = find_mixtures(model)
    return LayerForward(step, mixtures, error) if any(mixtures) else StepForward(step, error)


@torch.inference_mode()
def make_step(
    model: PreTrainedModel, attention: AttentionBackend, windows: Sequence[int | None]
) -> tuple[DecoderStep, float]:
    """Recognises a quantised model and compares. Uses the cache's first blocks, which nobody may hold yet.

    Returns: the program, and the largest error of any part. Raises: NotRecognised with the reason.
    """
    if not isinstance(attention, PagedCpuAttention):
        raise NotRecognised(f"it works with attention {PagedCpuAttention.name}, found {attention.name}")
    if attention.num_blocks <= len(_STEPS):
        raise NotRecognised(f"the comparison needs {len(_STEPS) + 1} KV blocks, found {attention.num_blocks}")
    vocab_size = model.get_input_embeddings().num_embeddings
    num_positions = min(
        attention.num_blocks * attention.block_size, spec_from_config(model.config.to_dict()).max_context
    )
    step, error = None, 0.0
    for number in range(len(_STEPS)):
        seen = observe(model, attention, windows, _inputs(number, vocab_size, attention.block_size))
        if step is None:
            try:
                step = DecoderStep(recognise(model, attention, seen, num_positions), attention.workspace)
            except ValueError as error:
                raise NotRecognised(str(error)) from error
        error = max(error, compare(step, seen, find_mixtures(model)))
    return step, error


def find_mixtures(model: PreTrainedModel) -> list[Callable[[torch.Tensor], torch.Tensor] | None]:
    """Per layer: from the hidden states (T, hidden size) after attention to those after its mixture of experts."""

    def mixture(layer: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
        mlp = getattr(layer, "mlp", None)
        if mlp is None or not has_experts(mlp):
            return None
        norms = {role: getattr(layer, name) for name, role in norm_roles(layer).items()}
        factor = float(getattr(layer, "residual_multiplier", 1.0))

        def run(hidden: torch.Tensor) -> torch.Tensor:
            x = norms["before_mlp"](hidden) if "before_mlp" in norms else hidden
            given = mlp(x[None])
            given = (given[0] if isinstance(given, tuple) else given).view_as(hidden)
            given = norms["after_mlp"](given) if "after_mlp" in norms else given
            return hidden + given * factor

        return run

    return [mixture(layer) for layer in model.base_model.layers]


def compare(
    step: DecoderStep,
    seen: Observation,
    mixtures: Sequence[Callable[[torch.Tensor], torch.Tensor] | None] | None = None,
) -> float:
    """Every part of the program against what the modules gave for the same input; the largest error.

    Raises: NotRecognised naming the part that differs by more than MAX_ERROR.
    """
    inputs = seen.inputs
    batch, positions = _paged(inputs), inputs.positions[0]
    embedded = step.embed(inputs.token_ids[0], positions, batch)
    errors = {"the embedding": _relative_error(embedded, seen.layers[0].hidden_in, 0)}
    for index, layer in enumerate(seen.layers):
        found = step.run_layer(index, layer.hidden_in, positions, batch)
        if mixtures is not None and mixtures[index] is not None:
            found = mixtures[index](found)
        errors[f"layer {index}"] = _relative_error(found, layer.hidden_out, layer.hidden_in)
    logits = step.project(seen.layers[-1].hidden_out, positions, batch, inputs.logit_rows)
    errors["the output head"] = _relative_error(logits, seen.logits, 0)
    for part, error in errors.items():
        if not error <= MAX_ERROR:
            raise NotRecognised(f"{part} computes something else: off by {error:.2g}, expected at most {MAX_ERROR:g}")
    return max(errors.values())


def _inputs(number: int, vocab_size: int, block_size: int) -> StepInputs:
    """Sequence i has block i; every token's logits are asked for."""
    generator = torch.Generator().manual_seed(number)
    sequences = tuple(
        SequenceStep(
            seq_id=seq,
            token_ids=torch.randint(vocab_size, (count,), generator=generator).tolist(),
            start=start,
            block_ids=[seq],
            is_sampled=False,
            sampling=SamplingParams(num_prompt_logprobs=0),
            seed=0,
            num_prompt_tokens=block_size,
            num_output_tokens=0,
        )
        for seq, start, count in _STEPS[number]
    )
    return build_inputs(StepBatch(step_id=0, sequences=sequences), block_size, torch.device("cpu"))


def _paged(inputs: StepInputs) -> PagedBatch:
    meta = inputs.attention
    return PagedBatch(meta.query_starts, meta.context_lens, meta.block_table, meta.slot_mapping)


def _run(step: Callable[..., Any], inputs: StepInputs) -> Any:
    try:
        return step(inputs.token_ids[0], inputs.positions[0], _paged(inputs), inputs.logit_rows)
    except MemoryError as error:
        raise OutOfMemoryError(str(error)) from error


def _relative_error(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor | int) -> float:
    """Of the worst row: one row of huge values must not hide another's error."""
    found, change = found.double(), expected.double() - base
    return float(((found - expected).norm(dim=-1) / change.norm(dim=-1).clamp(min=1e-30)).max())
