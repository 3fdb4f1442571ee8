"""Quantising tiny random models: what is replaced, what is kept, and that the answers stay close."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from mxn.attention.paged import prepare_cpu_kernels
from mxn.errors import KernelUnavailableError, ModelError
from mxn.runner.quantise import KernelRMSNorm, PackedLinear, quantise_int8

pytestmark = pytest.mark.torch

SIZES = {"vocab_size": 90, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 16}


@pytest.fixture(autouse=True)
def _kernels() -> None:
    try:
        prepare_cpu_kernels()
    except KernelUnavailableError as error:
        pytest.skip(str(error))


def tiny(kind: str, **changes: object) -> nn.Module:
    """A random model whose linear layers have the spread of trained ones."""
    sizes = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64} | changes
    if kind == "gpt2":
        sizes = {"vocab_size": 90, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(1, 21)[None]).logits.float()


@pytest.mark.parametrize(
    ("kind", "linears", "norms"),
    [("llama", 15, 5), ("qwen3", 15, 9), ("gemma3_text", 15, 13), ("gemma2", 15, 9), ("olmo2", 15, 9), ("gpt2", 9, 0)],
)
def test_every_linear_and_norm_is_replaced_and_logits_stay_close(kind: str, linears: int, norms: int) -> None:
    model = tiny(kind)
    expected = logits(model)
    report = quantise_int8(model, threads=2)
    assert (report.linears, report.norms, report.kept) == (linears, norms, [])
    found = logits(model)
    # Each of the layers in a row adds about 1 % (0.8 % per side); two blocks of four stay well under 8 %.
    assert (found - expected).norm() / expected.norm() < 0.08


def test_offset_of_gemma_norms_is_found_by_value() -> None:
    for kind, offset in (("gemma3_text", 1.0), ("llama", 0.0)):
        model = tiny(kind)
        quantise_int8(model, threads=1)
        assert {m.offset for m in model.modules() if isinstance(m, KernelRMSNorm)} == {offset}


def test_tied_head_gets_its_own_copy_and_the_embedding_stays() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    table = model.get_input_embeddings().weight.detach().clone()
    quantise_int8(model, threads=1)
    assert isinstance(model.lm_head, PackedLinear)
    assert torch.equal(model.get_input_embeddings().weight, table)


def test_float_weights_are_freed() -> None:
    model = tiny("llama")
    report = quantise_int8(model, threads=1)
    left = sum(p.numel() * 4 for p in model.parameters())
    assert report.float_bytes == left
    assert left == 4 * (90 * 64 + 5 * 64)
    buffers = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if "packed_" in name)
    assert report.weight_bytes == buffers


def test_bfloat16_model_becomes_float32_outside_the_packed_weights() -> None:
    model = tiny("llama").bfloat16()
    expected = logits(model)
    quantise_int8(model, threads=1)
    found = logits(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (found - expected).norm() / expected.norm() < 0.08


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"],
)
def test_broken_weight_is_refused_by_name(name: str) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    model.get_parameter(name).data.view(-1)[5] = torch.nan
    with pytest.raises(ModelError, match=name.removesuffix(".weight").replace(".", r"\.")):
        quantise_int8(model, threads=1)


def test_layer_that_eight_bits_would_spoil_is_kept() -> None:
    model = nn.Sequential(nn.Linear(4096, 64), nn.Linear(64, 64))
    with torch.no_grad():
        nn.init.normal_(model[0].weight)
        model[0].weight[:, 7] = 100.0  # the step becomes 100 / 127: nearly as large as the other 4,095 weights
    report = quantise_int8(model, threads=1)
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[1], PackedLinear)
    ((name, reason),) = report.kept
    assert name == "0"
    assert reason.startswith("8 bits would be off by")


def test_norm_of_another_kind_is_kept() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight * 2

    model = nn.Sequential(OddRMSNorm())
    report = quantise_int8(model, threads=1)
    assert isinstance(model[0], OddRMSNorm)
    assert report.kept == [("0", "OddRMSNorm is not a root-mean-square norm of its weight; kept")]
    assert report.lines()[1:] == ["0: OddRMSNorm is not a root-mean-square norm of its weight; kept"]
