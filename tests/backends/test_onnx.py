"""The ONNX backend on tiny exported decoders, beside transformers, and on graphs and settings it must refuse."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")
import onnx  # noqa: E402

from mxn.backends.base import SlotKV  # noqa: E402
from mxn.backends.onnx import ARCHITECTURES, OnnxBackend, OnnxExecutor  # noqa: E402
from mxn.core.batch import SequenceStep, StepBatch, StepResult  # noqa: E402
from mxn.core.model import LoadSettings, Model, ModelSpec  # noqa: E402
from mxn.core.request import SamplingParams, SequenceRequest  # noqa: E402
from mxn.engine.engine import Engine, EngineSettings  # noqa: E402
from mxn.errors import (  # noqa: E402
    BackendError,
    ConfigError,
    ModelError,
    MxnError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from mxn.runner.onnx.graph import check_graph_file, read_graph  # noqa: E402
from mxn.runner.onnx.load import may_spin  # noqa: E402
from mxn.store.graphs import GraphOptions, exported_graph  # noqa: E402
from mxn.store.spec import spec_from_config  # noqa: E402

pytestmark = [pytest.mark.torch]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0, "residual_multiplier": 0.5},
}
USUAL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
PROMPTS = [[5, 9, 3], [7] * 11, list(range(20, 43)), [5, 9, 3, 8, 1, 4, 1]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("MXN_CACHE_DIR", str(cache))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_folder: Path) -> Callable[..., tuple[Any, Model]]:
    """A tiny random model and its folder; each family is made once."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made: dict[str, tuple[Any, Model]] = {}

    def make_it(family: str) -> tuple[Any, Model]:
        if family not in made:
            config = CONFIG_MAPPING[family](**(USUAL | FAMILIES[family]))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
                for name, parameter in model.named_parameters():
                    if parameter.ndim >= 2:  # wide enough that greedy tokens vary
                        parameter.data.normal_(std=0.6 if "embed" in name else 2.0 * parameter.shape[-1] ** -0.5)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            shutil.copy(byte_tokenizer_folder / "tokenizer.json", folder)
            shutil.copy(byte_tokenizer_folder / "tokenizer_config.json", folder)
            spec = spec_from_config(config.to_dict())
            made[family] = model, Model(name=family, folder=str(folder), revision=family, spec=spec)
        return made[family]

    return make_it


def load(model: Model, **fields: Any) -> OnnxExecutor:
    backend = OnnxBackend()
    options = tuple((key, str(value)) for key, value in fields.pop("options", {}).items())
    settings = LoadSettings(**{"quantisation": "fp32", "max_num_seqs": 4, "threads": 1, **fields}, options=options)
    executor = backend.load(model, settings, backend.chips(), lambda phase, fraction: None)
    assert isinstance(executor, OnnxExecutor)
    return executor


def generate(
    executor: OnnxExecutor, prompts: Sequence[Sequence[int]], count: int, *, max_step_tokens: int = 5, **sampling: Any
) -> dict[int, list[Any]]:
    """Tokens of each prompt (with logprobs when asked for) through the engine, in chunks, all at once."""
    engine = Engine(executor, EngineSettings(has_mixed_steps=False, max_step_tokens=max_step_tokens))
    params = SamplingParams(**{"max_tokens": count, "temperature": 0.0, **sampling})
    for i, prompt in enumerate(prompts):
        engine.add(SequenceRequest(seq_id=i, prompt_token_ids=list(prompt), sampling=params))
    found: dict[int, list[Any]] = {i: [] for i in range(len(prompts))}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            found[output.seq_id] += output.logprobs or output.token_ids
    return found


