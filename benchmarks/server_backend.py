"""What mxn adds in front of a server: the same one asked directly and through mxn, in turns, with new prompts.

    llama-server -m model.gguf --alias m --port 8091 ... &
    python benchmarks/server_backend.py FOLDER --url http://127.0.0.1:8091 --protocol llama.cpp --model m

FOLDER holds the model in Hugging Face layout, for mxn and for the prompts. First requests of one token, then workloads.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

from mxn.bench.client import CompletionsClient
from mxn.bench.workloads import PromptMaker, Workload, parse_workloads
from mxn.cli.own_server import own_server

_ONE_TOKEN = Workload(
    name="one token",
    title="one token",
    num_requests=100,
    prompt_tokens=16,
    output_tokens=1,
    concurrency=1,
    headline="duration_s",
)


async def measure(clients: dict[str, CompletionsClient], prompts: PromptMaker, options: argparse.Namespace) -> None:
    """Prints a line for every pair of runs, and medians of what the pairs differ by."""
    for client in clients.values():
        await client.run(prompts.make(_ONE_TOKEN)[:5], 1, 1)
    times: dict[str, list[float]] = {name: [] for name in clients}
    for number, pair in enumerate(zip(*(prompts.make(_ONE_TOKEN) for _ in clients), strict=True)):
        for name, prompt in list(zip(clients, pair, strict=True))[:: 1 if number % 2 else -1]:
            result = await clients[name].complete(prompt, 1)
            if result.error:
                raise SystemExit(f"{name}: {result.error}")
            times[name].append(1e3 * (result.end_s - result.start_s))
    direct_ms, mxn_ms = (statistics.median(times[name]) for name in ("direct", "mxn"))
    print(f"one token, p50 of {_ONE_TOKEN.num_requests}: direct {direct_ms:.2f}, mxn {mxn_ms:.2f} ms")
    for workload in parse_workloads(options.workloads):
        ratios = []
        for repetition in range(options.repetitions):
            rates = {}
            for name in list(clients)[:: 1 if repetition % 2 else -1]:
                texts = prompts.make(workload)
                start_s = time.perf_counter()
                results = await clients[name].run(texts, workload.output_tokens, workload.concurrency)
                seconds = time.perf_counter() - start_s
                if errors := [r.error for r in results if r.error]:
                    raise SystemExit(f"{name}: {errors[0]}")
                rates[name] = sum(r.num_output_tokens for r in results) / seconds
            ratios.append(rates["mxn"] / rates["direct"])
            print(f"{workload.name}: direct {rates['direct']:.1f}, mxn {rates['mxn']:.1f} tokens/s, {ratios[-1]:.3f}")
        print(f"{workload.name}: mxn / direct, median of {len(ratios)}: {statistics.median(ratios):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--protocol", default="completions")
    parser.add_argument("--extensions", default="ignore_eos")
    parser.add_argument("--workloads", default="W1,W2c8")
    parser.add_argument("--repetitions", "-r", type=int, default=5)
    options = parser.parse_args()
    arguments = ["--backend", "server", "--name", options.model]
    for name in ("url", "model", "protocol", "extensions"):
        arguments += ["--option", f"{name}={getattr(options, name)}"]
    with own_server(options.folder, arguments) as server:
        clients = {
            "direct": CompletionsClient(f"{options.url}/v1", model=options.model),
            "mxn": CompletionsClient(server.url, model=server.name),
        }
        asyncio.run(measure(clients, PromptMaker(server.folder, seed=0), options))


if __name__ == "__main__":
    main()
