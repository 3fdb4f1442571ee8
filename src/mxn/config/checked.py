"""Plain values to frozen models: every fault at once, with file, line, column, what was expected and what was got."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mxn.config.yaml_file import Document, KeyPath, Plain, path_text, read_yaml
from mxn.errors import ConfigError

T = TypeVar("T", bound="Checked")

CrossCheck = Callable[[Plain], Iterable[tuple[KeyPath, str]]]
"""Finds faults between fields in unchecked values: (path, message) of each."""


class Checked(BaseModel):
    """Base of everything read from YAML: frozen, strict, finite numbers, no unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_max_length=10_000,
        use_attribute_docstrings=True,
    )


def load_checked(path: Path, model: type[T]) -> T:
    """The file as a `model`.

    Raises: ConfigError that lists every fault as `file:line:col: path: expected ..., got ...`.
    """
    return check(read_yaml(path), model)


def check(document: Document, model: type[T], cross_check: CrossCheck | None = None) -> T:
    """The document as a `model`. Raises: ConfigError that lists every fault."""
    if cross_check is not None:
        for path, message in cross_check(document.data):
            document.add_fault(path, message)
    try:
        # Strict JSON mode turns lists into tuples and converts nothing else.
        value = model.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        _add_faults(document, model, [dict(item) for item in error.errors(include_url=False)])
        document.raise_faults()
        raise ConfigError(f"{document.name}: {error}") from error  # every error became a fault, so never reached
    document.raise_faults()
    return value


def json_schema(model: type[BaseModel], title: str) -> dict[str, Any]:
    """JSON Schema of a file, for editors and other tools."""
    schema = model.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word.lower().replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def _add_faults(document: Document, model: type[BaseModel], errors: list[dict[str, Any]]) -> None:
    unread = {fault.path for fault in document.faults}
    expected: dict[KeyPath, list[str]] = {}
    got: dict[KeyPath, object] = {}
    for error in errors:
        path: KeyPath = tuple(error["loc"])
        if error["type"] == "extra_forbidden":
            known = _fields_at(model, path[:-1])
            message = f"unknown key{suggestion(str(path[-1]), known)} (known here: {', '.join(known)})"
            document.add_fault(path, message, document.key_positions.get(path))
        elif error["type"] == "missing":
            document.add_fault(path, "expected a value, got nothing: the key is missing")
        else:
            while path and path not in document.positions:
                path = path[:-1]  # drops what pydantic adds to say which branch of a union it tried
            if path_text(path) in unread:
                continue  # it is already said why the value could not be read
            if error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
                continue  # pydantic counts entries without faults only; each faulty one is named by itself
            expected.setdefault(path, []).append(_expected(error))
            got[path] = error.get("input")
    for path, texts in expected.items():
        document.add_fault(path, f"expected {' or '.join(dict.fromkeys(texts))}, got {_shown(got[path])}")


def _expected(error: dict[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in _EXPECTED:
        return _EXPECTED[kind].format(**context)
    text: str = error["msg"]
    return text[0].lower() + text[1:]


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of ordinary size",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_long": "text of at most {max_length} characters",
    "string_too_short": "text of at least {min_length} characters",
    "string_pattern_mismatch": "text of the form {pattern}",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
}


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Keys that may stand in the mapping at `path`."""
    kind: Any = model
    for part in path:
        found = _model_in(kind)
        if isinstance(part, int) or found is None:
            continue  # the item's model is already inside the list's or mapping's annotation
        kind = found.model_fields[part].annotation if part in found.model_fields else None
    found = _model_in(kind)
    return list(found.model_fields) if found else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `X`, `X | None`, `tuple[X, ...]` or `dict[str, X]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for part in typing.get_args(annotation):
        if (found := _model_in(part)) is not None:
            return found
    return None
