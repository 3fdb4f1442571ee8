"""Sources as text: what is read, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxn.config.source import FolderSource, GgufSource, HubSource, WheelSource, parse_source


@pytest.mark.parametrize(
    "text",
    [
        "hf:org/name",
        "hf:org/name@main",
        "hf:org/name@refs/pr/1#sub/model.Q4_0.gguf",
        "pypi:package==1.0.0#inside/model.gguf",
        "pypi:package==1.0.0#inside/model/",
        "folder:/models/x",
        "gguf:/models/x.gguf",
    ],
)
def test_a_source_reads_back_as_it_was_written(text: str) -> None:
    assert str(parse_source(text)) == text


def test_the_parts_of_a_source_are_named() -> None:
    assert parse_source("hf:o/n@v1") == HubSource(repo="o/n", revision="v1")
    assert parse_source("pypi:a==2#b/c.gguf") == WheelSource(package="a", version="2", member="b/c.gguf")
    assert parse_source("folder:/x") == FolderSource(path=Path("/x"))
    assert parse_source("gguf:/x.gguf") == GgufSource(path=Path("/x.gguf"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "org/name",
        "hf:name",
        "hf:org/name/more",
        "hf:../name",
        "hf:org/name@../../x",
        "hf:org/name#model.bin",
        "hf:org/name#../model.gguf",
        "pypi:package#x",
        "pypi:package==1.0",
        "pypi:package>=1.0#x",
        "pypi:--index-url==1#x",
        "pypi:package==1;x#y",
        "pypi:package==1#/etc/passwd",
        "pypi:package==1#a/../../b",
        "pypi:package==1#.hidden",
        "folder:",
        "gguf:\0",
        "http://example.org/x.gguf",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a source of the form"):
        parse_source(text)
