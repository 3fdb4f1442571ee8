import pytest

from mxn.core.clock import FakeClock
from mxn.energy.reader import NullReader, Reading
from mxn.energy.replay import ConstantReader
from mxn.energy.together import together


class Gone(ConstantReader):
    def read(self) -> Reading:
        return Reading(energy_j=None, time_s=0.0, reason="it fell off the bus")


def test_chips_together_draw_the_sum() -> None:
    clock = FakeClock()
    both = together([ConstantReader(50, detail="", clock=clock), ConstantReader(70, detail="", clock=clock)])
    first = both.read()
    clock.advance(2)
    second = both.read()
    assert (second.energy_j or 0) - (first.energy_j or 0) == pytest.approx(240)
    assert "2 chips together" in both.detail


def test_sum_without_a_part_is_not_known() -> None:
    reading = together([ConstantReader(50, detail=""), Gone(50, detail="")]).read()
    assert reading.energy_j is None
    assert reading.reason == "it fell off the bus"
    absent = NullReader("no counter")
    assert together([ConstantReader(50, detail=""), absent]) is absent


def test_one_chip_is_its_own_reader() -> None:
    one = ConstantReader(50, detail="")
    assert together([one]) is one
