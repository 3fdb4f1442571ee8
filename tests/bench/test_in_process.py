from collections.abc import Callable
from pathlib import Path

import pytest

from mxn.backends.fake import FAKE_W, FakeBackend
from mxn.bench.in_process import InProcessArm
from mxn.bench.runner import measure
from mxn.bench.workloads import PromptMaker, parse_workloads
from mxn.core.model import LoadSettings, Model, ModelSpec


async def test_engine_in_process_runs_the_same_workloads(
    tmp_path: Path, write_word_tokenizer: Callable[..., Path]
) -> None:
    prompts = PromptMaker(write_word_tokenizer(tmp_path), seed=0)
    spec = ModelSpec(
        architecture="llama",
        num_layers=1,
        hidden_size=8,
        vocab_size=4000,
        num_heads=1,
        num_kv_heads=1,
        key_dim=8,
        value_dim=8,
        max_context=2048,
        num_parameters=1,
    )
    model = Model(name="tiny", folder=str(tmp_path), revision="0", spec=spec)
    backend = FakeBackend()
    arm = InProcessArm.load(
        backend, backend.chips()[0], model, LoadSettings(), encode=prompts.encode, label="fake engine"
    )
    found = await measure([arm], parse_workloads("quick,W4,W4off"), prompts, repetitions=2)
    arm.close()
    by_name = {r.workload.name: r for r in found}
    assert all(r.faults == () for r in found)
    assert by_name["quick8"].num_output_tokens == 2 * 16 * 32
    assert by_name["W4off"].num_cached_tokens == 0
    cached = by_name["W4"].num_cached_tokens
    assert cached is not None
    assert cached >= 2 * 12 * 768
    assert by_name["W4"].mean_watts.value == pytest.approx(FAKE_W)
    assert by_name["W4"].mean_watts.provenance == "simulated"