def reference(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(family: str, make: Callable[..., Any]) -> None:
    hf, model = make(family)
    executor = load(model)
    assert generate(executor, PROMPTS, 12) == {i: reference(hf, p, 12) for i, p in enumerate(PROMPTS)}


def test_every_family_that_is_offered_is_tested() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


def test_logprobs_are_those_of_transformers(make: Callable[..., Any]) -> None:
    hf, model = make("llama")
    found = generate(load(model), PROMPTS, 3, num_logprobs=4)
    for i, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for entry in found[i]:
            with torch.inference_mode():
                want = hf(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert entry.logprob == pytest.approx(want[entry.token_id].item(), abs=1e-4)
            assert [t for t, _ in entry.top] == want.topk(4).indices.tolist()
            ids.append(entry.token_id)


def test_prompt_logprobs_are_those_of_transformers(make: Callable[..., Any]) -> None:
    hf, model = make("llama")
    engine = Engine(load(model), EngineSettings(has_mixed_steps=False, max_step_tokens=4))
    prompt = PROMPTS[2]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, num_prompt_logprobs=1)
    engine.add(SequenceRequest(seq_id=0, prompt_token_ids=prompt, sampling=sampling))
    [output] = [output for _ in range(20) for output in engine.step()]
    with torch.inference_mode():
        want = hf(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(output.prompt_logprobs[1:], 1):
        assert entry is not None
        assert entry.logprob == pytest.approx(want[position - 1, prompt[position]].item(), abs=1e-4)


def test_a_cached_prefix_changes_no_token(make: Callable[..., Any]) -> None:
    hf, model = make("llama")
    shared = list(range(40, 80))
    prompts = [[*shared, i, i] for i in (1, 2, 3, 1)]
    assert generate(load(model), prompts, 6) == {i: reference(hf, p, 6) for i, p in enumerate(prompts)}


def test_seeds_give_the_same_tokens_in_any_company(make: Callable[..., Any]) -> None:
    _, model = make("llama")
    executor = load(model)
    alone = generate(executor, PROMPTS[:1], 10, temperature=1.0, seed=5)
    assert generate(executor, PROMPTS, 10, temperature=1.0, seed=5)[0] == alone[0]


@pytest.mark.parametrize("slots", [[0, 1, 2], [0, 2], [3, 0, 1], [1], [0, 5]])
def test_any_slots_may_decode_and_the_others_keep_what_they_hold(slots: list[int], make: Callable[..., Any]) -> None:
    hf, model = make("llama")
    executor = load(model, context_length=64, max_num_seqs=6)
    assert executor.kv == SlotKV(num_slots=6, max_tokens=64)
    prompts = [*PROMPTS, [1, 2], [3, 1, 4, 1, 5]]
    tokens = [list(p) for p in prompts]
    for slot in range(6):
        tokens[slot].append(step(executor, [(slot, tokens[slot], 0)])[slot])
    for decoding in (slots, slots, range(6)):
        drawn = step(executor, [(slot, tokens[slot][-1:], len(tokens[slot]) - 1) for slot in decoding])
        for slot, token in drawn.items():
            tokens[slot].append(token)
    for slot, prompt in enumerate(prompts):
        assert tokens[slot][len(prompt) :] == reference(hf, prompt, len(tokens[slot]) - len(prompt))


def test_a_sequence_whose_logits_are_not_finite_fails_alone(make: Callable[..., Any]) -> None:
    _, model = make("llama")
    executor = load(model)
    for slot in range(2):
        step(executor, [(slot, PROMPTS[slot], 0)])
    for cache in executor._runner._caches:
        cache[1, :, 0] = np.nan
    steps = [make_step(slot, [3], len(PROMPTS[slot])) for slot in range(2)]
    result = executor.execute(StepBatch(step_id=0, sequences=tuple(steps)))
    assert [token.seq_id for token in result.tokens] == [0]
    assert [seq_id for seq_id, _ in result.failed] == [1]


def test_prompts_may_run_on_a_second_graph_over_the_same_slots(make: Callable[..., Any]) -> None:
    _, model = make("llama")
    executor = load(model, options={"prefill": "int8"})
    assert executor.info.quantisation == "fp32, prompts int8"
    assert any("prompts run on the int8 graph" in note for note in executor.info.notes)
    found = generate(executor, PROMPTS, 1, max_step_tokens=64)
    assert found == generate(load(model, quantisation="int8"), PROMPTS, 1, max_step_tokens=64)


def test_a_second_load_finds_the_graph_and_needs_no_exporter(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = make("llama")
    options = GraphOptions(precision="fp32")
    made = exported_graph(model, options, progress=lambda phase, fraction: None)
    monkeypatch.setattr("mxn.store.graphs._builder_version", lambda: None)
    again = exported_graph(model, options, progress=lambda phase, fraction: None, command=("false",))
    assert again.path == made.path
    with pytest.raises(ModelError, match=r"mxn\[onnx\]"):
        exported_graph(model, GraphOptions(precision="fp16"), progress=lambda phase, fraction: None)


def test_an_export_that_fails_leaves_nothing_behind(make: Callable[..., Any], tmp_path: Path) -> None:
    _, model = make("llama")
    script = "import sys, pathlib; pathlib.Path(sys.argv[2], 'model.onnx').write_text('x'); sys.exit('no room left')"
    command = (sys.executable, "-c", script)
    with pytest.raises(ModelError, match=r"could not be exported to int8: .*no room left"):
        exported_graph(
            model, GraphOptions(precision="int8"), progress=lambda p, f: None, command=command, cache=tmp_path
        )
    assert not [path for path in tmp_path.rglob("*") if path.name == "model.onnx"]


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def graph_file(make: Callable[..., Any], tmp_path: Path) -> Path:
    """A copy of an exported graph that may be damaged."""
    _, model = make("llama")
    made = exported_graph(model, GraphOptions(precision="fp32"), progress=lambda phase, fraction: None)
    shutil.copytree(made.path.parent, tmp_path / "graph")
    return tmp_path / "graph" / "model.onnx"


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/weights", "..", "a\\b", ""])
def test_weights_outside_the_graphs_folder_are_refused(location: str, graph_file: Path) -> None:
    model = onnx.load_model(graph_file, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    graph_file.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the graph's folder"):
        read_graph(graph_file, key_dim=16, value_dim=16)


def test_outside_weights_hidden_in_a_node_are_found(graph_file: Path) -> None:
    model = onnx.load_model(graph_file, load_external_data=False)
    tensor = onnx.TensorProto(name="hidden", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["x"], value=tensor)], "inner", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["x"], then_branch=inner, else_branch=inner))
    graph_file.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="tensor hidden lies at"):
        check_graph_file(graph_file)


