"""Runs steps on a GPU: inputs made on the host, decode replayed as graphs, tokens drawn on the chip, one copy back.

Launching a step and waiting for it are two calls, so that the host can prepare the next one in between.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mxn.attention.base import AttentionMetadata, to_chip
from mxn.core.batch import SampledToken, SequenceStep, StepBatch, StepResult
from mxn.errors import ConfigError
from mxn.runner.accelerator import Accelerator, chip_errors
from mxn.runner.chip_sampler import MAX_VOCABULARY, RULES, draw, fill_rules
from mxn.runner.drawn import DrawnTokens
from mxn.runner.graphs import CapturedAttention, DecodeGraphs
from mxn.runner.inputs import StepInputs, build_inputs
from mxn.runner.sampler import NOT_FINITE, Sampled, sample
from mxn.runner.torch_runner import TorchRunner, dummy_batch, finish_step

log = logging.getLogger(__name__)

_HOST = torch.device("cpu")
_WARM_UP_ROWS = 8
"""Sequences in the widest of `TorchRunner.warm_up`'s steps."""

PlanStep = Callable[[AttentionMetadata], AttentionMetadata]
"""Puts a step's metadata on the chip, with what the attention backend decides on the host."""


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that the chip was given. what: names it in errors. finish: waits for the chip and makes the result."""

    what: str
    finish: Callable[[], StepResult]

    @torch.inference_mode()
    def result(self) -> StepResult:
        """See `mxn.backends.base.PendingStep`."""
        with chip_errors(self.what):
            return self.finish()


class GpuRunner(TorchRunner):
    """A model on an accelerator. A decode step replays a graph where one is captured; every other step is eager.

    takes_steps_ahead: whether a step may be submitted before the result of the one before is taken.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        plan_step: PlanStep,
        captured: CapturedAttention | None,
        max_num_seqs: int,
        sampler: str | None = None,
        waits_for_graphs: bool = False,
        takes_steps_ahead: bool = True,
        **parts: Any,
    ) -> None:
        """Args: captured: the attention backend's part in graphs, None to run everything eagerly. sampler: the
        implementation of the `sample` op. waits_for_graphs: whether `warm_up` ends only when all are captured.
        parts: as `TorchRunner` takes them.
        """
        super().__init__(**parts)
        self.notes += getattr(self._attention, "notes", ())
        self._accelerator, self._plan_step, self._sampler = accelerator, plan_step, sampler
        self._draws_on_chip = self.vocab_size <= MAX_VOCABULARY
        self.takes_steps_ahead = takes_steps_ahead and self._draws_on_chip
        why_not = "as set" if self._draws_on_chip else f"a vocabulary over {MAX_VOCABULARY} is drawn from on the host"
        ahead = "the next step is prepared while the chip runs one"
        self.notes += (ahead if self.takes_steps_ahead else f"one step at a time: {why_not}",)
        self._drawn = DrawnTokens(accelerator, max(max_num_seqs, _WARM_UP_ROWS))
        self._waits_for_graphs = waits_for_graphs
        self.num_eager = self.num_replayed = self.num_shared = 0
        self.graphs: DecodeGraphs | None = None
        self._captured = captured
        if captured is not None and self._draws_on_chip:
            self.graphs = DecodeGraphs(
                accelerator,
                self._forward,
                captured,
                max_num_seqs=max_num_seqs,
                max_context=self.max_context,
                block_size=self.block_size,
                drawn=self._drawn,
                sampler=sampler,
            )

    def execute(self, batch: StepBatch) -> StepResult:
        return self.submit(batch).result()

    @torch.inference_mode()
    def submit(self, batch: StepBatch) -> RunningStep:
        """Launches a step; see `mxn.backends.base.Executor.submit`."""
        if self._forward is None:
            raise ConfigError("the model was closed; load it again")
        if not batch.sequences:
            return RunningStep("a step without sequences", lambda: StepResult(tokens=()))
        inputs = build_inputs(batch, self.block_size, _HOST)
        what = f"a step of {batch.num_tokens} tokens"
        with chip_errors(what):
            groups: Sequence[Any] = ()
            key = None
            if self._can_replay(inputs, batch.sequences):
                groups = self._captured.find_groups([step.seq_id for step in batch.sequences], inputs.attention)
                key = self.graphs.choose(len(batch.sequences), shares_prefix=bool(groups))
            if key is None:
                self.num_eager += 1
                return RunningStep(what, self._run_eagerly(inputs, batch.sequences))
            self.num_replayed += 1
            self.num_shared += key.shares_prefix
            logits = self.graphs.run(key, inputs, batch.sequences, groups)
            return RunningStep(what, self._finish(logits, batch.sequences))

    def copy_kv(self, moves: Sequence[tuple[int, int]]) -> None:
        with chip_errors("a copy of KV blocks"):
            super().copy_kv(moves)

    def warm_up(self) -> tuple[tuple[str, ...], float]:
        started_s = time.perf_counter()
        shapes, _ = super().warm_up()
        batch = dummy_batch(2, 2, self.block_size) if self.num_blocks > 1 else dummy_batch(1, 2, self.block_size)
        self.execute(batch)
        if self.graphs is not None:
            self.graphs.start()
            if self._waits_for_graphs:
                self.graphs.wait()
                shapes += tuple(f"graph of {key.size}" for key in self.graphs.captured)
            else:
                shapes += (f"graphs of {', '.join(map(str, self.graphs.sizes))}: being captured",)
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not walk a model's modules again while serving
        return shapes, time.perf_counter() - started_s

    def close(self) -> None:
        if self.graphs is not None:
            self.graphs.close()
        super().close()
        # All of these hold the model or its cache.
        self.graphs = self._captured = self._plan_step = None
        gc.unfreeze()
        gc.collect()
        self._accelerator.release()

    # ------------------------------------------------------------------ parts of a step

    def _can_replay(self, inputs: StepInputs, steps: Sequence[SequenceStep]) -> bool:
        """Whether the step is one that graphs are for: one new token for each sequence, and a draw for all of them."""
        return (
            self.graphs is not None
            and inputs.attention.max_query_len == 1
            and inputs.logit_rows.shape[0] == len(steps)
            and all(step.sampling.num_prompt_logprobs is None for step in steps)
        )

    def _run_eagerly(self, inputs: StepInputs, steps: Sequence[SequenceStep]) -> Callable[[], StepResult]:
        device = self._accelerator.device
        token_ids = to_chip(inputs.token_ids, device)
        on_host = inputs.token_ids[0].numpy()
        sources = self._drawn.sources(on_host, inputs.attention.query_starts.numpy(), steps, len(on_host))
        if sources is not None:
            token_ids = self._drawn.chosen(token_ids[0], to_chip(torch.from_numpy(sources), device)).unsqueeze(0)
        logits = self._forward(
            StepInputs(
                token_ids=token_ids,
                positions=to_chip(inputs.positions, device),
                logit_rows=to_chip(inputs.logit_rows, device),
                row_ranges=inputs.row_ranges,
                attention=self._plan_step(inputs.attention),
            )
        )
        if not self._draws_on_chip or any(step.sampling.num_prompt_logprobs is not None for step in steps):
            return lambda: finish_step(logits, inputs, steps)
        sampled = [step for step in steps if step.is_sampled]
        if sampled:
            self._drawn.ids[: len(sampled)].copy_(self._draw(logits, sampled))
        return self._finish(logits, sampled)

    def _draw(self, logits: torch.Tensor, steps: Sequence[SequenceStep]) -> torch.Tensor:
        """One token per row by the rules that the op knows."""
        rules = {name: torch.zeros(len(steps), dtype=dtype) for name, dtype in RULES.items()}
        fill_rules({name: tensor.numpy() for name, tensor in rules.items()}, steps)
        on_chip = {name: to_chip(tensor, self._accelerator.device) for name, tensor in rules.items()}
        return draw(logits, on_chip, self._sampler)

    def _finish(self, logits: torch.Tensor, steps: Sequence[SequenceStep]) -> Callable[[], StepResult]:
        """Starts the copy of a step's tokens to the host. The answer waits, so that a fault belongs to its step."""
        taken = self._drawn.bring(steps)
        return lambda: self._result(logits, taken(), steps)

    def _result(self, logits: torch.Tensor, token_ids: np.ndarray, steps: Sequence[SequenceStep]) -> StepResult:
        """Tokens by row: what the op drew, or what the torch sampler draws where a row asks for more."""
        special = [row for row, step in enumerate(steps) if not step.is_plain]
        tokens = [SampledToken(seq_id=s.seq_id, token_id=t) for s, t in zip(steps, token_ids.tolist(), strict=True)]
        if not special and (token_ids >= 0).all():
            return StepResult(tokens=tuple(tokens))
        rest = sample(logits[special], [steps[row] for row in special]) if special else Sampled(tokens=())
        own = {steps[row].seq_id for row in special}
        tokens = [token for token in tokens if token.seq_id not in own and token.token_id >= 0] + list(rest.tokens)
        drawn = {token.seq_id: token for token in tokens}
        return StepResult(
            tokens=tuple(drawn[step.seq_id] for step in steps if step.seq_id in drawn),
            failed=tuple((step.seq_id, NOT_FINITE) for step in steps if step.seq_id not in drawn),
        )
