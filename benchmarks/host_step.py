"""Measures what a decode step costs the host on the way to a GPU: engine and GPU runner over a chip that does nothing.

    python benchmarks/host_step.py                          256 sequences of 600 tokens
    python benchmarks/host_step.py --sequences 64 --json out.json

Planning, inputs, staging, the graph's choice, taking tokens in and handing them out are the real code; only copies to
the chip, the graph and the wait for it are stood in for, and every token drawn is 0. Processor time of this process is
reported, not time on the wall, so a busy machine does not change it much. Needs torch; no chip.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from chip_facts import stamp  # noqa: E402

sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks"]

import torch  # noqa: E402

from mxn.attention.base import LayerKV  # noqa: E402
from mxn.attention.triton import CapturedDecode, TritonAttention  # noqa: E402
from mxn.backends.torch_executor import chip_executor  # noqa: E402
from mxn.core.request import SamplingParams, SequenceRequest  # noqa: E402
from mxn.engine.engine import Engine, EngineSettings  # noqa: E402
from mxn.runner.accelerator import Captured  # noqa: E402
from mxn.runner.gpu_runner import GpuRunner  # noqa: E402
from mxn.runner.inputs import StepInputs  # noqa: E402
from mxn.runner.torch_runner import LoadPlan  # noqa: E402

BLOCK = 16
ANY_VOCABULARY = 8


class NullChip:
    """Takes everything at once and does nothing."""

    device = torch.device("cpu")

    def select(self) -> None: ...

    def release(self) -> None: ...

    def free_bytes(self) -> int:
        return 2**30

    def host_tensor(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def capture(self, run: Callable[[], torch.Tensor], warm_up: Callable[[], torch.Tensor]) -> Captured:
        return Captured(lambda: None, torch.zeros(1024, ANY_VOCABULARY))

    def mark(self) -> Callable[[], None]:
        return lambda: None


class NullForward:
    """Logits of 0 for whatever is asked."""

    name = "nothing"

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        return torch.zeros(inputs.logit_rows.shape[0], ANY_VOCABULARY)


def make_engine(num_seqs: int, num_tokens: int, *, looks_ahead: bool) -> Engine:
    """An engine whose sequences may grow to so many tokens."""
    num_blocks = num_seqs * (-(-num_tokens // BLOCK) + 1)
    layers = [LayerKV(num_kv_heads=1, key_dim=16, value_dim=16)]
    attention = TritonAttention(layers, num_blocks, BLOCK, device="cpu", num_heads=8)
    nothing: dict[str, Any] = {"make_attention": None, "block_bytes": None, "free_bytes": None, "quantise": None}
    runner = GpuRunner(
        accelerator=NullChip(),
        plan_step=lambda meta: meta,
        captured=CapturedDecode(attention, num_seqs, num_tokens),
        max_num_seqs=num_seqs,
        sampler="reference",
        plan=LoadPlan(device="cpu", dtype=torch.bfloat16, quantisation="none", **nothing),
        forward=NullForward(),
        attention=attention,
        vocab_size=151_936,
        max_context=num_tokens,
        max_step_tokens=16_384,
        weight_bytes=0,
        kv_bytes=0,
        notes=(),
    )
    runner.graphs.start()
    runner.graphs.wait()
    settings = EngineSettings(max_num_seqs=num_seqs, max_step_tokens=16_384, looks_ahead=looks_ahead)
    return Engine(chip_executor(runner), settings)


def measure(num_seqs: int, context: int, num_steps: int, *, looks_ahead: bool) -> dict[str, Any]:
    """Milliseconds of processor time per step, over steps in which every sequence decodes."""
    engine = make_engine(num_seqs, context + num_steps + 64, looks_ahead=looks_ahead)
    generator = torch.Generator().manual_seed(0)
    for seq_id in range(num_seqs):
        prompt = torch.randint(0, 10_000, (context,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=num_steps + 32, temperature=0.6, seed=seq_id)
        engine.add(SequenceRequest(seq_id=seq_id, prompt_token_ids=prompt, sampling=sampling))
    runner = engine.executor._runner
    while runner.num_replayed < 4:
        engine.step()
    before = runner.num_replayed
    times = []
    for _ in range(num_steps):
        begin_s = time.process_time()
        outputs = engine.step()
        times.append(1e3 * (time.process_time() - begin_s))
        assert len(outputs) == num_seqs
    assert runner.num_replayed == before + num_steps, "a step did not replay a graph"
    quartiles = statistics.quantiles(times, n=4)
    return {"looks_ahead": looks_ahead, "median_ms": quartiles[1], "quartiles_ms": [quartiles[0], quartiles[2]]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--context", type=int, default=600, help="tokens in each at the start (600)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(options.sequences, options.context, options.steps, looks_ahead=ahead) for ahead in (False, True)]
    for row in rows:
        low, high = row["quartiles_ms"]
        order = "ahead" if row["looks_ahead"] else "one by one"
        print(f"steps {order}: {row['median_ms']:.2f} ms of processor time each (quartiles {low:.2f} to {high:.2f})")
    if options.json:
        facts = {**stamp("cpu"), "sequences": options.sequences, "context": options.context, "steps": options.steps}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
