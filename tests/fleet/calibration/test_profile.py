from __future__ import annotations

import json
from typing import Any

import pytest

from mxn.errors import ConfigError
from mxn.fleet.calibration.profile import profile_json, read_profiles


def _text(synthetic: Any, path: tuple[str | int, ...] = (), value: object = None) -> str:
    """A file with one profile, one of its values replaced."""
    data = json.loads(json.dumps(profile_json(synthetic.profile())))
    if path:
        at = data
        for part in path[:-1]:
            at = at[part]
        at[path[-1]] = value
    return json.dumps([data])


def test_a_profile_survives_being_written_and_read(synthetic: Any) -> None:
    assert read_profiles(_text(synthetic), "p.json") == (synthetic.profile(),)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("decode", 3, "median_s"), float("nan"), r"p.json: \$\[0\].decode\[3\].median_s: expected a finite number"),
        (("weight_bytes",), float("inf"), r"p.json: \$\[0\].weight_bytes: expected a finite number, got inf"),
        (("prefill", 0, "median_s"), -1.0, r"p.json: \$\[0\].prefill\[0\].median_s: expected `float` > 0"),
        (("decode", 0, "batch"), 0, r"p.json: \$\[0\].decode\[0\].batch: expected `int` >= 1"),
        (("backend",), None, r"p.json: \$\[0\].backend: expected `str`, got `null`"),
        (("format",), 99, r"p.json: \$\[0\].format: expected 1, got 99"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_place(
    synthetic: Any, path: tuple[str | int, ...], value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_profiles(_text(synthetic, path, value), "p.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "[{}]", "null"])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"p\.json"):
        read_profiles(text, "p.json")


def test_a_profile_without_points_is_refused(synthetic: Any) -> None:
    data = profile_json(synthetic.profile()) | {"prefill": [], "decode": []}
    with pytest.raises(ConfigError, match="expected points"):
        read_profiles(json.dumps(data), "p.json")
