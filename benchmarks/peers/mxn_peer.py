"""mxn's own engine as a worker: no HTTP, no second process.

python mxn_peer.py MODEL [--quantisation int8] [--threads 2] [--kv-gib 2]
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from worker import private_stdout, serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--quantisation", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--kv-gib", type=float)
    arguments = parser.parse_args()
    pipe = private_stdout()

    from mxn.bench.in_process import InProcessArm
    from mxn.cli.prepare import deployment_config, prepare

    prepared = prepare(deployment_config(**vars(arguments)), lambda phase, fraction, detail: None)
    prepared.power.close()
    model, settings = prepared.spec.model, prepared.spec.placements[0].settings
    arm = InProcessArm.load(prepared.backend, prepared.chip, model, settings, label="mxn")
    subject = arm.subject
    about = {
        "backend": subject.backend,
        "attention": subject.attention,
        "quantisation": subject.quantisation,
        "program": subject.program,
        "threads": subject.threads,
        "notes": subject.notes,
    }

    def run(prompts: list[list[int]], max_tokens: int, concurrency: int) -> list[dict[str, Any]]:
        results = asyncio.run(arm.run(prompts, max_tokens, concurrency))
        return [
            {
                "start_s": r.start_s,
                "end_s": r.end_s,
                "times_s": r.chunk_times_s,
                "num_output_tokens": r.num_output_tokens,
                "num_cached_tokens": r.num_cached_tokens,
                "error": r.error,
            }
            for r in results
        ]

    serve(pipe, about, run)


if __name__ == "__main__":
    main()
