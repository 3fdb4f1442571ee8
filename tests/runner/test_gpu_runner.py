"""The GPU runner's Python on a CPU with the reference attention: inputs, padding, graphs, drawing, faults."""

from __future__ import annotations

import importlib.util
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")

from mxn.attention.reference import ReferenceAttention  # noqa: E402
from mxn.core.batch import PENDING, SequenceStep, StepBatch  # noqa: E402
from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.core.request import SamplingParams, SequenceRequest  # noqa: E402
from mxn.errors import ChipError, ConfigError, OutOfMemoryError  # noqa: E402
from mxn.runner.gpu_runner import GpuRunner  # noqa: E402
from mxn.runner.graphs import Key, graph_sizes  # noqa: E402
from mxn.runner.staging import Staging  # noqa: E402
from mxn.runner.torch_runner import LoadPlan, load_runner  # noqa: E402

pytestmark = pytest.mark.torch

PROMPTS = [[5, 9, 17, 3, 44, 8, 2], [101, 7], [33, 12, 90, 4, 61, 5, 5, 7, 120, 88, 3], [7, 7, 7, 19]]


def _stand_in() -> Any:
    spec = importlib.util.spec_from_file_location("chip_stand_in", Path(__file__).with_name("chip_stand_in.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HostAccelerator = _stand_in().HostAccelerator


class PlainDecode:
    """The reference attention's part in captured steps: it needs nothing more, and shares no prefixes."""

    parts: ClassVar[dict[str, Any]] = {}

    def find_groups(self, seq_ids: Any, meta: Any) -> tuple[()]:
        return ()

    def fill(self, staged: Any, groups: Any) -> None: ...

    def metadata(self, meta: Any, staged: Any, *, shares_prefix: bool) -> Any:
        return meta


@pytest.fixture
def load_on_chip() -> Callable[..., Any]:
    """Loads a model as fp32 over the reference attention, with graphs stood in for."""

    def load_it(
        model: Model,
        *,
        has_graphs: bool = True,
        accelerator: Any = None,
        takes_steps_ahead: bool = True,
        **settings: Any,
    ) -> GpuRunner:
        chip = accelerator or HostAccelerator()
        chosen = LoadSettings(**({"block_size": 4, "max_num_seqs": 8} | settings))
        plan = LoadPlan(
            device="cpu",
            dtype=torch.float32,
            quantisation="fp32",
            make_attention=partial(ReferenceAttention, dtype=torch.float32),
            block_bytes=ReferenceAttention.bytes_per_block,
            free_bytes=lambda: 2**20,
            takes_rest=True,
            make_runner=partial(
                GpuRunner,
                accelerator=chip,
                plan_step=lambda meta: meta,
                captured=PlainDecode() if has_graphs else None,
                max_num_seqs=chosen.max_num_seqs,
                sampler="reference",
                waits_for_graphs=True,
                takes_steps_ahead=takes_steps_ahead,
            ),
        )
        return load_runner(model, chosen, plan, lambda phase, fraction: None)

    return load_it


def test_sizes_are_about_a_dozen_and_end_with_the_largest_batch() -> None:
    assert graph_sizes(256) == (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    assert graph_sizes(1) == (1,)
    assert graph_sizes(5) == (1, 2, 4, 5)
    for largest in range(1, 300):
        sizes = graph_sizes(largest)
        assert sizes[-1] == largest
        assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_replayed_and_eager_steps_give_the_tokens_of_transformers(
    family: str, make_model: Any, load_on_chip: Any, decode: Any
) -> None:
    reference, model = make_model(family)
    runner = load_on_chip(model)
    runner.warm_up()
    assert [key.size for key in runner.graphs.captured] == [1, 2, 4, 6, 8]
    before = runner.num_replayed
    found = decode(runner, PROMPTS, 8, budget=7, shared_tokens=0)
    assert runner.num_replayed - before >= 4, "decode steps were replayed"
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=0.7, top_k=12, top_p=0.9),
        SamplingParams(temperature=1.3, min_p=0.05),
        SamplingParams(temperature=0.9, presence_penalty=0.7, logit_bias=((5, 2.0),)),
        SamplingParams(temperature=0.0, num_logprobs=2),
    ],
    ids=["temperature", "top-k and top-p", "min-p", "penalty and bias", "logprobs"],
)
def test_draws_are_those_of_the_torch_sampler(
    sampling: SamplingParams, make_model: Any, load: Any, load_on_chip: Any, decode: Any
) -> None:
    _, model = make_model("llama")
    options = {"budget": 9, "sampling": sampling, "seeds": [11, -5, 2**63 + 9, 0]}
    runner = load_on_chip(model)
    runner.warm_up()
    assert decode(runner, PROMPTS, 6, **options) == decode(load(model), PROMPTS, 6, **options)


