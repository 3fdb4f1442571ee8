"""Measures mxn's engine on this machine's GPU beside transformers' continuous batching: tokens/s, joules per token.

    python benchmarks/engine_gpu.py --out results.json      everything
    python benchmarks/engine_gpu.py --dry-run               the same path on a CPU, tiny shapes; its times mean nothing

Models have random weights, so no download is needed: with the end of text ignored the work is the same. Each part first
shows that the tokens are right:

    exact     float32 on the chip: greedy tokens equal to transformers' float32 on the CPU
    qwen3     Qwen3-0.6B's shape, 256 requests, inputs and outputs of 100 to 1,024 tokens (seed 0; nano-vllm's workload)
    gemma3    Gemma-3-1B's shape, 1,024 prompts of 94 tokens, 256 new ones each

Needs torch, triton and transformers, and nvidia-ml-py (or amdsmi) for joules; nothing else of mxn's dependencies.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from chip_facts import Parts, stamp  # noqa: E402

# transformers would take kernels.py in this folder for the package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks"]

import torch  # noqa: E402
import transformers  # noqa: E402

from mxn.backends.cuda import CudaBackend  # noqa: E402
from mxn.backends.gpu import GpuBackend  # noqa: E402
from mxn.backends.rocm import RocmBackend  # noqa: E402
from mxn.backends.torch_executor import chip_executor  # noqa: E402
from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.core.request import SamplingParams, SequenceRequest  # noqa: E402
from mxn.energy.reader import NullReader, PowerReader  # noqa: E402
from mxn.energy.window import EnergyWindow  # noqa: E402
from mxn.engine.engine import Engine, EngineSettings  # noqa: E402
from mxn.runner.gpu import load_gpu_runner  # noqa: E402
from mxn.store.spec import spec_from_config  # noqa: E402

MAX_GAP = 0.5
"""How far below the largest of float32's logits a half-precision token may be, in standard deviations of that row."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model's shape, its requests, how many of them the slower side gets, and memory for their keys and values."""

    name: str
    config: transformers.PreTrainedConfig
    requests: Sequence[tuple[list[int], int]]
    temperature: float
    reference_requests: int
    max_step_tokens: int
    kv_gib: float
    goals: dict[str, float]


@dataclass(kw_only=True)
class Result:
    """What one part found. state: "ok", "wrong: ..." or "not run: ..."."""

    name: str
    state: str = "ok"
    facts: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- workloads


def qwen3_work(is_dry: bool) -> Work:
    random.seed(0)
    count, longest = (6, 12) if is_dry else (256, 1024)
    shortest = 4 if is_dry else 100
    top = 100 if is_dry else 10_000
    prompts = [[random.randint(0, top) for _ in range(random.randint(shortest, longest))] for _ in range(count)]
    outputs = [random.randint(shortest, longest) for _ in range(count)]
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    shape |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960}
    if is_dry:
        shape |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 64}
    config = transformers.Qwen3Config(**shape, tie_word_embeddings=True, rope_theta=1_000_000.0, eos_token_id=None)
    return Work(
        name="qwen3",
        config=config,
        requests=list(zip(prompts, outputs, strict=True)),
        temperature=0.6,
        reference_requests=count,
        max_step_tokens=16 if is_dry else 16_384,
        kv_gib=0.01 if is_dry else 32,  # 276,793 tokens of 112 KiB are 29.6 GiB: nobody waits for room
        goals={} if is_dry else {"output_tokens_s": 20_000, "times_reference": 3},
    )


def gemma3_work(is_dry: bool) -> Work:
    generator = random.Random(1)
    count, prompt, new = (4, 9, 4) if is_dry else (1024, 94, 256)
    shape = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144, "max_position_embeddings": 32_768}
    shape |= {"sliding_window": 512, "query_pre_attn_scalar": 256}
    if is_dry:
        shape |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 2}
        shape |= {"head_dim": 32, "vocab_size": 128, "max_position_embeddings": 64, "sliding_window": 6}
        shape |= {"query_pre_attn_scalar": 32}
    top = shape["vocab_size"] - 1
    return Work(
        name="gemma3",
        config=transformers.Gemma3TextConfig(**shape, eos_token_id=None, bos_token_id=None, pad_token_id=0),
        requests=[([generator.randint(3, top) for _ in range(prompt)], new) for _ in range(count)],
        temperature=0.0,
        reference_requests=count if is_dry else 256,
        max_step_tokens=16 if is_dry else 16_384,
        kv_gib=0.01 if is_dry else 4,
        goals={} if is_dry else {"times_reference": 3},
    )


def save_random(config: transformers.PreTrainedConfig, folder: Path, dtype: torch.dtype, device: str) -> Model:
    """A model of that shape on disk, with weights wide enough that its greedy tokens vary."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.6 if "embed" in name else 2.0 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return Model(name=folder.name, folder=str(folder), revision="0", spec=spec_from_config(config.to_dict()))


