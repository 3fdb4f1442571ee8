"""YAML to plain values: places, faults, bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.config import yaml_file
from mxn.config.yaml_file import MAX_BYTES, Document, parse_yaml, path_text, read_yaml
from mxn.errors import ConfigError


def _faults(text: str) -> list[str]:
    return [fault.text("f") for fault in parse_yaml(text).faults]


def test_scalars_follow_the_yaml_1_2_core_schema() -> None:
    text = "[no, yes, true, 012, 0x1F, 0o17, 1e3, 1_000, 12:30, 2024-01-02, ~, '1', -.5, +3]"
    expected = ["no", "yes", True, 12, 31, 15, 1000.0, "1_000", "12:30", "2024-01-02", None, "1", -0.5, 3]
    assert parse_yaml(text).data == expected


def test_every_value_and_key_has_a_line_and_a_column() -> None:
    document = parse_yaml("a:\n  - b: 1\n    c: [2, 3]\n")
    assert document.positions[("a", 0, "c", 1)] == (3, 12)
    assert document.key_positions[("a", 0, "c")] == (3, 5)
    assert document.position(("a", 0, "missing")) == (2, 5)


def test_repeated_keys_are_refused_with_both_lines() -> None:
    assert _faults("a: 1\nb: 2\na: 3\n") == ["f:3:1: a: expected each key once, got it again; first on line 1"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "syntax error"),
        ("a: !!python/object:os.system x", "!!python/object:os.system"),
        ("a: !thing {}", "!thing"),
        ("a: .nan", "expected a finite number, got .nan"),
        ("a: -.inf", "expected a finite number"),
        ("a: 1e999", "expected a finite number"),
        ("a: " + "9" * 5000, "got 5000 digits"),
        ("a: *nobody", "*nobody refers to no finished value"),
        ("a: &x [*x]", "*x refers to no finished value"),
        ("<<: {a: 1}", "merge keys"),
        ("[a]: 1", "expected a word as a key"),
        ("a: 1\n---\nb: 2", "one YAML document"),
        ("a: \x07", "U+0007"),
        ("\t- a", "syntax error"),
    ],
)
def test_what_cannot_be_read_is_a_fault_with_its_place(text: str, part: str) -> None:
    faults = _faults(text)
    assert len(faults) == 1
    assert part in faults[0]
    assert faults[0].startswith("f:")


def test_aliases_are_read() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x").data == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_bomb_of_aliases_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    faults = _faults("\n".join(lines))
    assert len(faults) == 1
    assert "more than 100000 values" in faults[0]


def test_deep_nesting_is_refused_directly_and_through_aliases() -> None:
    assert "nested more than 32 deep" in _faults("[" * 5000 + "]" * 5000)[0]
    chain = "a0: &a0 [[[[[[[[[[x]]]]]]]]]]\n" + "\n".join(
        f"a{i}: &a{i} [[[[[[[[[[*a{i - 1}]]]]]]]]]]" for i in range(1, 50)
    )
    assert "nested more than 32 deep" in _faults(chain)[0]


def test_files_that_are_no_text_or_too_large_are_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml:2:7: expected UTF-8 text, got byte 0xe9"):
        read_yaml(latin)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="more than 1024 KiB"):
        read_yaml(large)
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


def test_empty_text_is_nothing() -> None:
    assert parse_yaml("").data is None
    assert parse_yaml("# only words\n").faults == []


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:- \n[]{},&*!#'\"|>%@`.0159eEx~<?\t"), max_size=80))
def test_no_text_raises_anything(text: str) -> None:
    assert isinstance(parse_yaml(text), Document)


def test_paths_read_like_code() -> None:
    assert path_text(("deployments", 0, "name")) == "deployments[0].name"


@pytest.mark.parametrize(
    "text", ["a: é\nü: [x, 😀, z]\n", "a: |\n  x\nb: &k {c: 1}\nd: *k\n", "a: 1\na: 2\n", "a: [1,\n", "- {a, b}\n"]
)
def test_both_parsers_give_the_same_values_places_and_faults(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = yaml_file.parse_yaml(text)
    monkeypatch.setattr(yaml_file, "_FAST_LOADER", None)
    assert yaml_file.parse_yaml(text) == fast
