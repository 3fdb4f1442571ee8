"""What backends say of a host, asked so that none can harm the others or whoever asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mxn.backends.base import Probe
from mxn.backends.survey import PowerSource, Survey, SurveyedChip, physical_chips, survey

FAKE = "from mxn.backends.fake import *\nfrom mxn.backends.base import *\nclass Acme(FakeBackend):\n    name = 'NAME'\n"
PLUGINS = {
    "good": FAKE,
    "raises": "raise ImportError('libacme.so is missing')",
    "hangs": FAKE + "    def probe(self):\n        import time\n        time.sleep(3600)",
    "exits": "import os, sys\nprint('the driver is gone', file=sys.stderr, flush=True)\nos._exit(17)",
    "prints": "print('{}')\n" + FAKE,
    "numbers": FAKE
    + "    def chips(self):\n"
    + "        return [Chip(uid='x', kind=None, name='x', vendor='x', memory_bytes=np.int64(1), cores=1)]",
    "typo": FAKE + "    def power_reader(self, chip): ...",
    "words": FAKE + "    def probe(self):\n        return Probe(state='ready', reason='as ever')",
    "zzz_last": FAKE,
}


def test_each_broken_plugin_is_named_and_the_others_still_answer(
    install_plugins: Callable[[Mapping[str, str]], Path],
) -> None:
    install_plugins(PLUGINS)
    start_s = time.monotonic()
    found = survey(["cpu", *PLUGINS], time_limit_s=4.0)
    assert time.monotonic() - start_s < 60
    reasons = {name: said.probe.reason for name, said in found.items() if said.probe.state == "broken"}
    assert set(reasons) == {"raises", "hangs", "exits", "numbers", "typo", "words"}
    assert "libacme.so is missing" in reasons["raises"]
    assert reasons["hangs"] == "it did not answer within 4 s and was stopped; it hangs while imported or asked"
    assert reasons["exits"].endswith("(exit code 17): the driver is gone")
    assert "not plain values" in reasons["numbers"]
    assert '"power_reader" is not part of the interface' in reasons["typo"]
    assert "not plain values" in reasons["words"]
    for name in ("good", "prints", "zzz_last"):
        assert [seen.chip.uid for seen in found[name].chips] == ["fake-0"]
        assert found[name].is_scripted


@pytest.fixture
def sighting() -> SurveyedChip:
    (seen,) = survey(["fake"])["fake"].chips
    return seen


def test_one_chip_through_two_backends_counts_once(sighting: SurveyedChip) -> None:
    counter = PowerSource(name="nvml-energy", kind="counter", scope="device", detail="counts")
    second = replace(sighting, chip=replace(sighting.chip, memory_bytes=2**29), power=counter)
    other = replace(sighting, chip=replace(sighting.chip, uid="fake-1"))
    active = Probe(state="active", reason="here")
    found = physical_chips(
        {"one": Survey(probe=active, chips=(sighting,)), "two": Survey(probe=active, chips=(second, other))}
    )
    assert [(seen.chip.uid, seen.backends) for seen in found] == [("fake-0", ("one", "two")), ("fake-1", ("two",))]
    assert found[0].chip.memory_bytes == 2**29
    assert found[0].power.name == "nvml-energy"
    assert found[0].notes == ("backends state different memory (one 1.0 GiB, two 0.5 GiB); the least counts",)
