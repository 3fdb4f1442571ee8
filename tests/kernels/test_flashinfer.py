"""The FlashInfer adapter: when it is refused, and what it hands over, read back by attention in plain torch."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn_kernels import KernelUnavailable, flashinfer_attention, ops, select  # noqa: E402
from mxn_kernels.flashinfer_attention import ragged_prefill, why_not_flashinfer  # noqa: E402
from mxn_kernels.kv_cache import KVCache  # noqa: E402
from mxn_kernels.ops.attention_reference import attend  # noqa: E402
from mxn_kernels.target import Target  # noqa: E402
from mxn_kernels.testing.batches import make_batch  # noqa: E402
from mxn_kernels.testing.tolerances import ATTENTION, error  # noqa: E402

H100 = Target.named("sm_90")


class Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper as documented, computed in torch from what it is given."""

    plans: list[tuple[Any, ...]]

    def __init__(self, workspace: torch.Tensor, layout: str) -> None:
        assert layout == "HND"
        assert workspace.dtype is torch.uint8

    def plan(
        self, starts: Any, pages: Any, ids: Any, last: Any, heads: int, kv_heads: int, dim: int, page: int, **rules: Any
    ) -> None:
        assert rules.pop("causal")
        assert all(tensor.dtype is torch.int32 for tensor in (starts, pages, ids, last))
        assert bool(((last >= 0) & (last <= page)).all())
        self.batch, self.shape, self.rules = (starts, pages, ids, last), (heads, kv_heads, dim, page), rules
        Wrapper.plans.append(self.batch)

    def run(self, query: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        starts, pages, ids, last = (tensor.tolist() for tensor in self.batch)
        out = torch.empty_like(query)
        for seq in range(len(last)):
            blocks = ids[pages[seq] : pages[seq + 1]]
            context = max(0, len(blocks) - 1) * self.shape[3] + last[seq]
            keys, values = (cache[blocks].transpose(1, 2).flatten(0, 1)[:context] for cache in caches)
            rows = slice(starts[seq], starts[seq + 1])
            position = torch.arange(context)
            own = position[context - (rows.stop - rows.start) :, None]
            visible = position <= own
            if self.rules["window_left"] >= 0:
                visible &= position >= own - self.rules["window_left"]
            options = {"scaling": self.rules["sm_scale"], "softcap": self.rules["logits_soft_cap"], "sinks": None}
            out[rows], _ = attend(query[rows], keys, values, visible, **options)
        return out


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer_attention, "_WORKSPACE_BYTES", 64)
    flashinfer_attention._plans.cache_clear()
    Wrapper.plans = []


def caches(dtype: torch.dtype = torch.bfloat16, dim: int = 128, value_dim: int | None = None) -> list[KVCache]:
    return [KVCache.allocate(1, block_size=16, num_kv_heads=1, key_dim=dim, value_dim=value_dim, dtype=dtype)]


def test_it_is_refused_with_the_reason() -> None:
    if importlib.util.find_spec("flashinfer") is None:
        assert why_not_flashinfer(H100, caches()) == "the Python module flashinfer is not installed"
    assert "this is gfx942" in str(why_not_flashinfer(Target.named("gfx942"), caches()))


def test_caches_it_cannot_serve_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert why_not_flashinfer(H100, caches()) is None
    assert "found torch.float32" in str(why_not_flashinfer(H100, caches(torch.float32)))
    assert "found 80 and 80" in str(why_not_flashinfer(H100, caches(dim=80)))
    assert "found 128 and 64" in str(why_not_flashinfer(H100, caches(value_dim=64)))


def test_it_runs_only_when_asked_for_by_name_and_on_a_chip_it_knows() -> None:
    registry = select.registry()
    assert next(i for i in registry.implementations["ragged_prefill"] if i.name == "flashinfer").by_name_only
    with pytest.raises(KernelUnavailable, match="flashinfer does not run on gfx942"):
        registry.select("ragged_prefill", Target.named("gfx942"), "flashinfer")


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("rules", [{}, {"window": 7}, {"softcap": 4.0}], ids=["plain", "window", "softcap"])
def test_what_it_is_given_is_the_batch(rules: dict[str, Any]) -> None:
    batch = make_batch((20, 5, 16, 33), (3, 5, 1, 33), num_kv_heads=2, block_size=16)
    arguments = {**batch.arguments(), "query_starts": batch.query_starts}
    out = torch.full_like(batch.query, float("nan"))
    all_rules = {"window": None, "softcap": None, "sinks": None} | rules
    ragged_prefill(**arguments, **all_rules, out=out, lse=None, target=H100)
    assert error(out, ops.ragged_prefill(**arguments, **rules, implementation="reference")) <= ATTENTION[torch.float32]


@pytest.mark.usefixtures("flashinfer")
def test_a_step_is_planned_once_for_all_layers_of_a_kind() -> None:
    batch = make_batch((20, 5), (3, 5))
    rules = {"softcap": None, "sinks": None, "lse": None, "target": H100, "out": torch.empty_like(batch.query)}
    arguments = {**batch.arguments(), "query_starts": batch.query_starts, **rules}
    for _ in range(3):
        for window in (None, 4):
            ragged_prefill(**arguments, window=window)
    assert len(Wrapper.plans) == 2
    ragged_prefill(**{**arguments, "context_lens": batch.context_lens.clone()}, window=None)
    assert len(Wrapper.plans) == 3, "another step"


@pytest.mark.usefixtures("flashinfer")
def test_what_it_cannot_give_is_refused() -> None:
    batch = make_batch((20,), (3,))
    arguments = {**batch.arguments(), "query_starts": batch.query_starts, "window": None, "softcap": None}
    arguments |= {"out": torch.empty_like(batch.query), "target": H100}
    with pytest.raises(ValueError, match="no sinks"):
        ragged_prefill(**arguments, sinks=torch.zeros(4), lse=None)
    with pytest.raises(ValueError, match="no log-sum-exp"):
        ragged_prefill(**arguments, sinks=None, lse=torch.zeros(3, 4))
