"""Loads a transformers decoder on a torch device and runs it one step at a time over a paged KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mxn.attention.base import AttentionBackend, LayerKV
from mxn.core.batch import SequenceStep, StepBatch, StepResult
from mxn.core.model import LoadSettings, Model
from mxn.core.request import SamplingParams, TokenLogprob
from mxn.errors import ConfigError, OutOfMemoryError
from mxn.runner.attention_hook import discover_layers
from mxn.runner.forward import ForwardProgram, ModuleForward
from mxn.runner.inputs import StepInputs, build_inputs
from mxn.runner.loading import LoadProgress, load_config, load_model
from mxn.runner.rotation import fix_rotation, fixed_context
from mxn.runner.sampler import NOT_FINITE, prompt_logprobs, sample, take
from mxn.runner.self_test import check_architecture
from mxn.store.spec import layer_windows

ForwardFactory = Callable[[PreTrainedModel, AttentionBackend, Sequence[int | None]], ForwardProgram]
_GIB = 2**30


def module_forward(
    model: PreTrainedModel, attention: AttentionBackend, windows: Sequence[int | None]
) -> ForwardProgram:
    """The default program: transformers' own modules."""
    return ModuleForward(model, attention, windows)


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What a backend decided before loading.

    dtype: what weights are loaded as; None for what the files hold. quantise: rewrites the loaded model in place and
      answers with notes, or None.
    make_attention, block_bytes: like an `AttentionBackend` class and its `bytes_per_block`.
    free_bytes: memory the KV cache may be taken from, asked once the weights are loaded.
    takes_rest: whether an "auto" KV cache takes all of that, or no more than what the settings' sequences need.
    profile: sees the loaded model and its layers before the cache is made and answers with notes, or None.
    make_forward: builds the program that computes a step. make_runner: like `TorchRunner`, or None for it.
    notes: choices made so far, one sentence each.
    """

    device: str
    dtype: torch.dtype | None
    quantisation: str
    make_attention: Callable[[Sequence[LayerKV], int, int], AttentionBackend]
    block_bytes: Callable[[Sequence[LayerKV], int], int]
    free_bytes: Callable[[], int]
    quantise: Callable[[PreTrainedModel], Sequence[str]] | None = None
    takes_rest: bool = False
    profile: Callable[[PreTrainedModel, Sequence[LayerKV], Sequence[int | None]], Sequence[str]] | None = None
    make_forward: ForwardFactory = module_forward
    make_runner: Callable[..., TorchRunner] | None = None
    threads: int | None = None
    notes: tuple[str, ...] = ()


class TorchRunner:
    """A loaded model. Keeps nothing about sequences but the KV cache, so any step may hold any of them."""

    def __init__(
        self,
        *,
        plan: LoadPlan,
        forward: ForwardProgram,
        attention: AttentionBackend,
        vocab_size: int,
        max_context: int,
        max_step_tokens: int,
        weight_bytes: int,
        kv_bytes: int,
        notes: Sequence[str],
    ) -> None:
        self.device, self.quantisation, self.threads = plan.device, plan.quantisation, plan.threads
        self.attention_name, self.program = attention.name, forward.name
        self.num_blocks, self.block_size = attention.num_blocks, attention.block_size
        self.vocab_size, self.max_context = vocab_size, max_context
        self.weight_bytes, self.kv_bytes = weight_bytes, kv_bytes
        self.notes = tuple(notes)
        self._device = torch.device(plan.device)
        self._max_step_tokens = max_step_tokens
        self._forward: ForwardProgram | None = forward
        self._attention: AttentionBackend | None = attention

    @torch.inference_mode()
    def execute(self, batch: StepBatch) -> StepResult:
        """Computes one step; see `mxn.backends.base.Executor.execute`."""
        if self._forward is None:
            raise ConfigError("the model was closed; load it again")
        if not batch.sequences:
            return StepResult(tokens=())
        inputs = build_inputs(batch, self.block_size, self._device)
        try:
            if all(step.sampling.is_plain_greedy for step in batch.sequences):  # logits need not leave the program
                drawn = take(*self._forward.greedy(inputs), [step for step in batch.sequences if step.is_sampled])
                return StepResult(tokens=drawn.tokens, failed=drawn.failed)
            logits = self._forward(inputs)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(str(error)) from error
        except RuntimeError as error:  # what the CPU allocator raises has no class of its own
            if "can't allocate memory" in str(error):
                raise OutOfMemoryError(f"a step of {batch.num_tokens} tokens did not fit: {error}") from error
            raise
        return finish_step(logits, inputs, batch.sequences)

    @torch.inference_mode()
    def logits(self, batch: StepBatch) -> torch.Tensor:
        """Computes a step and answers with the logits that its sequences ask for, for comparisons."""
        return self._forward(build_inputs(batch, self.block_size, self._device)).float().clone()

    @torch.inference_mode()
    def copy_kv(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copies KV blocks (source id, destination id) in order, over all layers."""
        if self._attention is not None:
            self._attention.copy_blocks(moves)

    def warm_up(self) -> tuple[tuple[str, ...], float]:
        """Runs the shapes that requests will bring, over blocks nobody holds yet. Returns names and seconds."""
        started_s = time.perf_counter()
        shapes = [(1, 1), (min(8, self.num_blocks), 1)]
        longest = min(self._max_step_tokens, self.max_context, self.num_blocks * self.block_size)
        shapes.append((1, longest))
        for num_seqs, num_tokens in shapes:
            self.execute(dummy_batch(num_seqs, num_tokens, self.block_size))
            self.execute(dummy_batch(num_seqs, num_tokens, self.block_size))
        names = tuple(f"{num_seqs} x {num_tokens} tokens" for num_seqs, num_tokens in shapes)
        return names, time.perf_counter() - started_s

    def close(self) -> None:
        """Drops weights and KV cache. Safe to call twice."""
        self._forward = None
        self._attention = None


