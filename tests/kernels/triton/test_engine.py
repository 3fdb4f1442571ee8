"""A tiny decoder on the Triton attention backend and sampler, loaded as on a chip: transformers' greedy tokens."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")
transformers = pytest.importorskip("transformers", reason="a decoder needs transformers")

from mxn.attention.base import AttentionMetadata, LayerKV  # noqa: E402
from mxn.attention.triton import TritonAttention, decodes_at_front, plan_step  # noqa: E402
from mxn.core.batch import PENDING, SequenceStep, StepBatch  # noqa: E402
from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.core.request import SamplingParams, SequenceRequest  # noqa: E402
from mxn.errors import ConfigError  # noqa: E402
from mxn.runner.gpu import load_gpu_runner  # noqa: E402
from mxn.runner.graphs import Key  # noqa: E402
from mxn.store.spec import spec_from_config  # noqa: E402

PROMPTS = [[5, 9, 17, 3, 44, 8, 2, 31, 7], [101, 7], [33, 12, 90, 4, 61]]
NUM_NEW = 3


def accelerator() -> Any:
    """The chip, or a stand-in for it on the CPU."""
    if torch.cuda.is_available():
        from mxn.runner.accelerator import CudaAccelerator

        return CudaAccelerator()
    path = Path(__file__).parents[2] / "runner" / "chip_stand_in.py"
    spec = importlib.util.spec_from_file_location("chip_stand_in", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.HostAccelerator(2**27)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Any, Model]:
    """Two layers, one of them with a window, GQA of two; and the same saved as a folder."""
    config = transformers.Qwen2Config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(std=0.6 if "embed" in name else 2.0 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path)
    spec = spec_from_config(config.to_dict())
    return model, Model(name="tiny", folder=str(tmp_path), revision="0", spec=spec)


def load(model: Model, graphs: str, prefill: str = "auto", **settings: Any) -> Any:
    chosen = {"quantisation": "fp32", "attention": "triton", "block_size": 4, "max_num_seqs": 3, "max_step_tokens": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = load_gpu_runner(
            model,
            LoadSettings(**chosen, kv_bytes=2**19, options=(("graphs", graphs), ("prefill", prefill)), **settings),
            accelerator=accelerator(),
            quantisations=("fp32",),
            progress=lambda phase, done: None,
        )
        if graphs == "wait":
            runner.graphs.start()
            runner.graphs.wait(120)
            assert [key.size for key in runner.graphs.captured] == [1, 2, 3], runner.graphs.failures
    return runner


def expected_of(reference: Any, prompt: list[int]) -> list[int]:
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("graphs", ["wait", "off"])
def test_greedy_tokens_are_those_of_transformers(graphs: str, tiny: tuple[Any, Model]) -> None:
    reference, model = tiny
    runner = load(model, graphs)
    found = generate(runner)
    assert (runner.num_replayed > 0) == (graphs == "wait")
    assert runner.attention_name == "triton"
    assert any(note.startswith("memory in GiB") for note in runner.notes)
    assert any(note.startswith("one kernel each: ") for note in runner.notes)
    assert found == [expected_of(reference, prompt) for prompt in PROMPTS]
    runner.close()


def test_the_engine_takes_steps_ahead_from_captured_graphs(tiny: tuple[Any, Model]) -> None:
    from mxn.backends.torch_executor import chip_executor
    from mxn.engine.engine import Engine, EngineSettings

    reference, model = tiny
    runner = load(model, "wait")
    ahead = []
    submit = runner.submit
    runner.submit = lambda batch: ahead.append(any(PENDING in s.token_ids for s in batch.sequences)) or submit(batch)
    engine = Engine(chip_executor(runner), EngineSettings(max_num_seqs=3, max_step_tokens=8))
    for row, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)
        engine.add(SequenceRequest(seq_id=row, prompt_token_ids=prompt, sampling=sampling))
    found: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    while engine.has_work:
        for output in engine.step():
            found[output.seq_id] += output.token_ids
    assert sum(ahead) >= NUM_NEW - 1
    assert [found[row] for row in range(len(PROMPTS))] == [expected_of(reference, prompt) for prompt in PROMPTS]
    runner.close()


def test_who_computes_prefill_is_noted_with_why_others_cannot(tiny: tuple[Any, Model]) -> None:
    _, model = tiny
    runner = load(model, "off")
    (note,) = [note for note in runner.notes if note.startswith("prefill attention by triton; ")]
    assert "flash-attention-3 cannot: " in note
    assert "flashinfer cannot: " in note
    runner.close()
    with pytest.raises(ConfigError, match="prefill by flashinfer was asked for and cannot be had: it runs on NVIDIA"):
        load(model, "off", prefill="flashinfer")


def test_sequences_that_share_a_prefix_decode_from_a_graph_of_their_own(tiny: tuple[Any, Model]) -> None:
    """Three share two blocks; launches cost nothing, so that so little sharing pays."""
    reference, model = tiny
    runner = load(model, "wait")
    runner._attention.launch_bytes = -1
    prefix = [5, 9, 17, 3, 44, 8, 2, 31]
    prompts = [[*prefix, 7], [*prefix, 90], [*prefix, 12]]
    tables = [[0, 1, 4, 5], [0, 1, 6, 7], [0, 1, 8, 9]]
    tokens = [list(prompt) for prompt in prompts]
    for row in range(3):  # prompts one by one: eight tokens a step
        first = 8 if row else 0
        for start in range(first, 9, 8):
            tokens[row] += draws(
                runner, [part(row, tokens[row][start : start + 8][: 9 - start], start, tables[row], 9)]
            )
    # Asked for here, as the interpreter, unlike a chip, runs the kernels of one thread only at a time.
    assert runner.graphs.choose(3, shares_prefix=True) == Key(3), "a plain one until it is there"
    runner.graphs.wait(120)
    for number in range(NUM_NEW - 1):
        steps = [part(row, tokens[row][-1:], 9 + number, tables[row], 9) for row in range(3)]
        for row, token in enumerate(draws(runner, steps)):
            tokens[row].append(token)
    assert runner.num_shared == NUM_NEW - 1
    assert [t[9:] for t in tokens] == [expected_of(reference, prompt) for prompt in prompts]
    runner.close()


def draws(runner: Any, steps: list[SequenceStep]) -> list[int]:
    result = runner.execute(StepBatch(step_id=0, sequences=tuple(steps)))
    assert not result.failed
    return [token.token_id for token in result.tokens]


def part(row: int, token_ids: list[int], start: int, table: list[int], num_prompt: int) -> SequenceStep:
    return SequenceStep(
        seq_id=row,
        token_ids=token_ids,
        start=start,
        block_ids=table,
        is_sampled=start + len(token_ids) >= num_prompt,
        sampling=SamplingParams(temperature=0.0),
        seed=0,
        num_prompt_tokens=num_prompt,
        num_output_tokens=max(0, start + len(token_ids) - num_prompt),
    )


def generate(runner: Any) -> list[list[int]]:
    """Prefill of all prompts in steps of eight tokens, mixed with decode, then decode alone."""
    tokens, done = [list(prompt) for prompt in PROMPTS], [0] * len(PROMPTS)
    while any(len(t) - len(p) < NUM_NEW for t, p in zip(tokens, PROMPTS, strict=True)):
        budget, steps = 8, []
        order = sorted(range(len(PROMPTS)), key=lambda i: len(tokens[i]) - done[i])
        for i in order:
            count = min(len(tokens[i]) - done[i], budget)
            if not count or len(tokens[i]) - len(PROMPTS[i]) >= NUM_NEW:
                continue
            budget -= count
            chunk = tokens[i][done[i] : done[i] + count]
            steps.append(part(i, chunk, done[i], list(range(4 * i, 4 * i + 4)), len(PROMPTS[i])))
            done[i] += count
        for token in runner.execute(StepBatch(step_id=0, sequences=tuple(steps))).tokens:
            tokens[token.seq_id].append(token.token_id)
    return [t[len(p) :] for t, p in zip(tokens, PROMPTS, strict=True)]


def test_decodes_go_to_their_kernel_when_one_has_a_long_context() -> None:
    assert decodes_at_front([1, 1, 1], [5, 9, 2]) == 3, "a step of decodes alone"
    assert decodes_at_front([1, 1, 300], [5, 9, 300]) == 0, "short contexts ride along with prefill"
    assert decodes_at_front([1, 1, 300], [5, 9000, 300]) == 2
    assert decodes_at_front([300, 1], [300, 9000]) == 0, "only those at the front"
    assert decodes_at_front([], []) == 0


def test_a_step_split_between_both_kernels_equals_one_of_prefill_alone(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    layers = [LayerKV(num_kv_heads=1, key_dim=16, value_dim=16)]
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 16), (1, 7, 16), (1, 7, 16))
    query, key, value = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    meta = AttentionMetadata(
        query_starts=torch.tensor([0, 1, 2, 7], dtype=torch.int32),
        context_lens=torch.tensor([1, 1, 5], dtype=torch.int32),
        block_table=torch.tensor([[2, 0], [0, 0], [1, 3]], dtype=torch.int32),
        slot_mapping=torch.tensor([8, 0, 4, 5, 6, 7, 12], dtype=torch.int32),
        max_query_len=5,
    )
    results = []
    for limit in (0, 2048):
        monkeypatch.setattr("mxn.attention.triton.LONG_CONTEXT", limit)
        attention = TritonAttention(layers, 4, 4, dtype=torch.float32, device=device)
        plan = plan_step(meta, attention, torch.device(device))
        assert plan.num_decodes == (2 if limit == 0 else 0)
        results.append(attention.forward(0, query, key, value, plan, scaling=0.25, window=None))
    assert torch.allclose(results[0], results[1], atol=1e-6)


def test_sequences_with_one_prefix_read_it_once(device: str) -> None:
    """Few tokens pay only where a launch is free, so launches cost nothing here."""
    from mxn_kernels.triton.launch import record_launches

    layers = [
        LayerKV(num_kv_heads=1, key_dim=16, value_dim=16),
        LayerKV(num_kv_heads=1, key_dim=16, value_dim=16, window=4),
    ]
    rows, shared = 3, 40
    table = torch.tensor([[*range(10), 10 + row] for row in range(rows)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    attention = TritonAttention(layers, 13, 4, dtype=torch.float32, device=device, num_heads=2, launch_bytes=-1)
    for cache in attention.caches:
        for part in (cache.keys, cache.values):
            part.copy_(torch.randn(part.shape, generator=generator))
    meta = AttentionMetadata(
        query_starts=torch.arange(rows + 1, dtype=torch.int32),
        context_lens=torch.full((rows,), shared + 1, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.tensor([4 * (10 + row) for row in range(rows)], dtype=torch.int32),
        max_query_len=1,
    )
    plan = plan_step(meta, attention, torch.device(device))
    assert plan.prefix is not None
    heads = [torch.randn(n, rows, 16, generator=generator).to(device) for n in (2, 1, 1)]
    with record_launches() as launches:
        shared_out = attention.forward(0, *heads, plan, scaling=0.25, window=None)
        attention.forward(1, *heads, plan, scaling=0.25, window=4)
    assert sum(launch.name == "prefix_kernel" for launch in launches) == 1, "windowed layers decode without it"
    attention.num_heads = None
    alone = plan_step(meta, attention, torch.device(device))
    assert alone.prefix is None
    assert torch.allclose(shared_out, attention.forward(0, *heads, alone, scaling=0.25, window=None), atol=1e-5)