def step(seq_id: int, tokens: list[int], start: int, sampling: SamplingParams, *, block: int) -> SequenceStep:
    return SequenceStep(
        seq_id=seq_id,
        token_ids=tokens,
        start=start,
        block_ids=[block],
        is_sampled=True,
        sampling=sampling,
        seed=seq_id,
        num_prompt_tokens=2,
        num_output_tokens=start,
        history=[1, 2, *tokens],
    )


def test_a_neighbour_that_asks_for_more_changes_nobody_elses_tokens(make_model: Any, load_on_chip: Any) -> None:
    _, model = make_model("llama")
    runner = load_on_chip(model)
    runner.warm_up()
    plain, special = SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, num_logprobs=1, min_tokens=9)
    steps = [step(i, [3 + i], 0, special if i == 1 else plain, block=i) for i in range(3)]
    together = runner.execute(StepBatch(step_id=1, sequences=tuple(steps)))
    assert [token.seq_id for token in together.tokens] == [0, 1, 2]
    assert together.tokens[1].logprob is not None
    for one in steps:
        (alone,) = runner.execute(StepBatch(step_id=2, sequences=(one,))).tokens
        assert alone.token_id == together.tokens[one.seq_id].token_id


@torch.inference_mode()
def test_padding_writes_nothing(make_model: Any, load_on_chip: Any) -> None:
    _, model = make_model("llama")
    runner = load_on_chip(model)
    runner.warm_up()
    for cache in (*runner._attention.keys, *runner._attention.values):
        cache.fill_(7.0)
    steps = [step(i, [3], 0, SamplingParams(temperature=0.0), block=2 * i) for i in range(3)]
    before = runner.num_replayed
    runner.execute(StepBatch(step_id=1, sequences=tuple(steps)))
    assert runner.num_replayed == before + 1, "3 sequences in the graph of 4"
    for cache in runner._attention.keys:
        touched = (cache != 7.0).flatten(1).any(1).nonzero().flatten().tolist()
        assert touched == [0, 2, 4]


@torch.inference_mode()
def test_logits_that_are_not_finite_end_only_their_sequence(make_model: Any, load_on_chip: Any) -> None:
    _, model = make_model("llama")
    runner = load_on_chip(model)
    runner.warm_up()
    greedy = SamplingParams(temperature=0.0)
    for cache in runner._attention.values:
        cache[5] = float("nan")
    good, bad = step(0, [3], 0, greedy, block=1), step(1, [3], 1, greedy, block=5)
    result = runner.execute(StepBatch(step_id=1, sequences=(good, bad)))
    assert [token.seq_id for token in result.tokens] == [0]
    assert result.failed[0][0] == 1


