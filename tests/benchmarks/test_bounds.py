import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxn.bench.workloads import WORKLOADS
from mxn.core.model import ModelSpec

SPEC = ModelSpec(
    architecture="llama",
    num_layers=2,
    hidden_size=8,
    vocab_size=100,
    num_heads=2,
    num_kv_heads=1,
    key_dim=4,
    value_dim=4,
    max_context=2048,
    num_parameters=2000,
)


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield
    sys.modules.pop("bounds", None)


def test_layers_are_counted_from_the_files_and_the_head_from_the_configuration(tmp_path: Path) -> None:
    from bounds import shape_of

    tensors = {"model.layers.0.a.weight": [16, 8], "model.layers.1.a.weight": [16, 8], "model.layers.0.norm": [8]}
    tensors["model.embed_tokens.weight"] = [100, 8]
    header = json.dumps({name: {"dtype": "BF16", "shape": shape} for name, shape in tensors.items()}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    shape = shape_of(str(tmp_path), SPEC)
    assert (shape.layer_weights, shape.head_weights) == (256, 800)
    assert shape.weight_bytes("int8") == 1056
    assert shape.weight_bytes("int4") == 256 * 4.5 / 8 + 800


def test_bounds_are_what_must_be_read_or_computed() -> None:
    from bounds import Ceilings, Shape, bound

    shape = Shape(spec=SPEC, layer_weights=10_000, head_weights=1000)

    def ceilings(int8_gops: float, gb_per_s: float) -> Ceilings:
        return Ceilings(
            threads=2,
            int8_gops=int8_gops,
            fp32_gflops=1e9,
            bf16_gflops=0,
            working_set_bytes=(11_000,),
            read_gb_per_s=(gb_per_s,),
        )

    one = WORKLOADS["W1"]
    kv = 2 * 2 * (4 + 4) * (128 + 64)  # layers x 16 bits x (key + value) x context half way through
    assert bound(one, shape, "int8", ceilings(1e9, 1)) == pytest.approx(1e9 / (11_000 + kv))
    prompt = WORKLOADS["W3"]
    assert bound(prompt, shape, "int8", ceilings(1, 1e9)) == pytest.approx(1e9 * 1024 / (2 * (1024 * 10_000 + 1000)))
    shared, own = WORKLOADS["W4"], WORKLOADS["W4off"]
    slow = ceilings(1, 1e9)
    assert 5 < bound(own, shape, "int8", slow) / bound(shared, shape, "int8", slow) < 10.2


def test_windowed_layers_read_no_more_than_their_window() -> None:
    from dataclasses import replace

    from bounds import Ceilings, Shape, bound

    limits = Ceilings(
        threads=1, int8_gops=1e9, fp32_gflops=1e9, bf16_gflops=0, working_set_bytes=(1,), read_gb_per_s=(1,)
    )
    whole = Shape(spec=SPEC, layer_weights=0, head_weights=0)
    windowed = Shape(spec=replace(SPEC, layer_windows=(96, None)), layer_weights=0, head_weights=0)
    rates = [bound(WORKLOADS["W1"], shape, "int8", limits) for shape in (whole, windowed)]
    assert rates[1] / rates[0] == pytest.approx(2 * 192 / (192 + 96))
