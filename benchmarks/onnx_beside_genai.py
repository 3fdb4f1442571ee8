"""The onnx backend's engine beside onnxruntime-genai's own loop: one process, turns taken, the same prompts.

    python benchmarks/onnx_beside_genai.py GENAI_FOLDER [--model smollm2-135m-instruct] [--quantisation int4] [--reps 5]

GENAI_FOLDER is what `python -m onnxruntime_genai.models.builder -p int4 -e cpu` wrote. W1: 128 tokens in, 128 out, one
sequence. W2: 32 sequences of 128 in, 64 out, 8 at a time; the loop's batches are static and of equal length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime_genai as og

from mxn.backends.onnx import OnnxBackend
from mxn.core.model import LoadSettings
from mxn.core.request import SamplingParams, SequenceRequest
from mxn.engine.engine import Engine, EngineSettings
from mxn.store.fetch import fetch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("genai_folder")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantisation", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=5)
    options = parser.parse_args()

    engine, notes = load_engine(options.model, options.quantisation, options.threads)
    config = og.Config(options.genai_folder)
    session = {"intra_op_num_threads": options.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    loop = og.Model(config)
    print("\n".join(notes))

    rng = np.random.default_rng(0)
    sides: dict[str, Callable[[list[list[int]], int, int], tuple[float, float]]] = {
        f"mxn onnx {options.quantisation}": lambda prompts, count, width: run_engine(engine, prompts, count, width),
        f"onnxruntime-genai {og.__version__}": lambda prompts, count, width: run_loop(loop, prompts, count, width),
    }
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for rep in range(options.reps + 1):  # the first warms up
        for name, run in list(sides.items())[:: 1 if rep % 2 else -1]:
            first_s, total_s = run(random_prompts(rng, 1, 128), 128, 1)
            _, batch_s = run(random_prompts(rng, 32, 128), 64, 8)
            if rep:
                found = {"W1 decode tok/s": 127 / (total_s - first_s), "W1 TTFT ms": first_s * 1e3}
                for key, value in (found | {"W2 c8 output tok/s": 32 * 64 / batch_s}).items():
                    rates[name].setdefault(key, []).append(value)
    for name, found in rates.items():
        for key, values in found.items():
            print(f"{name:28} {key:20} {statistics.median(values):8.1f}  [{', '.join(f'{v:.1f}' for v in values)}]")


def load_engine(name: str, quantisation: str, threads: int) -> tuple[Engine, tuple[str, ...]]:
    backend = OnnxBackend()
    [chip] = backend.chips()
    settings = LoadSettings(quantisation=quantisation, threads=threads, context_length=1024, max_num_seqs=8)
    executor = backend.load(fetch(name), settings, [chip], lambda phase, fraction: None)
    executor.warm_up()
    return Engine(executor, EngineSettings(has_mixed_steps=False, prefix_cache=False)), executor.info.notes


def random_prompts(rng: np.random.Generator, count: int, length: int) -> list[list[int]]:
    return rng.integers(1000, 40_000, (count, length)).tolist()


def run_engine(engine: Engine, prompts: list[list[int]], count: int, width: int) -> tuple[float, float]:
    """Seconds to the first token and to the last, `width` sequences at a time."""
    waiting = list(enumerate(prompts))[::-1]
    sampling = SamplingParams(max_tokens=count, temperature=0.0)
    started, first_s, num_running = time.perf_counter(), 0.0, 0
    while waiting or engine.has_work:
        while waiting and num_running < width:
            seq_id, prompt = waiting.pop()
            engine.add(SequenceRequest(seq_id=seq_id, prompt_token_ids=prompt, sampling=sampling))
            num_running += 1
        for output in engine.step():
            first_s = first_s or time.perf_counter() - started
            num_running -= output.finish_reason is not None
    return first_s, time.perf_counter() - started


def run_loop(model: og.Model, prompts: list[list[int]], count: int, width: int) -> tuple[float, float]:
    """The same with the library's generator, in static batches of `width`."""
    started, first_s = time.perf_counter(), 0.0
    for start in range(0, len(prompts), width):
        batch = np.array(prompts[start : start + width], np.int32)
        length = batch.shape[1] + count
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(batch))
        generator = og.Generator(model, params)
        generator.append_tokens(batch if len(batch) > 1 else batch[0])
        for _ in range(count):
            generator.generate_next_token()
            first_s = first_s or time.perf_counter() - started
    return first_s, time.perf_counter() - started


if __name__ == "__main__":
    main()
