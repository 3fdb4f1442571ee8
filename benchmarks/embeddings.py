"""Texts per second of a model that embeds, through HTTP, by each backend in turn: python benchmarks/embeddings.py

Both servers run from the start and are asked one after the other, round by round, so that a slower minute falls on
both. Texts are made of seeded words; clients send them 32 to a request, four requests at a time.
"""

from __future__ import annotations

import argparse
import base64
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import numpy as np

from mxn.bench.workloads import WORDS
from mxn.cli.own_server import OwnServer, own_server

SHAPES = {"short": (256, 8, 16), "mixed": (256, 4, 120), "long": (64, 180, 190)}
"""Texts, and the least and most words of one; a word is a little over one token."""
BATCH, CLIENTS = 32, 4


def texts_of(shape: str) -> list[str]:
    number, low, high = SHAPES[shape]
    draw = random.Random(shape)
    return [" ".join(draw.choices(WORDS, k=draw.randint(low, high))) for _ in range(number)]


def ask(server: OwnServer, texts: list[str]) -> tuple[float, int, np.ndarray]:
    """Seconds for all texts, their tokens, and the vectors in order."""

    def post(batch: list[str]) -> dict:
        body = {"model": server.name, "input": batch, "encoding_format": "base64"}
        return client.post(f"{server.url}/embeddings", json=body, timeout=120).raise_for_status().json()

    with httpx.Client() as client, ThreadPoolExecutor(CLIENTS) as pool:
        start = time.perf_counter()
        answers = list(pool.map(post, [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]))
        seconds = time.perf_counter() - start
    tokens = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    return seconds, tokens, np.concatenate([vectors_of(answer) for answer in answers])


def vectors_of(answer: dict) -> np.ndarray:
    return np.stack([np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4") for one in answer["data"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm-l6-v2")
    parser.add_argument("--backends", nargs="+", default=["cpu", "onnx"])
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(own_server(arguments.model, ["--backend", name], is_quiet=True))
            for name in arguments.backends
        }
        for shape in SHAPES:
            texts = texts_of(shape)
            rates: dict[str, list[float]] = {name: [] for name in servers}
            found = {}
            for name, server in servers.items():
                _, tokens, found[name] = ask(server, texts)
            for _ in range(arguments.repetitions):
                for name, server in servers.items():
                    rates[name].append(len(texts) / ask(server, texts)[0])
            for name, own in rates.items():
                cosine = (found[name] * found[arguments.backends[0]]).sum(1).min()
                print(
                    f"{shape:6} {tokens / len(texts):5.0f} tokens  {name:5} {servers[name].quantisation:5} texts/s "
                    f"median {statistics.median(own):7.1f} [{min(own):.1f}, {max(own):.1f}]  least cosine to "
                    f"{arguments.backends[0]} {cosine:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
