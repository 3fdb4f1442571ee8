"""Runs the Triton kernels: on the chip where there is one, else under Triton's interpreter, which this process then
keeps to.

Triton decides when it is imported whether it interprets, so it and the kernels are imported here, with the variable
that asks
for it set for just that long. Without Triton every test of the folder is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch

HAS_CHIP = torch.cuda.is_available()
HERE = Path(__file__).parent


def import_kernels() -> None:
    from mxn_kernels.select import OPS

    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0" if HAS_CHIP else "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for op in OPS:
                importlib.import_module(f"mxn_kernels.triton.{op}")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if importlib.util.find_spec("triton"):
    import_kernels()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton 3.6's interpreter makes numbers of arrays with one element, which numpy has come to dislike."""
    mark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from mxn_kernels.target import triton_is_interpreted

    monkeypatch.setenv("TRITON_INTERPRET", "0" if HAS_CHIP else "1")  # Triton looks again while it runs

    if not HAS_CHIP and not triton_is_interpreted():
        pytest.skip("Triton was imported before this folder's tests and compiles for chips; run the folder by itself")


@pytest.fixture
def device() -> str:
    return "cuda" if HAS_CHIP else "cpu"
