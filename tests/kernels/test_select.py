"""Who computes an op: by target, by name, from packages of others; never in silence."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from mxn_kernels import KernelUnavailable, ops, select
from mxn_kernels.select import Implementation, Registry
from mxn_kernels.target import FP8_DTYPES, Target
from mxn_kernels.testing.tolerances import POINTWISE, error

from . import toy_chip


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of its own with mxn's implementations, and the toy's by entry point."""
    entry = EntryPoint(name="toy", value="toy_chip:register", group="mxn.kernels")
    monkeypatch.setattr(EntryPoint, "load", lambda self: toy_chip.register)
    monkeypatch.setattr(select, "entry_points", lambda group: [entry])
    monkeypatch.setattr(select, "_registry", None)
    return select.registry()


def test_chip_gets_its_own_implementation(registry: Registry) -> None:
    gate, up = torch.randn(3, 10), torch.randn(3, 10)
    found = ops.silu_mul(gate, up, target=toy_chip.TOY)
    assert registry.choices["silu_mul", "toy-1", None].implementation.name == "toy"
    assert error(found, ops.silu_mul(gate, up, implementation="reference")) <= POINTWISE[torch.float32]
    x, weight = torch.randn(3, 10), torch.randn(10)
    found = ops.rms_norm(x, weight, 1e-6, residual=x, target=toy_chip.TOY)
    wanted = ops.rms_norm(x, weight, 1e-6, residual=x, implementation="reference")
    assert all(error(a, b) <= POINTWISE[torch.float32] for a, b in zip(found, wanted, strict=True))


def test_op_without_an_implementation_says_what_is_there(registry: Registry) -> None:
    with pytest.raises(KernelUnavailable) as raised:
        registry.select("rope", toy_chip.TOY)
    assert str(raised.value) == (
        "rope has no implementation for target toy-1; "
        "registered: triton (sm_*, gfx*, interpreter); reference (*; by name only)"
    )


def test_reference_is_never_chosen_by_itself(registry: Registry) -> None:
    cpu = Target(name="cpu", vendor="cpu", warp_size=1, num_multiprocessors=1, shared_memory_bytes=0)
    with pytest.raises(KernelUnavailable, match="sample has no implementation for target cpu"):
        registry.select("sample", cpu)
    assert registry.select("sample", cpu, "reference").reason == "asked for by name"


def test_name_wins_over_preference_but_not_over_the_chip(registry: Registry) -> None:
    assert registry.select("silu_mul", toy_chip.TOY, "reference").implementation.name == "reference"
    with pytest.raises(KernelUnavailable, match="silu_mul: triton does not run on toy-1"):
        registry.select("silu_mul", toy_chip.TOY, "triton")
    with pytest.raises(ValueError, match="no op is named 'softmax'; ops: write_kv, paged_decode"):
        registry.select("softmax", toy_chip.TOY)


def test_choice_is_logged_once(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mxn_kernels.select"):
        for _ in range(3):
            registry.select("silu_mul", toy_chip.TOY)
    assert [r.message for r in caplog.records] == ["silu_mul on toy-1 runs toy: first registered for the target"]


def test_package_that_fails_is_named_and_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: EntryPoint) -> None:
        raise OSError("libtoy.so is missing")

    monkeypatch.setattr(EntryPoint, "load", fail)
    monkeypatch.setattr(
        select, "entry_points", lambda group: [EntryPoint(name="toy", value="toy:register", group="mxn.kernels")]
    )
    monkeypatch.setattr(select, "_registry", None)
    found = select.registry()
    assert "kernels of toy (toy:register) cannot be used: libtoy.so is missing" in caplog.text
    assert found.implementations["rope"][0].name == "triton"
    with pytest.raises(KernelUnavailable, match=r"toy failed to load \(OSError: libtoy.so is missing\)"):
        found.select("rope", toy_chip.TOY)


def test_names_are_taken_once() -> None:
    registry = Registry()
    mine = Implementation(op="rope", name="mine", load="a:b", targets=("*",))
    registry.register(mine)
    with pytest.raises(ValueError, match="rope has an implementation 'mine' already: a:b"):
        registry.register(mine)
    registry.register(mine, replace=True)
    assert registry.implementations["rope"] == (mine,)
    with pytest.raises(KernelUnavailable, match="rope: mine cannot be imported from a:b: No module named 'a'"):
        registry.select("rope", toy_chip.TOY)


def test_target_says_which_dtypes_a_chip_has() -> None:
    assert Target.named("sm_90").supports(torch.float8_e4m3fn)
    assert not Target.named("sm_80").supports(torch.float8_e4m3fn)
    assert Target.named("gfx942").fp8_dtypes == (torch.float8_e4m3fnuz,)
    assert [Target.named("gfx950").supports(dtype) for dtype in FP8_DTYPES] == [True, False]


def test_package_imports_without_triton_and_says_what_is_missing() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from mxn_kernels import KernelUnavailable, ops
assert ops.silu_mul(torch.ones(1, 2), torch.ones(1, 2), implementation="reference").shape == (1, 2)
try:
    ops.silu_mul(torch.ones(1, 2), torch.ones(1, 2), implementation="triton")
except KernelUnavailable as fault:
    print(fault)
try:
    import mxn_kernels.triton.rope
except KernelUnavailable as fault:
    print(fault)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "silu_mul: triton does not run on cpu; "
        "registered: triton (sm_*, gfx*, interpreter); reference (*; by name only)",
        "the Triton kernels need triton: pip install 'triton>=3.6,<3.10'",
    ], done.stderr