def test_links_are_refused(graph_file: Path, tmp_path: Path) -> None:
    data = graph_file.with_name("model.onnx.data")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="a link"):
        check_graph_file(graph_file)


def test_damaged_files_are_named(graph_file: Path) -> None:
    data = graph_file.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ModelError, match="it is cut off"):
        check_graph_file(graph_file)
    data.unlink()
    with pytest.raises(ModelError, match=r"weights of model\.onnx are missing"):
        check_graph_file(graph_file)
    graph_file.write_bytes(b"\x08nonsense" * 9)
    with pytest.raises(ModelError, match="damaged"):
        check_graph_file(graph_file)
    graph_file.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        check_graph_file(graph_file)


def test_a_graph_of_another_kind_is_refused(graph_file: Path) -> None:
    ids, logits = (onnx.helper.make_tensor_value_info(name, 7, [1]) for name in ("input_ids", "logits"))
    node = onnx.helper.make_node("Identity", ["input_ids"], ["logits"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [ids], [logits])), graph_file)
    with pytest.raises(UnsupportedModelError, match="GroupQueryAttention"):
        read_graph(graph_file, key_dim=16, value_dim=16)


@pytest.mark.parametrize(("taken", "spins"), [(0.02, True), (0.6, False)])
def test_threads_spin_only_where_they_have_the_cores_to_themselves(
    taken: float, spins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxn.runner.onnx.load.watch_others", lambda: lambda: taken)
    notes: list[str] = []
    assert may_spin("auto", notes) is spins
    assert f"other processes took {taken:.0%} of the cores" in notes[0]
    assert (may_spin("on", notes), may_spin("off", notes), len(notes)) == (True, False, 1)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"options": {"provider": "cuda"}}, BackendError, r"available: cpu.*onnxruntime-gpu"),
        ({"options": {"provider": "abacus"}}, ConfigError, "available: cpu, cuda"),
        ({"options": {"typo": "1"}}, ConfigError, "has no option"),
        ({"options": {"fallback": "maybe"}}, ConfigError, "available: refuse, allow"),
        ({"options": {"spinning": "fast"}}, ConfigError, "available: auto, on, off"),
        ({"quantisation": "bf16"}, ConfigError, "available: auto, int4, int8, fp32"),
        ({"kv_bytes": 1000}, OutOfMemoryError, "less than one slot of 128 tokens"),
        ({"context_length": 4096}, ConfigError, "over the 128 tokens"),
    ],
)
def test_settings_that_cannot_be_met_are_named(
    fields: dict[str, Any], error: type[MxnError], text: str, make: Callable[..., Any]
) -> None:
    _, model = make("llama")
    with pytest.raises(error, match=text):
        load(model, **fields)


def test_too_little_memory_is_told_before_a_session_is_opened(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = make("llama")
    monkeypatch.setattr("mxn.backends.onnx.available_memory_bytes", lambda: 10_000)
    with pytest.raises(OutOfMemoryError, match="GiB is free"):
        load(model)


def test_unproven_architectures_and_sliding_windows_are_refused() -> None:
    backend = OnnxBackend()
    [chip] = backend.chips()
    assert backend.supports(make_spec("llama"), chip).verdict == "yes"
    assert "no proven export" in backend.supports(make_spec("gpt2"), chip).reasons[0]
    assert "sliding windows" in backend.supports(make_spec("mistral", (7, None)), chip).reasons[0]


def test_the_estimated_kv_cache_is_the_one_that_loading_makes(make: Callable[..., Any]) -> None:
    _, model = make("llama")
    backend = OnnxBackend()
    [chip] = backend.chips()
    estimate = backend.estimate(model.spec, LoadSettings(quantisation="fp32", max_num_seqs=4), chip)
    assert estimate.kv_cache.value == load(model).info.kv_bytes


def make_spec(architecture: str, windows: tuple[int | None, ...] = ()) -> ModelSpec:
    return ModelSpec(
        architecture=architecture,
        num_layers=2,
        hidden_size=64,
        vocab_size=199,
        num_heads=4,
        num_kv_heads=2,
        key_dim=16,
        value_dim=16,
        max_context=128,
        num_parameters=1000,
        layer_windows=windows,
    )


def make_step(slot: int, token_ids: list[int], start: int) -> SequenceStep:
    return SequenceStep(
        seq_id=slot,
        token_ids=token_ids,
        start=start,
        block_ids=(),
        slot=slot,
        is_sampled=True,
        sampling=SamplingParams(temperature=0.0),
        seed=0,
        num_prompt_tokens=start + len(token_ids),
        num_output_tokens=0,
    )


def step(executor: OnnxExecutor, parts: list[tuple[int, list[int], int]]) -> dict[int, int]:
    """One step; (slot, tokens, start) of each sequence. Returns the tokens drawn, by slot."""
    batch = StepBatch(step_id=0, sequences=tuple(make_step(*part) for part in parts))
    result: StepResult = executor.execute(batch)
    assert not result.failed
    return {token.seq_id: token.token_id for token in result.tokens}
