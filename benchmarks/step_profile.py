"""Where the time of one step goes: engine, inputs, linear layers, attention, norms, the rest of the model, sampling.

    python benchmarks/step_profile.py [--model NAME] [--quantisation int8] [--option program=modules] [--json FILE]

In process, without HTTP. Each part is timed around its calls, which itself costs about 0.3 us a call. "rest of the
model" is what remains of the forward pass: Python, module calls, rotary embedding, activations, embedding lookup.
The median step of `--repetitions` is shown, with its parts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# transformers would take benchmarks/kernels.py for the package "kernels".
sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

import mxn.attention.paged as paged  # noqa: E402
import mxn.runner.quantise as quantise  # noqa: E402
import mxn.runner.torch_runner as torch_runner  # noqa: E402
from mxn.backends.registry import load_backend  # noqa: E402
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


class Stopwatch:
    """Sums the seconds spent in wrapped functions, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, module: Any, name: str, part: str) -> None:
        """Replaces a module's function by one that is timed."""
        inner: Callable[..., Any] = getattr(module, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        setattr(module, name, timed)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantisation", default="int8")
    parser.add_argument("--option", action="append", default=[], help="backend option, as name=value")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json")
    arguments = parser.parse_args()

    model = fetch(arguments.model, progress=lambda *_: None)
    options = tuple(tuple(option.split("=", 1)) for option in arguments.option)
    settings = LoadSettings(quantisation=arguments.quantisation, max_step_tokens=2048, kv_bytes=2**29, options=options)
    backend = load_backend("cpu")
    executor = backend.load(model, settings, backend.chips(), lambda *_: None)
    executor.warm_up()
    print("\n".join(executor.info.notes))

    watch = Stopwatch()
    watch.wrap(torch_runner, "build_inputs", "inputs")
    watch.wrap(torch_runner, "finish_step", "sampling")
    watch.wrap(quantise, "int8_linear", "linear layers")
    watch.wrap(quantise, "rms_norm", "norms")
    watch.wrap(torch.nn.functional, "linear", "linear layers")
    watch.wrap(paged, "paged_attention", "attention")
    watch.wrap(executor, "execute", "execute")
    rows = [profile(executor, watch, *case, repetitions=arguments.repetitions) for case in CASES]
    show(rows)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"notes": executor.info.notes, "rows": rows}, file, indent=1)


def profile(
    executor: Any, watch: Stopwatch, name: str, batch: int, context: int, *, repetitions: int
) -> dict[str, Any]:
    """Milliseconds by part of the median step of one case."""
    engine = Engine(executor, EngineSettings(max_num_seqs=64, max_step_tokens=2048, prefix_cache=False))
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
    return {"step": total, "engine": total - execute, "rest of the model": rest, **parts}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints Markdown."""
    parts = ["engine", "inputs", "linear layers", "attention", "norms", "rest of the model", "sampling", "step"]
    print("\n| ms | " + " | ".join(parts) + " |\n|" + "---|" * (len(parts) + 1))
    for row in rows:
        print(f"| {row['case']} | " + " | ".join(f"{row.get(part, 0.0):.2f}" for part in parts) + " |")


if __name__ == "__main__":
    main()
