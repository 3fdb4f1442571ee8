"""OpenVINO GenAI's continuous batching pipeline as a worker.

python openvino_peer.py MODEL_FOLDER [--threads 2] [--cache-gb 2]

The folder comes from `optimum-cli export openvino --task text-generation-with-past --weight-format int8`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from worker import private_stdout, serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-gb", type=int, default=2)
    arguments = parser.parse_args()
    pipe = private_stdout()

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = arguments.cache_gb
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = 64
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    properties = {"INFERENCE_NUM_THREADS": arguments.threads}
    pipeline = genai.ContinuousBatchingPipeline(arguments.model, scheduler, "CPU", properties, {})
    about = {
        "backend": "openvino-genai",
        "threads": arguments.threads,
        "notes": [f"openvino-genai {genai.__version__}"],
    }
    serve(pipe, about, lambda prompts, n, concurrency: closed_loop(pipeline, prompts, n, concurrency))


def closed_loop(pipeline: Any, prompts: list[list[int]], max_tokens: int, concurrency: int) -> list[dict[str, Any]]:
    settings = genai.GenerationConfig()
    settings.max_new_tokens = settings.min_new_tokens = max_tokens
    settings.ignore_eos, settings.do_sample = True, False
    waiting = list(enumerate(prompts))[::-1]
    found: list[dict[str, Any]] = [{} for _ in prompts]
    handles: dict[int, Any] = {}
    while waiting or handles:
        while waiting and len(handles) < concurrency:
            i, ids = waiting.pop()
            found[i] = {"start_s": time.monotonic(), "times_s": [], "num_output_tokens": 0}
            handles[i] = pipeline.add_request(i, ov.Tensor(np.array([ids], dtype=np.int64)), settings)
        pipeline.step()
        now_s = time.monotonic()
        for i, handle in list(handles.items()):
            request = found[i]
            if handle.can_read():
                request["num_output_tokens"] += sum(len(o.generated_ids) for o in handle.read().values())
                request["times_s"].append(now_s)
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                request["end_s"] = now_s
                del handles[i]
    return found


if __name__ == "__main__":
    main()
