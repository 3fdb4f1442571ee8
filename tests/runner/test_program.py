"""The step program: which models are recognised, that it computes what their modules do, and who falls back why."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mxn.core.batch import SequenceStep, StepBatch  # noqa: E402
from mxn.core.model import LoadSettings  # noqa: E402
from mxn.core.request import SamplingParams  # noqa: E402
from mxn.errors import ConfigError, UnsupportedModelError  # noqa: E402
from mxn.runner.cpu import load_cpu_runner  # noqa: E402
from mxn.runner.inputs import build_inputs  # noqa: E402

pytestmark = pytest.mark.torch

NUM_NEW = 8
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
CASES = {
    "llama": {},
    "llama, scaled rotation": {"rope_parameters": LLAMA3_ROPE},
    "llama, biases and one KV head": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "llama, wide heads": {"head_dim": 80, "intermediate_size": 100, "hidden_size": 72},
    "phi3, partial rotation": {"rope_parameters": PARTIAL_ROPE},
    "gemma3_text, two rotations": {"rope_parameters": GEMMA3_ROPE},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "granite": {"embedding_multiplier": 3.0},
    "smollm3": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 7},
}


def load(saved: Any, program: str, **settings: Any) -> Any:
    chosen = {"quantisation": "int8", "kv_bytes": 2**22, "max_num_seqs": 8, "options": (("program", program),)}
    return load_cpu_runner(
        saved,
        LoadSettings(**chosen | settings),
        cores=2,
        free_bytes=lambda: 2**32,
        progress=lambda phase, fraction: None,
    )


def prompts() -> list[list[int]]:
    """Lengths 21, 14, 1 and 70; the last shares the first sixteen tokens of the first."""
    generator = torch.Generator().manual_seed(1)
    first, second, third, last = (torch.randint(3, 199, (n,), generator=generator).tolist() for n in (21, 14, 1, 70))
    last[:16] = first[:16]
    return [first, second, third, last]


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_those_of_the_modules(
    case: str, make_model: Callable[..., Any], decode: Callable[..., list[list[int]]], kernels: None
) -> None:
    _, saved = make_model(case.split(",")[0], **CASES[case])
    modules, step = load(saved, "modules"), load(saved, "step")
    assert modules.notes[-1] == "forward: transformers modules"
    assert re.fullmatch(r"forward: step program; within \S+ of transformers modules", step.notes[-1])
    expected = decode(modules, prompts(), NUM_NEW, budget=200)
    assert len({token for tokens in expected for token in tokens}) > 4
    for budget in (200, 11):
        assert decode(step, prompts(), NUM_NEW, budget=budget) == expected
    first, _, _, last = prompts()
    assert decode(step, [first, last], NUM_NEW, budget=10, shared_tokens=16) == [expected[0], expected[3]]


def forward(runner: Any, sequences: list[tuple[int, list[int], int]]) -> torch.Tensor:
    """Logits of every token. Args: sequences: (sequence, tokens, first position); sequence i has blocks from 8 i on."""
    steps = tuple(
        SequenceStep(
            seq_id=seq,
            token_ids=tokens,
            start=start,
            block_ids=range(8 * seq, 8 * seq + 8),
            is_sampled=False,
            sampling=SamplingParams(num_prompt_logprobs=0),
            seed=0,
            num_prompt_tokens=128,
            num_output_tokens=0,
        )
        for seq, tokens, start in sequences
    )
    with torch.inference_mode():
        return runner._forward(build_inputs(StepBatch(step_id=0, sequences=steps), 16, torch.device("cpu"))).clone()


@pytest.mark.parametrize("program", ["step", "modules"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_logits_do_not_depend_on_the_batch_or_on_threads(
    family: str, program: str, make_model: Callable[..., Any], kernels: None
) -> None:
    """Bit for bit, with 8-bit weights and C++ attention: each sequence alone on one thread, and all together on two."""
    _, saved = make_model(family)
    runner, alone = load(saved, program), load(saved, program, threads=1)
    sequences = [(i, tokens, 0) for i, tokens in enumerate(prompts())]
    together = forward(runner, sequences)
    each = [forward(alone, [one]) for one in sequences]
    assert torch.equal(together, torch.cat(each))
    decodes = [(i, [9 + i], len(tokens)) for i, tokens, _ in sequences]
    together = forward(runner, decodes)
    assert torch.equal(together, torch.cat([forward(alone, [one]) for one in decodes]))
    in_parts = [forward(runner, [(3, prompts()[3][at : at + 9], at)]) for at in range(0, 70, 9)]
    assert torch.equal(torch.cat(in_parts)[-1], each[3][-1])


def test_logits_equal_those_of_the_modules(make_model: Callable[..., Any], kernels: None) -> None:
    """The same quantiser on both sides: what differs is a last bit here and there that tips a rounding."""
    _, saved = make_model("gemma2")
    modules, step = load(saved, "modules"), load(saved, "step")
    prefill = [(i, tokens, 0) for i, tokens in enumerate(prompts()[:3])]
    mixed = [(0, [9], 21), (1, [10, 11, 12], 14), (2, [13], 1)]
    for sequences in (prefill, mixed):
        found, expected = forward(step, sequences), forward(modules, sequences)
        assert float((found - expected).norm() / expected.norm()) < 0.01


def test_broken_sequence_fails_alone(make_model: Callable[..., Any], kernels: None) -> None:
    runner = load(make_model("llama")[1], "step")
    sequences = [(0, [5, 6, 7], 0), (1, [5, 100, 7], 0), (2, [8], 0)]
    expected = forward(runner, sequences)
    runner._forward._step.decoder.embedding[100] = torch.nan
    found = forward(runner, sequences)
    assert found[4:6].isnan().all()
    whole = [0, 1, 2, 6]
    assert torch.equal(found[whole], expected[whole])


def test_greedy_rows_are_answered_inside_the_step_and_broken_ones_fail(
    make_model: Callable[..., Any], kernels: None
) -> None:
    runner = load(make_model("llama")[1], "step")
    program = runner._forward
    program._step.decoder.embedding[100] = torch.nan
    steps = [
        SequenceStep(
            seq_id=seq,
            token_ids=[token],
            start=0,
            block_ids=range(8 * seq, 8 * seq + 8),
            is_sampled=seq != 2,
            sampling=SamplingParams(temperature=0.0),
            seed=0,
            num_prompt_tokens=1,
            num_output_tokens=0,
        )
        for seq, token in enumerate((5, 100, 6, 7))
    ]
    likeliest = [int(forward(runner, [(seq, [token], 0)]).argmax()) for seq, token in ((0, 5), (3, 7))]
    rows: list[int] = []
    program._step.greedy = lambda *call: rows.append(len(call[3])) or type(program._step).greedy(program._step, *call)
    result = runner.execute(StepBatch(step_id=0, sequences=tuple(steps)))
    assert rows == [3]  # only the rows asked for went through the head
    assert [(token.seq_id, token.token_id) for token in result.tokens] == [(0, likeliest[0]), (3, likeliest[1])]
    assert [seq for seq, _ in result.failed] == [1]


def test_no_rows_asked_for_still_writes_the_cache(make_model: Callable[..., Any], kernels: None) -> None:
    runner = load(make_model("llama")[1], "step")
    whole = forward(runner, [(0, [5, 6, 7, 8], 0)])[-1]
    step = SequenceStep(
        seq_id=0,
        token_ids=[5, 6, 7],
        start=0,
        block_ids=range(16, 24),
        is_sampled=False,
        sampling=SamplingParams(),
        seed=0,
        num_prompt_tokens=4,
        num_output_tokens=0,
    )
    assert runner.execute(StepBatch(step_id=0, sequences=(step,))).tokens == ()
    assert torch.equal(forward(runner, [(2, [8], 3)])[0], whole)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "has no list of one module per attention layer"),
        ("deepseek_v3", "layer 0: it has no q_proj"),
    ],
)
def test_unknown_structure_runs_its_modules_and_says_why(
    family: str, reason: str, make_model: Callable[..., Any], kernels: None
) -> None:
    _, saved = make_model(family)
    note = load(saved, "auto").notes[-1]
    assert note.startswith("forward: transformers modules; no step program: ")
    assert re.search(reason, note)
    with pytest.raises(UnsupportedModelError, match="no step program for"):
        load(saved, "step")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"residual_factor": 0.9}, "layer 1"),
        ({"rotation": None}, "layer 1"),
        ({"activation": "gelu_tanh"}, "layer 1"),
        ({"scaling": 0.2}, "layer 1"),
        ({"window": 3}, "layer 1"),
        ({"embedding_scale": 2.0}, "the embedding"),
        ({"logit_factor": 0.5}, "the output head"),
    ],
)
def test_program_that_differs_is_refused(
    change: dict[str, Any], part: str, make_config: Callable[..., Any], kernels: None
) -> None:
    from mxn_kernels.cpu_step import DecoderStep

    from mxn.attention.paged import PagedCpuAttention
    from mxn.runner import program
    from mxn.runner.attention_hook import ATTENTION_NAME, discover_layers, register
    from mxn.runner.quantise import quantise_int8

    register()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config("llama"), attn_implementation=ATTENTION_NAME)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    quantise_int8(model.eval().requires_grad_(False), threads=1)
    windows = (None, None, None)
    attention = PagedCpuAttention(discover_layers(model, windows), 8, 16, threads=1)
    with torch.inference_mode():
        seen = program.observe(model, attention, windows, program._inputs(0, 199, 16))
        decoder = program.recognise(model, attention, seen, 64)
        assert program.compare(DecoderStep(decoder, attention.workspace), seen) < program.MAX_ERROR / 10
        if part == "layer 1":
            layers = list(decoder.layers)
            layers[1] = dataclasses.replace(layers[1], **change)
            change = {"layers": tuple(layers)}
        wrong = DecoderStep(dataclasses.replace(decoder, **change), attention.workspace)
        with pytest.raises(program.NotRecognised, match=f"{part} computes something else"):
            program.compare(wrong, seen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": (("program", "fast"),)}, 'program "fast" is not offered; available: auto, modules, step'),
        ({"options": (("speed", "1"),)}, 'no option "speed"; available: kv, order, program, tune'),
        ({"quantisation": "fp32"}, 'program "step" needs quantisation int8 or int4 and attention cpu-cpp, got fp32'),
        ({"attention": "reference"}, "got int8 and reference"),
    ],
)
def test_unfit_choice_is_refused(
    settings: dict[str, Any], message: str, make_model: Callable[..., Any], kernels: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(make_model("llama")[1], "step", **settings)
