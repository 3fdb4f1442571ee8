from contextlib import suppress

import pytest

from mxn.cli.progress import Phases


def test_each_phase_is_one_line_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Phases() as phases:
        phases("download", 0.0)
        phases("download", 0.5)
        phases("download", 1.0, "100 MB")
        phases("download", 1.0)
        phases("convert", 0.2)
        phases("load", 0.1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["download", "convert", "load"]
    assert lines[0].endswith("s (100 MB)")


def test_quiet_shows_nothing_and_a_failure_closes_no_phase(capsys: pytest.CaptureFixture[str]) -> None:
    with Phases(quiet=True) as phases:
        phases("load", 1.0)
    with suppress(KeyError), Phases() as phases:
        phases("load", 0.5)
        raise KeyError
    assert capsys.readouterr().err == ""