# ---------------------------------------------------------------- the chip


class Machine:
    """The chip with its backend, or a CPU in its place for a dry run."""

    def __init__(self, is_dry: bool) -> None:
        self.is_dry = is_dry
        if is_dry:
            path = ROOT / "tests/runner/chip_stand_in.py"
            spec = importlib.util.spec_from_file_location("chip_stand_in", path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            self.accelerator: Any = module.HostAccelerator(560 * 2**20)
            self.quantisations: tuple[str, ...] = ("fp32",)
            self.reader: PowerReader = NullReader("a dry run on a CPU")
            return
        from mxn.runner.accelerator import CudaAccelerator

        self.accelerator = CudaAccelerator()
        backend: GpuBackend = RocmBackend() if torch.version.hip else CudaBackend()
        chips = backend.chips()
        self.reader = backend.power(chips[0]) if chips else NullReader(backend.probe().reason)
        major, minor = torch.cuda.get_device_capability()
        target = (
            torch.cuda.get_device_properties(0).gcnArchName.split(":")[0] if torch.version.hip else f"sm_{major}{minor}"
        )
        self.quantisations = backend.quantisations(target)

    @property
    def device(self) -> str:
        return str(self.accelerator.device)

    def engine(self, model: Model, work: Work, quantisation: str | None = None, **options: str) -> Engine:
        """mxn's engine over the model, graphs captured."""
        settings = LoadSettings(
            quantisation=quantisation or self.quantisations[0],
            attention="reference" if self.is_dry else "triton",
            block_size=4 if self.is_dry else 16,
            max_num_seqs=8 if self.is_dry else 256,
            max_step_tokens=work.max_step_tokens,
            context_length=None if self.is_dry else min(2048, model.spec.max_context),
            # Not all there is: the float32 model that tokens are checked with comes beside it.
            kv_bytes=int(min(work.kv_gib * 2**30, 0.6 * self.accelerator.free_bytes())),
            options=(("graphs", "wait"), *options.items()),
        )
        runner = load_gpu_runner(
            model,
            settings,
            accelerator=self.accelerator,
            quantisations=self.quantisations,
            progress=lambda phase, done: None,
            sampler="reference" if self.is_dry else None,
        )
        executor = chip_executor(runner)
        warm_up = executor.warm_up()
        say(f"  loaded: {executor.info.attention}, warm-up {warm_up.seconds:.1f} s, {', '.join(warm_up.compiled)}")
        for note in executor.info.notes:
            say(f"    {note}")
        limits = {"max_num_seqs": settings.max_num_seqs, "max_step_tokens": settings.max_step_tokens}
        self.settings = EngineSettings(**limits, fingerprint=model.name)
        return Engine(executor, self.settings)

    def one_step_at_a_time(self, engine: Engine) -> Engine:
        """The same executor under an engine that prepares a step only when the one before is in."""
        return Engine(engine.executor, replace(self.settings, looks_ahead=False))


def generate(engine: Engine, requests: Sequence[tuple[list[int], int]], temperature: float) -> list[list[int]]:
    """All requests at once through the engine; their tokens in order."""
    found: list[list[int]] = [[] for _ in requests]
    first = time.monotonic_ns()  # ids that no earlier call used
    for index, (prompt, count) in enumerate(requests):
        sampling = SamplingParams(max_tokens=count, temperature=temperature, seed=index)
        engine.add(SequenceRequest(seq_id=first + index, prompt_token_ids=prompt, sampling=sampling))
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            found[output.seq_id - first] += output.token_ids
    return found


# ---------------------------------------------------------------- parts


def exact_part(machine: Machine, folder: Path, smollm2: Path | None) -> Result:
    """float32 on the chip against transformers' float32 on the CPU, token by token."""
    work = qwen3_work(is_dry=True)
    if smollm2:
        config = transformers.AutoConfig.from_pretrained(smollm2)
        model = Model(name="smollm2", folder=str(smollm2), revision="0", spec=spec_from_config(config.to_dict()))
    else:
        model = save_random(work.config, folder / "tiny", torch.float32, "cpu")
    top = model.spec.vocab_size - 1
    generator = random.Random(2)
    requests = [([generator.randint(3, top) for _ in range(length)], 16) for length in (5, 31, 17, 2)]
    engine = machine.engine(model, work, "fp32")
    found = generate(engine, requests, 0.0)
    engine.executor.close()
    reference = transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    wanted = []
    for prompt, count in requests:
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted.append(reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist())
    equal = sum(a == b for a, b in zip(found, wanted, strict=True))
    result = Result(name="exact", facts={"model": model.name, "sequences": len(requests), "equal": equal})
    if equal < len(requests):
        result.state = f"wrong: {len(requests) - equal} of {len(requests)} sequences differ from transformers' fp32"
    return result


def check_tokens(
    model: Model, requests: Sequence[tuple[list[int], int]], found: Sequence[list[int]], device: str
) -> dict[str, Any]:
    """How far each greedy token is from the largest logit of transformers' float32, the engine's tokens given."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).to(device).eval()
    gaps, num_equal = [], 0
    for (prompt, _), tokens in zip(requests, found, strict=True):
        ids = torch.tensor([prompt + tokens], device=device)
        with torch.inference_mode():
            logits = reference(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0]
        gap = (logits.amax(-1) - chosen) / logits.std(-1)
        gaps += gap.tolist()
        num_equal += int((gap == 0).sum())
    del reference
    return {"checked_tokens": len(gaps), "equal_to_fp32": num_equal, "largest_gap": max(gaps)}


def measured_part(machine: Machine, work: Work, folder: Path, *, repeats: int, has_reference: bool) -> Result:
    result = Result(name=work.name)
    facts = result.facts
    facts["prompt_tokens"] = sum(len(prompt) for prompt, _ in work.requests)
    facts["output_tokens"] = sum(count for _, count in work.requests)
    facts["goals"] = work.goals
    dtype = torch.float32 if machine.is_dry else torch.bfloat16
    model = save_random(work.config, folder / work.name, dtype, "cpu" if machine.is_dry else machine.device)
    engine = machine.engine(model, work)
    info = engine.executor.info
    facts |= {"attention": info.attention, "quantisation": info.quantisation, "notes": list(info.notes)}

    sample = [(prompt[:64], 24 if not machine.is_dry else 4) for prompt, _ in work.requests[:4]]
    facts |= check_tokens(model, sample, generate(engine, sample, 0.0), machine.device)
    if not facts["largest_gap"] <= (MAX_GAP if dtype is torch.bfloat16 else 1e-4):
        result.state = f"wrong: a token is {facts['largest_gap']:.2g} standard deviations below fp32's largest logit"

    facts["runs"] = []
    for _ in range(repeats):
        engine.reset_prefix_cache()
        facts["runs"].append(one_run(machine, engine, work))
        say(f"  {work.name}: {line_of(facts['runs'][-1])}")
    middle = statistics.median(run["output_tokens_s"] for run in facts["runs"])
    facts["output_tokens_s"] = middle
    facts["one_step_at_a_time"] = one_run(machine, machine.one_step_at_a_time(engine), work)
    say(f"  {work.name}, one step at a time: {line_of(facts['one_step_at_a_time'])}")
    engine.executor.close()
    del engine
    if not machine.is_dry:
        torch.cuda.empty_cache()
    if has_reference:
        facts["reference"] = reference_run(machine, work, model, dtype)
        rate = facts["reference"].get("output_tokens_s")
        facts["times_reference"] = middle / rate if rate else None
    return result


def one_run(machine: Machine, engine: Engine, work: Work) -> dict[str, Any]:
    runner = engine.executor._runner
    before = (runner.num_replayed, runner.num_eager, engine.stats.num_steps, engine.stats.busy_s)
    window = EnergyWindow([machine.reader])
    begin_s = time.monotonic()
    found = generate(engine, work.requests, work.temperature)
    seconds = time.monotonic() - begin_s
    energy = window.end()
    count = sum(map(len, found))
    assert [len(tokens) for tokens in found] == [wanted for _, wanted in work.requests]
    return {
        "seconds": seconds,
        "output_tokens_s": count / seconds,
        "steps": engine.stats.num_steps - before[2],
        "replayed": runner.num_replayed - before[0],
        "eager": runner.num_eager - before[1],
        "busy_s": engine.stats.busy_s - before[3],
        **energy_of(energy, count),
    }


def energy_of(energy: Any, num_tokens: int) -> dict[str, Any]:
    """Joules of the window, or why there are none; never 0 for unknown."""
    joules = energy.energy_j
    if joules.value is None:
        return {"joules": None, "joules_per_output_token": None, "energy_source": joules.source}
    per_token = joules.value / num_tokens
    return {"joules": joules.value, "joules_per_output_token": per_token, "energy_source": joules.source}


def reference_run(machine: Machine, work: Work, model: Model, dtype: torch.dtype) -> dict[str, Any]:
    """transformers' continuous batching over the first requests; its warm-up is not counted."""
    requests = work.requests[: work.reference_requests]
    facts: dict[str, Any] = {"requests": len(requests), "transformers": transformers.__version__}
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype).to(machine.device).eval()
        facts["attention"] = str(loaded.config._attn_implementation)
        config = transformers.GenerationConfig(
            max_new_tokens=max(count for _, count in requests),
            do_sample=work.temperature > 0,
            temperature=work.temperature or 1.0,
            eos_token_id=-1,
            pad_token_id=0,
        )
        small = {"num_blocks": 64, "max_batch_tokens": 64} if machine.is_dry else {}
        batching = transformers.ContinuousBatchingConfig(**small)
        with loaded.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, timeout=5
        ) as manager:
            window = EnergyWindow([machine.reader])
            begin_s = time.monotonic()
            for prompt, count in requests:
                manager.add_request(prompt, max_new_tokens=count)
            num_finished = num_tokens = 0
            while num_finished < len(requests):
                answer = manager.get_result(timeout=1)
                if answer is not None and answer.is_finished():
                    num_finished += 1
                    num_tokens += len(answer.generated_tokens)
                elif answer is None and not manager.is_running():
                    raise RuntimeError("its generation thread ended early")
            seconds = time.monotonic() - begin_s
            energy = window.end()
        facts |= {"seconds": seconds, "output_tokens": num_tokens, "output_tokens_s": num_tokens / seconds}
        facts |= energy_of(energy, max(1, num_tokens))
        say(f"  transformers: {line_of(facts)}")
    except Exception as fault:  # another library's failure is a cell of the table, not the end of the run
        facts["state"] = f"failed: {type(fault).__name__}: {str(fault)[:300]}"
        say(f"  transformers: {facts['state']}")
    return facts


