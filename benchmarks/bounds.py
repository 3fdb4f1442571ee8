"""The shortest time a workload can take on this machine: what must be read and computed over what the machine can do.

The ceilings are measured in the same run (`ceilings.cpp`), the work is counted from the model's files. In each step
weights and KV cache are read once, and arithmetic overlaps with reading, so the slower of the two counts.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from mxn_kernels.environment import compiler

from mxn.bench.runner import BenchError
from mxn.bench.workloads import Workload
from mxn.core.model import ModelSpec

WEIGHT_BITS = {"int4": 4.5, "int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}
"""Bits read per weight; int4 with a 16-bit scale per 32 weights. The head is read as int8 where layers are int4."""

KV_BYTES = 2
"""Of one number in the KV cache, which mxn keeps in 16 bits on a CPU."""


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """Measured with `threads` threads. `read_gb_per_s` belongs to the working set of the same place."""

    threads: int
    int8_gops: float
    fp32_gflops: float
    bf16_gflops: float
    working_set_bytes: tuple[int, ...]
    read_gb_per_s: tuple[float, ...]

    @property
    def attention_gflops(self) -> float:
        """The faster of the two ways in which attention can be computed."""
        return max(self.fp32_gflops, self.bf16_gflops)

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each: a neighbour may have lowered either."""
        return Ceilings(
            threads=self.threads,
            int8_gops=max(self.int8_gops, other.int8_gops),
            fp32_gflops=max(self.fp32_gflops, other.fp32_gflops),
            bf16_gflops=max(self.bf16_gflops, other.bf16_gflops),
            working_set_bytes=self.working_set_bytes,
            read_gb_per_s=tuple(map(max, self.read_gb_per_s, other.read_gb_per_s)),
        )

    def bytes_per_s(self, working_set: float) -> float:
        """At the measured working set that is nearest."""
        sizes = self.working_set_bytes
        nearest = min(range(len(sizes)), key=lambda i: abs(sizes[i] - working_set))
        return self.read_gb_per_s[nearest] * 1e9


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Of a model, what decides how long a step takes. Weights count multiplications, one per weight and token."""

    spec: ModelSpec
    layer_weights: int
    head_weights: int

    def weight_bytes(self, quantisation: str) -> float:
        """Read by every step."""
        bits = WEIGHT_BITS[quantisation]
        return (self.layer_weights * bits + self.head_weights * max(8, bits)) / 8

    @property
    def kv_bytes_per_token(self) -> float:
        """In the KV cache over all layers."""
        return self.spec.kv_bytes_per_token(KV_BYTES)


def shape_of(folder: str, spec: ModelSpec) -> Shape:
    """Counts the layers' matrices in the safetensors files."""
    layers = 0
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        matrices = [t["shape"] for name, t in header.items() if ".layers." in name and len(t["shape"]) == 2]
        layers += sum(rows * columns for rows, columns in matrices)
    return Shape(spec=spec, layer_weights=layers, head_weights=spec.vocab_size * spec.hidden_size)


def measure_ceilings(threads: int, working_sets: Sequence[int]) -> Ceilings:
    """Takes about five seconds of the whole machine. Raises: BenchError without a C++ compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        source = str(Path(__file__).with_name("ceilings.cpp"))
        build = [compiler() or "g++", "-std=c++17", "-O3", "-march=native", "-pthread", source, "-o", str(program)]
        measure = [str(program), str(threads), *map(str, working_sets)]
        try:
            subprocess.run(build, check=True, timeout=120)
            found = json.loads(subprocess.run(measure, check=True, timeout=120, capture_output=True).stdout)
        except (OSError, subprocess.SubprocessError) as error:
            raise BenchError(f"the ceilings of this machine cannot be measured: {error}; g++ is needed") from error
    return Ceilings(threads=threads, working_set_bytes=tuple(working_sets), **found)


def bound(workload: Workload, shape: Shape, quantisation: str, ceilings: Ceilings) -> float:
    """The workload's headline on an engine that reaches every ceiling."""
    streams = min(workload.concurrency, workload.num_requests)
    weight_bytes = shape.weight_bytes(quantisation)
    read_s_per_byte = 1 / ceilings.bytes_per_s(weight_bytes)
    context = workload.prompt_tokens + workload.output_tokens / 2
    seen = streams * _visible(shape.spec, context)
    step_s = max(
        (weight_bytes + seen * shape.kv_bytes_per_token / shape.spec.num_layers) * read_s_per_byte,
        _compute_s(shape, ceilings, streams * (shape.layer_weights + shape.head_weights), seen),
    )
    if workload.headline == "decode_tokens_per_s":
        return 1 / step_s
    shared = workload.shared_tokens
    own_s = _prefill_s(shape, ceilings, workload.prompt_tokens - shared, shared)
    prompts_s = workload.num_requests * own_s + (_prefill_s(shape, ceilings, shared, 0) if shared else 0.0)
    waves = workload.num_requests / streams
    total_s = prompts_s + waves * (workload.output_tokens - 1) * step_s
    tokens = {
        "duration_s": 1.0,
        "output_tokens_per_s": float(workload.num_requests * workload.output_tokens),
        "prompt_tokens_per_s": float(workload.num_requests * workload.prompt_tokens),
    }
    return total_s if workload.is_lower_better else tokens[workload.headline] / total_s


def _prefill_s(shape: Shape, ceilings: Ceilings, tokens: int, before: int) -> float:
    """`tokens` of one prompt after `before` that are in the cache; the head sees only the last one."""
    pairs = tokens * _visible(shape.spec, before + tokens / 2)
    return _compute_s(shape, ceilings, tokens * shape.layer_weights + shape.head_weights, pairs)


def _compute_s(shape: Shape, ceilings: Ceilings, products: float, pairs: float) -> float:
    spec = shape.spec
    attention = 2 * pairs * spec.num_heads * (spec.key_dim + spec.value_dim)
    return 2 * products / ceilings.int8_gops / 1e9 + attention / ceilings.attention_gflops / 1e9


def _visible(spec: ModelSpec, context: float) -> float:
    """Tokens that a query sees, summed over the layers."""
    windows: Sequence[int | None] = spec.layer_windows or (None,) * spec.num_layers
    return sum(min(context, window) if window else context for window in windows)
