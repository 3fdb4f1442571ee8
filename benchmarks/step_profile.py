"""Where the time of one step goes: decode of 1, 8 and 32 sequences, and the prefill of 1,024 tokens.

    python benchmarks/step_profile.py [--model NAME] [--quantisation int8] [--programs step,modules] [--json FILE]

In process, without HTTP. The step program times its own stages. Transformers' modules are timed around the functions
they call, which itself costs about 0.3 us a call; "rest of the model" is what remains of the forward pass: Python,
module calls, rotary embedding, activations, embedding lookup. The median step of `--repetitions` is shown, with its
parts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# transformers would take benchmarks/kernels.py for the package "kernels".
sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]

import msgspec  # noqa: E402
import torch  # noqa: E402
from mxn_kernels.cpu_step import DecoderStep  # noqa: E402

import mxn.attention.paged as paged  # noqa: E402
import mxn.runner.quantise as quantise  # noqa: E402
import mxn.runner.torch_runner as torch_runner  # noqa: E402
from mxn.backends.registry import load_backend  # noqa: E402
from mxn.bench.environment import manifest  # noqa: E402
from mxn.core.model import LoadSettings  # noqa: E402
from mxn.core.request import SamplingParams, SequenceRequest  # noqa: E402
from mxn.engine.engine import Engine, EngineSettings  # noqa: E402
from mxn.store.fetch import fetch  # noqa: E402

CASES = (
    ("decode, batch 1", 1, 128),
    ("decode, batch 8", 8, 160),
    ("decode, batch 32", 32, 160),
    ("prefill 1024", 1, 0),
)
STEP_TOKENS = 2048


class Stopwatch:
    """Sums the seconds spent in wrapped functions, by part, and in the stages of step programs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Replaces a function of a module or class by one that is timed."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)

    def wrap_program(self, name: str) -> None:
        """Has every step program that is called tell its stages, instead of one sum."""
        inner: Callable[..., Any] = getattr(DecoderStep, name)

        def profiled(step: DecoderStep, *args: Any, **kwargs: Any) -> Any:
            step.start_profile()
            answer = inner(step, *args, **kwargs)
            for part, seconds in step.profile().items():
                self.seconds[part] = self.seconds.get(part, 0.0) + seconds
            return answer

        setattr(DecoderStep, name, profiled)


def main() -> None:
    """Prints one table per program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantisation", default="int8")
    parser.add_argument("--programs", default="step,modules")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    made = manifest(seed=0)
    watch = Stopwatch()
    watch.wrap(torch_runner, "build_inputs", "inputs")
    watch.wrap(torch_runner, "finish_step", "sampling")
    for name in [name for name in vars(quantise) if name.endswith("_linear") and not name.startswith("_")]:
        watch.wrap(quantise, name, "linear layers")
    watch.wrap(quantise, "rms_norm", "norms")
    watch.wrap(torch.nn.functional, "linear", "linear layers")
    watch.wrap(paged, "paged_attention", "attention")
    for name in ("__call__", "greedy"):
        watch.wrap_program(name)

    found = {}
    for program in arguments.programs.split(","):
        executor = load(arguments, program)
        watch.wrap(executor, "execute", "execute")
        rows = [profile(executor, watch, *case, repetitions=arguments.repetitions) for case in CASES]
        found[program] = {"info": asdict(executor.info), "rows": rows}
        executor.close()
        print(f"\n{executor.info.program}, {executor.info.quantisation}, {executor.info.threads} threads\n")
        show(rows)
    if arguments.json:
        arguments.json.write_bytes(
            msgspec.json.format(msgspec.json.encode({"manifest": made, "programs": found}), indent=1)
        )


def load(arguments: argparse.Namespace, program: str) -> Any:
    """The model with that program, warmed up."""
    model = fetch(arguments.model, progress=lambda *_: None)
    settings = LoadSettings(
        quantisation=arguments.quantisation,
        max_step_tokens=STEP_TOKENS,
        kv_bytes=2**29,
        threads=arguments.threads,
        options=(("program", program),),
    )
    backend = load_backend("cpu")
    executor = backend.load(model, settings, backend.chips(), lambda *_: None)
    executor.warm_up()
    return executor


def profile(
    executor: Any, watch: Stopwatch, name: str, batch: int, context: int, *, repetitions: int
) -> dict[str, Any]:
    """Milliseconds by part of the median step of one case."""
    engine = Engine(executor, EngineSettings(max_num_seqs=64, max_step_tokens=STEP_TOKENS, prefix_cache=False))
    sampling = SamplingParams(max_tokens=repetitions + 8, temperature=0.0)
    steps = []
    if context:
        for i in range(batch):
            prompt = [100 + (7 * i + j) % 5000 for j in range(context)]
            engine.add(SequenceRequest(seq_id=i, prompt_token_ids=prompt, sampling=sampling))
        while engine.stats.num_output_tokens < 3 * batch:
            engine.step()
        steps = [timed_step(engine, watch) for _ in range(repetitions)]
    else:
        for i in range(max(5, repetitions // 3)):
            prompt = [100 + (i + j) % 5000 for j in range(1024)]
            one = SamplingParams(max_tokens=1, temperature=0.0)
            engine.add(SequenceRequest(seq_id=1000 + i, prompt_token_ids=prompt, sampling=one))
            steps.append(timed_step(engine, watch))
    engine.abort(range(batch))
    middle = sorted(steps, key=lambda step: step["step"])[len(steps) // 2]
    return {"case": name, **{part: round(seconds * 1e3, 3) for part, seconds in middle.items()}}


def timed_step(engine: Engine, watch: Stopwatch) -> dict[str, float]:
    """Seconds by part of one step; the parts add up to "step"."""
    watch.seconds.clear()
    start = time.perf_counter()
    engine.step()
    total = time.perf_counter() - start
    parts = dict(watch.seconds)
    execute = parts.pop("execute")
    rest = execute - sum(parts.values())
    return {"step": total, "engine": total - execute, **parts, "rest of the model": rest}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints Markdown: a column per case, a row per part that is not nothing."""
    parts = dict.fromkeys(part for row in rows for part in row if part != "case")
    print("| ms | " + " | ".join(row["case"] for row in rows) + " |\n|" + "---|" * (len(rows) + 1))
    for part in parts:
        if any(row.get(part, 0.0) >= 0.005 for row in rows):
            print(f"| {part} | " + " | ".join(f"{row.get(part, 0.0):.2f}" for row in rows) + " |")


if __name__ == "__main__":
    main()