def test_a_step_without_its_graph_runs_at_once_while_graphs_are_captured(
    make_model: Any, load_on_chip: Any, decode: Any
) -> None:
    _, model = make_model("llama")
    chip = HostAccelerator()
    may_go = threading.Event()
    chip.gate = lambda: may_go.wait(30)
    runner = load_on_chip(model, accelerator=chip)
    runner._waits_for_graphs = False
    shapes, _ = runner.warm_up()
    assert "being captured" in shapes[-1]
    first = decode(runner, PROMPTS, 4, budget=64)
    assert (runner.num_replayed, runner.graphs.captured) == (0, ())
    may_go.set()
    runner.graphs.wait(30)
    assert tuple(key.size for key in runner.graphs.captured) == runner.graphs.sizes
    assert decode(runner, PROMPTS, 4, budget=64) == first
    assert runner.num_replayed > 0
    runner.close()


def test_a_size_that_cannot_be_captured_stays_eager(make_model: Any, load_on_chip: Any, decode: Any) -> None:
    _, model = make_model("llama")
    chip = HostAccelerator()

    def fail_first() -> None:
        if not chip.num_captures:
            chip.num_captures += 1
            raise RuntimeError("operation not permitted when stream is capturing")

    chip.gate = fail_first
    runner = load_on_chip(model, accelerator=chip, max_num_seqs=4)
    runner.warm_up()
    assert runner.graphs.captured == (Key(1), Key(2))
    assert "not permitted" in runner.graphs.failures[Key(4)]
    decode(runner, PROMPTS, 3, budget=64)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), OutOfMemoryError),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore"), ChipError),
        (RuntimeError("HIP error: the device was lost"), ChipError),
        (RuntimeError("shapes cannot be multiplied"), RuntimeError),
    ],
    ids=["out of memory", "no memory for a library", "illegal access", "lost", "a fault of the model"],
)
def test_faults_of_the_chip_are_told_from_others(
    raised: Exception, expected: type[Exception], make_model: Any, load_on_chip: Any
) -> None:
    _, model = make_model("llama")
    runner = load_on_chip(model, has_graphs=False)

    def fail(inputs: Any) -> Any:
        raise raised

    runner._forward = fail
    batch = StepBatch(step_id=1, sequences=(step(0, [3], 0, SamplingParams(), block=0),))
    with pytest.raises(expected) as caught:
        runner.execute(batch)
    assert type(caught.value) is expected


def test_prompt_logprobs_come_from_the_torch_sampler(make_model: Any, load: Any, load_on_chip: Any) -> None:
    _, model = make_model("llama")
    sampling = SamplingParams(temperature=0.0, num_prompt_logprobs=1)
    one = SequenceStep(
        seq_id=0,
        token_ids=[3, 4, 5],
        start=0,
        block_ids=[0],
        is_sampled=True,
        sampling=sampling,
        seed=0,
        num_prompt_tokens=3,
        num_output_tokens=0,
        history=[3, 4, 5],
    )
    batch = StepBatch(step_id=1, sequences=(one,))
    assert load_on_chip(model).execute(batch) == load(model).execute(batch)


def test_a_closed_runner_says_so(make_model: Any, load_on_chip: Any) -> None:
    _, model = make_model("llama")
    runner = load_on_chip(model)
    runner.warm_up()
    attention, forward = weakref.ref(runner._attention), weakref.ref(runner._forward)
    runner.close()
    assert attention() is None, "its cache is given back while the runner is still there"
    assert forward() is None
    runner.close()
    with pytest.raises(ConfigError, match="closed"):
        runner.execute(StepBatch(step_id=1, sequences=(step(0, [3], 0, SamplingParams(), block=0),)))


def through_engine(runner: GpuRunner, rules: list[SamplingParams], **fields: Any) -> tuple[list[list[int]], int]:
    """The prompts' tokens, and how many steps were submitted with tokens that the host did not know."""
    from mxn.backends.torch_executor import chip_executor
    from mxn.engine.engine import Engine, EngineSettings

    executor = chip_executor(runner)
    engine = Engine(executor, EngineSettings(max_step_tokens=9, **fields))
    num_ahead = 0
    submit = runner.submit

    def counted(batch: StepBatch) -> Any:
        nonlocal num_ahead
        num_ahead += any(PENDING in one.token_ids for one in batch.sequences)
        return submit(batch)

    runner.submit = counted
    for index, (prompt, sampling) in enumerate(zip(PROMPTS, rules, strict=True)):
        engine.add(SequenceRequest(seq_id=index, prompt_token_ids=prompt, sampling=sampling))
    found: list[list[int]] = [[] for _ in PROMPTS]
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            found[output.seq_id] += output.token_ids
        engine.check_integrity()
    return found, num_ahead


