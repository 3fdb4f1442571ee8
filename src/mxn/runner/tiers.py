"""Compares the ways of computing a model on this CPU: `python -m mxn.runner.tiers FOLDER`, one JSON line for each.

Every way sees the same text (`sample.txt`); the first, transformers' modules in float32, is what the others are held
against. A line has "tier" and either "error", why it is not offered, or the figures of `Comparison`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from mxn.core.batch import SequenceStep, StepBatch
from mxn.core.model import LoadSettings, Model
from mxn.core.request import SamplingParams
from mxn.errors import MxnError
from mxn.runner.cpu import load_cpu_runner
from mxn.runner.likelihood import sample_ids
from mxn.runner.torch_runner import TorchRunner, dummy_batch
from mxn.runner.tuning import measure
from mxn.store.spec import spec_from_config

TIERS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "fp32 modules": ("fp32", ()),
    "int8 modules": ("int8", (("program", "modules"),)),
    "int8 program": ("int8", (("program", "step"),)),
    "int4 program": ("int4", (("program", "step"),)),
}
"""Numbers and options of each way; the first is the reference."""

_CASES = {"batch 1": (1, 1), "prompt of 128": (1, 128)}
_MAX_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One way beside the reference, over the sample's tokens.

    error: relative, 2-norm of all logits, each token's mean taken off; worst_error: of the token that differs most.
    same_tokens: share of tokens after which the likeliest next one is the same. nll: mean negative log-likelihood.
    ms: case to time of a step.
    """

    tier: str
    num_tokens: int
    error: float
    worst_error: float
    same_tokens: float
    nll: float
    ms: dict[str, float]
    threads: int


def compare(model: Model, *, cores: int) -> Iterator[dict[str, object]]:
    """One entry per way, as JSON has it; a way that is not offered gives its reason."""
    ids = sample_ids(model.folder, min(_MAX_TOKENS, model.spec.max_context))
    reference: torch.Tensor | None = None
    for tier, (quantisation, options) in TIERS.items():
        settings = LoadSettings(
            quantisation=quantisation,
            kv_bytes=model.spec.kv_bytes_per_token(4) * 2 * _MAX_TOKENS,
            options=(("tune", "off"), *options),
        )
        try:
            runner = load_cpu_runner(
                model,
                settings,
                cores=cores,
                free_bytes=lambda: psutil.virtual_memory().available,
                progress=lambda phase, fraction: None,
            )
        except MxnError as error:
            yield {"tier": tier, "error": str(error)}
            if reference is None:
                return
            continue
        logits = _logits(runner, ids)
        reference = logits if reference is None else reference
        yield asdict(_compared(tier, logits, reference, ids, runner))
        runner.close()


def _logits(runner: TorchRunner, ids: Sequence[int]) -> torch.Tensor:
    """Of every token, in one prompt."""
    step = SequenceStep(
        seq_id=0,
        token_ids=list(ids),
        start=0,
        block_ids=range(-(-len(ids) // runner.block_size)),
        is_sampled=True,
        sampling=SamplingParams(num_prompt_logprobs=0),
        seed=0,
        num_prompt_tokens=len(ids),
        num_output_tokens=0,
    )
    return runner.logits(StepBatch(step_id=0, sequences=(step,)))


def _compared(
    tier: str, logits: torch.Tensor, reference: torch.Tensor, ids: Sequence[int], runner: TorchRunner
) -> Comparison:
    # What is added to all logits of a token changes no probability, yet was 0.85 of one token's norm on SmolLM2.
    distance, size = _centred(logits - reference).norm(dim=-1), _centred(reference).norm(dim=-1)
    chosen = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    run = {tier: lambda shape: runner.execute(dummy_batch(*shape, runner.block_size))}
    times = measure(run, {tier: lambda: None}, _CASES)
    return Comparison(
        tier=tier,
        num_tokens=len(ids),
        error=float(distance.norm() / size.norm()),
        worst_error=float((distance / size).max()),
        same_tokens=float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
        nll=-float(chosen.mean()),
        ms={case: of_case[tier] for case, of_case in times.items()},
        threads=runner.threads or 1,
    )


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mxn.runner.tiers", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cores", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    spec = spec_from_config(json.loads((options.folder / "config.json").read_text(encoding="utf-8")))
    model = Model(name=options.folder.name, folder=str(options.folder), revision="", spec=spec)
    for entry in compare(model, cores=options.cores):
        print(json.dumps(entry), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
