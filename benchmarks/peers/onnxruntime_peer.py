"""ONNX Runtime GenAI as a worker.

python onnxruntime_peer.py MODEL_FOLDER [--threads 2]

The folder comes from `python -m onnxruntime_genai.models.builder -p int4 -e cpu --extra_options int4_accuracy_level=4`.
Its generator takes one fixed batch of prompts of equal length, so requests run in batches of `concurrency`, one after
another. That flatters it: no request arrives while others run. It has no prefix cache.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from worker import private_stdout, serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    pipe = private_stdout()

    config = genai.Config(arguments.model)
    session = {"intra_op_num_threads": arguments.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = genai.Model(config)
    notes = [f"onnxruntime-genai {genai.__version__}", "fixed batches of equal length"]
    about = {"backend": "onnxruntime-genai", "threads": arguments.threads, "notes": notes}

    def run(prompts: list[list[int]], max_tokens: int, concurrency: int) -> list[dict[str, Any]]:
        found = []
        for first in range(0, len(prompts), concurrency):
            found += batch(model, prompts[first : first + concurrency], max_tokens)
        return found

    serve(pipe, about, run)


def batch(model: Any, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Decodes past end of text as long as `min_length` says."""
    length = len(prompts[0]) + max_tokens
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
    start_s = time.monotonic()
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array(prompts if len(prompts) > 1 else prompts[0], dtype=np.int32))
    times_s = []
    while len(times_s) < max_tokens and not generator.is_done():
        generator.generate_next_token()
        times_s.append(time.monotonic())
    request = {
        "start_s": start_s,
        "end_s": times_s[-1],
        "times_s": times_s,
        "num_output_tokens": len(generator.get_sequence(0)) - len(prompts[0]),
    }
    return [request] * len(prompts)


if __name__ == "__main__":
    main()