RULES = [
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(temperature=0.9, seed=5, max_tokens=7),
    SamplingParams(temperature=0.8, top_k=9, seed=6, max_tokens=12, stop_token_ids=tuple(range(0, 128, 5))),
    SamplingParams(temperature=0.7, top_p=0.9, seed=7, max_tokens=9),
]


@pytest.mark.parametrize("has_graphs", [True, False], ids=["graphs", "eager"])
def test_steps_taken_ahead_draw_the_tokens_of_steps_taken_one_by_one(
    has_graphs: bool, make_model: Any, load_on_chip: Any
) -> None:
    reference, model = make_model("llama")
    found = {}
    for looks_ahead in (True, False):
        runner = load_on_chip(model, has_graphs=has_graphs)
        runner.warm_up()
        found[looks_ahead], num_ahead = through_engine(runner, RULES, looks_ahead=looks_ahead)
        assert (num_ahead > 8) == looks_ahead
        assert (runner.num_replayed > 4) == has_graphs
    assert found[True] == found[False]
    greedy = reference.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert found[True][0] == greedy[0, len(PROMPTS[0]) :].tolist()


def test_a_sequence_that_drew_no_token_harms_nobody_in_the_step_taken_ahead(make_model: Any, load_on_chip: Any) -> None:
    _, model = make_model("llama")
    runner = load_on_chip(model)
    runner.warm_up()
    greedy = SamplingParams(temperature=0.0)
    with torch.inference_mode():
        for cache in runner._attention.values:
            cache[5] = float("nan")
    first = runner.submit(
        StepBatch(step_id=1, sequences=(step(0, [3], 0, greedy, block=1), step(1, [3], 1, greedy, block=5)))
    )
    ahead = [step(i, [PENDING], 1 + i, greedy, block=block) for i, block in ((0, 1), (1, 5))]
    second = runner.submit(StepBatch(step_id=2, sequences=tuple(ahead)))
    (token,) = first.result().tokens
    assert first.result().failed[0][0] == 1
    (after,) = second.result().tokens
    known = runner.execute(StepBatch(step_id=3, sequences=(step(0, [token.token_id], 1, greedy, block=1),)))
    assert after.token_id == known.tokens[0].token_id


def test_what_a_step_under_way_reads_on_the_host_is_left_alone() -> None:
    staging = Staging(HostAccelerator(), {"a": (torch.int32, (3,)), "b": (torch.int64, (2, 4))})
    first = staging.host
    first["a"][:] = 1
    staging.send(2)
    assert staging.host["a"] is not first["a"]
    staging.host["a"][:] = 2
    assert first["a"].tolist() == [1, 1, 1]
    assert staging.device["a"].tolist() == [1, 1, 1]
    staging.send(2)
    assert staging.device["a"].tolist() == [2, 2, 2]
    assert staging.host["a"] is first["a"]


def test_looking_ahead_can_be_switched_off(make_model: Any, load_on_chip: Any) -> None:
    from mxn.backends.base import Executor
    from mxn.backends.torch_executor import chip_executor

    _, model = make_model("llama")
    runner = load_on_chip(model)
    assert "the next step is prepared while the chip runs one" in runner.notes
    assert type(chip_executor(runner)).submit is not Executor.submit
    runner = load_on_chip(model, takes_steps_ahead=False)
    assert "one step at a time: as set" in runner.notes
    assert type(chip_executor(runner)).submit is Executor.submit
