"""The shortest time a workload can take on this machine: what must be read and computed over what the machine can do.

The ceilings are measured in the same run (`ceilings.cpp`), the work is counted from the model's files. In each step
weights and KV cache are read once, and arithmetic overlaps with reading, so the slower of the two counts.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
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
    """Measured with `threads` threads. `read_gb_per_s` is that of a working set of `working_set_bytes`."""

    threads: int
    int8_gops: float
    fp32_gflops: float
    bf16_gflops: float
    read_gb_per_s: float
    working_set_bytes: int

    @property
    def attention_gflops(self) -> float:
        """The faster of the two ways in which attention can be computed."""
        return max(self.fp32_gflops, self.bf16_gflops)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Of a model, what decides how long a step takes. Weights count multiplications, one per weight and token."""

    spec: ModelSpec
    layer_weights: int
    head_weights: int
    bits: float

    @property
    def weight_bytes(self) -> float:
        """Read by every step."""
        return (self.layer_weights * self.bits + self.head_weights * max(8, self.bits)) / 8

    @property
    def kv_bytes_per_token(self) -> float:
        """In the KV cache over all layers."""
        return self.spec.kv_bytes_per_token(KV_BYTES)


def shape_of(folder: str, spec: ModelSpec, quantisation: str) -> Shape | None:
    """Counts the matrices in the safetensors files; None where the bytes of a weight are not known."""
    bits = WEIGHT_BITS.get(quantisation)
    if bits is None:
        return None
    embedding = spec.vocab_size * spec.hidden_size
    layers = 0
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if ".layers." in name and len(tensor["shape"]) == 2:
                rows, columns = tensor["shape"]
                layers += rows * columns
    return Shape(spec=spec, layer_weights=layers, head_weights=embedding, bits=bits) if layers else None


def measure_ceilings(threads: int, working_set_bytes: int) -> Ceilings:
    """Takes about five seconds of the whole machine. Raises: BenchError without a C++ compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        source = str(Path(__file__).with_suffix(".cpp").with_stem("ceilings"))
        build = [compiler() or "g++", "-std=c++17", "-O3", "-march=native", "-pthread", source, "-o", str(program)]
        measure = [str(program), str(threads), str(working_set_bytes)]
        try:
            subprocess.run(build, check=True, timeout=120)
            found = json.loads(subprocess.run(measure, check=True, timeout=120, capture_output=True).stdout)
        except (OSError, subprocess.SubprocessError) as error:
            raise BenchError(f"the ceilings of this machine cannot be measured: {error}; g++ is needed") from error
    found["read_gb_per_s"] = found["read_gb_per_s"][0]
    return Ceilings(threads=threads, working_set_bytes=working_set_bytes, **found)


def bound(workload: Workload, shape: Shape, ceilings: Ceilings) -> float:
    """The workload's headline on an engine that reaches every ceiling."""
    streams = min(workload.concurrency, workload.num_requests)
    step_s = _step_s(shape, ceilings, streams, workload.prompt_tokens + workload.output_tokens / 2)
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


def _step_s(shape: Shape, ceilings: Ceilings, streams: int, context: float) -> float:
    """One token for each stream."""
    seen = streams * _visible(shape.spec, context)
    read = shape.weight_bytes + seen * shape.kv_bytes_per_token / shape.spec.num_layers
    weights = shape.layer_weights + shape.head_weights
    compute_s = _compute_s(shape, ceilings, streams * weights, seen)
    return max(read / ceilings.read_gb_per_s / 1e9, compute_s)


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