@torch.inference_mode()
def load_runner(model: Model, settings: LoadSettings, plan: LoadPlan, progress: LoadProgress) -> TorchRunner:
    """Checks the architecture, loads and quantises the weights, and makes the KV cache.

    Raises: UnsupportedModelError, ModelError, OutOfMemoryError, ConfigError; each with found, expected and what to do.
    """
    config = load_config(model.folder)
    progress("self-test", 0.0)
    check_architecture(config)
    progress("self-test", 1.0)
    limit = model.spec.max_context
    if settings.context_length is not None and settings.context_length > limit:
        raise ConfigError(f"context_length {settings.context_length} is over the {limit} tokens {model.name} can hold")
    max_context, context_note = fixed_context(config, settings.context_length, limit)

    loaded = load_model(model.folder, config, dtype=plan.dtype, device=plan.device, progress=progress)
    notes = [*plan.notes, *([context_note] if context_note else [])]
    fix_rotation(loaded, config, max_context)
    if plan.quantise is not None:
        progress("quantise", 0.0)
        notes += plan.quantise(loaded)
        progress("quantise", 1.0)

    windows = layer_windows(config.to_dict())
    layers = discover_layers(loaded, windows)
    if plan.profile is not None:
        progress("profile", 0.0)
        notes += plan.profile(loaded, layers, windows)
        progress("profile", 1.0)
    progress("kv-cache", 0.0)
    attention, kv_bytes, kv_notes = _make_cache(layers, max_context, settings, plan)
    progress("kv-cache", 1.0)
    forward = plan.make_forward(loaded, attention, windows)
    notes += kv_notes
    return (plan.make_runner or TorchRunner)(
        plan=plan,
        forward=forward,
        attention=attention,
        vocab_size=int(config.vocab_size),
        max_context=min(max_context, attention.num_blocks * settings.block_size),
        max_step_tokens=settings.max_step_tokens,
        weight_bytes=tensor_bytes(loaded),
        kv_bytes=kv_bytes,
        notes=(*notes, "; ".join(filter(None, (f"forward: {forward.name}", forward.detail)))),
    )


