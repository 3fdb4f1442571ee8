import sys
import time
from types import SimpleNamespace

import pytest

from mxn.energy.reader import NullReader, ReaderKind
from mxn.energy.zeus import zeus_reader


def test_counter_through_zeus_is_a_counter() -> None:
    boards = SimpleNamespace(get_total_energy_consumption=lambda index: int(1e6 * time.monotonic() * (index + 1)))
    reader = zeus_reader(1, device=SimpleNamespace(get_gpus=lambda: boards), settle_s=0.1)
    first = reader.read()
    time.sleep(0.1)
    second = reader.read()
    reader.close()
    assert reader.kind is ReaderKind.COUNTER
    assert first.energy_j is not None
    assert second.energy_j is not None
    assert (second.energy_j - first.energy_j) / (second.time_s - first.time_s) == pytest.approx(2000, rel=0.1)


def test_absent_library_and_absent_board_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_board() -> None:
        raise RuntimeError("no GPU here")

    assert "no GPU here" in zeus_reader(0, device=SimpleNamespace(get_gpus=no_board)).detail
    monkeypatch.setitem(sys.modules, "zeus.device", None)
    absent = zeus_reader(0)
    assert isinstance(absent, NullReader)
    assert "pip install" in absent.detail
