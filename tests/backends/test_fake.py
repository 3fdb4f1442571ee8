"""What the fake backend can be scripted to do wrong, beyond what the tests of layers above it use."""

from pathlib import Path

import pytest

from mxn.backends.fake import FakeOptions
from mxn.errors import ChipError


def test_a_chip_is_lost_once_the_file_names_it(tmp_path: Path) -> None:
    file = tmp_path / "lost"
    options = FakeOptions((("lost_chip_file", str(file)),), chip="fake-1")
    options.misbehave(1, [[1]])
    file.write_text("fake-0\n")
    options.misbehave(2, [[1]])
    file.write_text("fake-1\n")
    with pytest.raises(ChipError, match="fake-1 is lost"):
        options.misbehave(3, [[1]])