# ---------------------------------------------------------------- the command


def line_of(run: dict[str, Any]) -> str:
    joules = run.get("joules_per_output_token")
    energy = f"{joules:.3f} J/token" if joules else f"joules unavailable: {run.get('energy_source', 'not asked')}"
    return f"{run['output_tokens_s']:.0f} output tokens/s in {run['seconds']:.1f} s, {energy}"


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write everything as JSON to this file")
    parser.add_argument("--only", choices=["exact", "qwen3", "gemma3"], help="one part")
    parser.add_argument("--repeats", type=int, default=2, help="runs of mxn's engine per workload (2)")
    parser.add_argument("--no-reference", action="store_true", help="leave transformers' continuous batching out")
    parser.add_argument(
        "--smollm2", type=Path, help="folder of SmolLM2's weights for the exact part, instead of a tiny model"
    )
    parser.add_argument("--limit-s", type=float, default=1e9, help="start no further part after so many seconds")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: the path, not the speed")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("this machine has no CUDA or ROCm chip; --dry-run runs the same path on a CPU")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    machine = Machine(options.dry_run)
    clock = Parts(options.limit_s)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        works = {"qwen3": qwen3_work, "gemma3": gemma3_work}
        parts: dict[str, Callable[[], Result]] = {"exact": lambda: exact_part(machine, folder, options.smollm2)}
        for key, make in works.items():
            parts[key] = lambda make=make: measured_part(
                machine, make(options.dry_run), folder, repeats=options.repeats, has_reference=not options.no_reference
            )
        for key, run in parts.items():
            if options.only not in (None, key):
                continue
            results.append(clock.run(key, run, lambda name, state: Result(name=name, state=state)))
            say(f"{key}: {results[-1].state}")
            if options.out:
                facts = stamp("cpu" if options.dry_run else "cuda")
                report = {**facts, "is_dry_run": options.dry_run, "parts": [asdict(r) for r in results]}
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    machine.reader.close()
    return 1 if any(not result.state.startswith(("ok", "not run")) for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
