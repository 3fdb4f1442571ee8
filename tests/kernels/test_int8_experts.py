"""int8 experts: equal to the reference token by token, whoever else is in the batch and whichever experts stay idle."""

from __future__ import annotations

import pytest
import torch
from mxn_kernels.cpu import Workspace
from mxn_kernels.int8_experts import (
    GELU_TANH,
    SILU,
    Gate,
    Int8Experts,
    int8_experts,
    int8_experts_reference,
)
from mxn_kernels.int8_linear import pack_int8
from torch.nn import functional

pytestmark = pytest.mark.torch

CLAMPED = Gate(slope=1.702, limit=7.0, shift=1.0)


def made(
    workspace: Workspace, *, num_experts: int, hidden: int, inner: int, gate: Gate = SILU
) -> tuple[Int8Experts, list[tuple[torch.Tensor, ...]]]:
    """Experts with biases, packed and as floats."""
    generator = torch.Generator().manual_seed(num_experts * 7919 + hidden * 31 + inner)
    floats = []
    for _ in range(num_experts):
        shapes = ((2 * inner, hidden), (2 * inner,), (hidden, inner), (hidden,))
        floats.append(tuple(torch.randn(*shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes))
    gate_up = [pack_int8(w, b, workspace=workspace) for w, b, _, _ in floats]
    down = [pack_int8(w, b, workspace=workspace) for _, _, w, b in floats]
    return Int8Experts(gate_up, down, gate), floats


def routed(tokens: int, num_experts: int, top_k: int, hidden: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, num_experts, generator=generator)
    weights, chosen = scores.topk(top_k, dim=-1)
    return torch.randn(tokens, hidden, generator=generator), chosen, weights


@pytest.mark.parametrize("gate", [SILU, GELU_TANH, CLAMPED], ids=["silu", "gelu", "clamped"])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (70, 33), (5, 3)])
@pytest.mark.parametrize("tokens", [0, 1, 13, 50])
def test_equals_the_reference(workspace: Workspace, tokens: int, hidden: int, inner: int, gate: Gate) -> None:
    experts, _ = made(workspace, num_experts=5, hidden=hidden, inner=inner, gate=gate)
    x, chosen, weights = routed(tokens, 5, 2, hidden)
    found = int8_experts(3 * x, chosen, weights, experts, workspace=workspace)
    expected = int8_experts_reference(3 * x, chosen, weights, experts)
    # A last bit of the activation may tip a rounding to the next 127th of a row's peak.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.02)
    if tokens:
        assert (found - expected).norm() / expected.norm() < 2e-3


def test_is_within_int8_error_of_float64(workspace: Workspace) -> None:
    experts, floats = made(workspace, num_experts=4, hidden=128, inner=192)
    x, chosen, weights = routed(40, 4, 2, 128)
    expected = torch.zeros(40, 128, dtype=torch.float64)
    for token in range(40):
        for choice in range(2):
            gate_up, gate_up_bias, down, down_bias = (t.double() for t in floats[int(chosen[token, choice])])
            g, u = (gate_up @ x[token].double() + gate_up_bias).chunk(2)
            expected[token] += weights[token, choice] * (down @ (functional.silu(g) * u) + down_bias)
    found = int8_experts(x, chosen, weights, experts, workspace=workspace)
    # Three products of 0.8 % a side in a row.
    assert (found.double() - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize(
    ("gate", "known"),
    [
        (SILU, lambda g, u: functional.silu(g) * u),
        (GELU_TANH, lambda g, u: functional.gelu(g, approximate="tanh") * u),
        (
            CLAMPED,
            lambda g, u: (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)),
        ),
    ],
    ids=["silu", "gelu", "clamped"],
)
def test_gates_are_the_activations_they_stand_for(gate: Gate, known: object) -> None:
    g, u = torch.linspace(-12, 12, 997), torch.linspace(9, -9, 997)
    torch.testing.assert_close(gate(g, u), known(g, u), rtol=1e-5, atol=1e-6)


def test_all_tokens_may_choose_one_expert(workspace: Workspace) -> None:
    experts, _ = made(workspace, num_experts=6, hidden=64, inner=32)
    x, _, weights = routed(13, 6, 1, 64)
    chosen = torch.full((13, 1), 4)
    found = int8_experts(x, chosen, weights, experts, workspace=workspace)
    expected = int8_experts_reference(x, chosen, weights, experts)
    assert (found - expected).norm() / expected.norm() < 2e-3


def test_row_does_not_depend_on_its_neighbours(workspace: Workspace) -> None:
    experts, _ = made(workspace, num_experts=8, hidden=320, inner=256)
    x, chosen, weights = routed(29, 8, 3, 320)
    together = int8_experts(x, chosen, weights, experts, workspace=workspace)
    for rows in (slice(0, 1), slice(3, 9), slice(28, 29)):
        alone = int8_experts(x[rows], chosen[rows], weights[rows], experts, workspace=workspace)
        assert torch.equal(alone, together[rows])
    other = Workspace(3, workspace.library.isa)
    assert torch.equal(int8_experts(x, chosen, weights, experts, workspace=other), together)


def test_broken_row_stays_alone(workspace: Workspace) -> None:
    experts, _ = made(workspace, num_experts=3, hidden=64, inner=32)
    x, chosen, weights = routed(7, 3, 2, 64)
    whole = int8_experts(x, chosen, weights, experts, workspace=workspace)
    x[4, 9] = torch.nan
    found = int8_experts(x, chosen, weights, experts, workspace=workspace)
    assert found[4].isnan().all()
    kept = [0, 1, 2, 3, 5, 6]
    assert torch.equal(found[kept], whole[kept])


def test_what_does_not_fit_is_refused(workspace: Workspace) -> None:
    experts, _ = made(workspace, num_experts=3, hidden=64, inner=32)
    x, chosen, weights = routed(2, 3, 2, 64)
    for bad in (3, -1):
        wrong = chosen.clone()
        wrong[1, 0] = bad
        with pytest.raises(ValueError, match=rf"chosen\[1, 0\] is {bad}, expected 0 to 2"):
            int8_experts(x, wrong, weights, experts, workspace=workspace)
    with pytest.raises(ValueError, match="x must be float32"):
        int8_experts(x[:, :63], chosen, weights, experts, workspace=workspace)
    with pytest.raises(ValueError, match="weights must be float32"):
        int8_experts(x, chosen, weights[:1], experts, workspace=workspace)
    other, _ = made(workspace, num_experts=1, hidden=64, inner=48)
    with pytest.raises(ValueError, match="expert 1 must be 64 x 64 and 64 x 32"):
        Int8Experts([experts.gate_up[0], other.gate_up[0]], [experts.down[0], other.down[0]], SILU)