def dummy_batch(num_seqs: int, num_tokens: int, block_size: int) -> StepBatch:
    """New sequences of so many tokens each, greedily sampled, over the first blocks of the cache."""
    blocks_each = -(-num_tokens // block_size)
    return StepBatch(
        step_id=0,
        sequences=tuple(
            SequenceStep(
                seq_id=index,
                token_ids=[0] * num_tokens,
                start=0,
                block_ids=range(index * blocks_each, (index + 1) * blocks_each),
                is_sampled=True,
                sampling=SamplingParams(temperature=0.0),
                seed=0,
                num_prompt_tokens=num_tokens,
                num_output_tokens=0,
            )
            for index in range(num_seqs)
        ),
    )


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared storage counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def _make_cache(
    layers: Sequence[LayerKV], max_context: int, settings: LoadSettings, plan: LoadPlan
) -> tuple[AttentionBackend, int, list[str]]:
    """The attention backend with its cache, its bytes, and notes on its size."""
    block_bytes = plan.block_bytes(layers, settings.block_size)
    blocks_each = -(-max_context // settings.block_size)
    wanted = -(-settings.auto_kv_tokens(max_context) // settings.block_size) * block_bytes
    budget = settings.kv_bytes
    if budget is None:
        budget = plan.free_bytes() if plan.takes_rest else min(plan.free_bytes(), wanted)
    num_blocks = budget // block_bytes
    source = "auto" if settings.kv_bytes is None else "set"
    if num_blocks < 1:
        raise OutOfMemoryError(
            f"a KV budget of {budget / _GIB:.2f} GiB ({source}) is less than one block of {settings.block_size} tokens "
            f"({block_bytes / _GIB:.2f} GiB): give kv_bytes more, or free memory"
        )
    notes = [
        f"KV cache {num_blocks * block_bytes / _GIB:.2f} GiB ({source}): {num_blocks} blocks of {settings.block_size} "
        f"tokens, {num_blocks / blocks_each:.1f} contexts of {max_context} tokens"
    ]
    if num_blocks < blocks_each:
        notes.append(f"context held at {num_blocks * settings.block_size} tokens: the KV budget holds no more")
    try:
        attention = plan.make_attention(layers, num_blocks, settings.block_size)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        raise OutOfMemoryError(
            f"a KV cache of {num_blocks * block_bytes / _GIB:.2f} GiB did not fit: {error}"
        ) from error
    return attention, num_blocks * block_bytes, notes


def finish_step(logits: torch.Tensor, inputs: StepInputs, sequences: Sequence[SequenceStep]) -> StepResult:
    """Prompt logprobs and drawn tokens out of a step's logits."""
    ranges = inputs.row_ranges
    sampled = [index for index, sequence in enumerate(sequences) if sequence.is_sampled]
    failed: dict[int, str] = {}
    prompts: list[tuple[int, tuple[TokenLogprob, ...]]] = []
    for sequence, (first, last) in zip(sequences, ranges, strict=True):
        if sequence.sampling.num_prompt_logprobs is not None and last > first:
            if bool(torch.isfinite(logits[first:last].amax(-1)).all()):
                prompts.append((sequence.seq_id, prompt_logprobs(logits[first:last], sequence)))
            else:
                failed[sequence.seq_id] = NOT_FINITE
    if not sampled:
        return StepResult(tokens=(), prompt_logprobs=tuple(prompts), failed=tuple(failed.items()))
    rows = [ranges[index][1] - 1 for index in sampled]
    if len(rows) < logits.shape[0]:
        logits = logits[rows]
    drawn = sample(logits, [sequences[index] for index in sampled])
    failed |= dict(drawn.failed)
    tokens = tuple(token for token in drawn.tokens if token.seq_id not in failed) if failed else drawn.tokens
    return StepResult(tokens=tokens, prompt_logprobs=tuple(prompts), failed=tuple(failed.items()))
