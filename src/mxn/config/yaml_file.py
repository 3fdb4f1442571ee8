"""YAML text to plain values, with the line and column of every value and every fault found in one go.

Scalars follow YAML 1.2's core schema (`no` is a word, `1e3` a number, `012` twelve). Nothing is constructed but dict,
list, str, int, float, bool and None. Size, depth and the number of values after aliases are bounded, so a file can
neither exhaust memory nor the stack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mxn.errors import ConfigError

_FAST_LOADER: Any = getattr(yaml, "CSafeLoader", None)
"""libyaml, ten times as fast; absent where PyYAML was built without it."""

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_NUMBER_LENGTH = 40

Plain = dict[str, "Plain"] | list["Plain"] | str | int | float | bool | None
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is wrong in a file. Lines and columns count from 1."""

    line: int
    column: int
    path: str
    message: str

    def text(self, name: str) -> str:
        where = f"{name}:{self.line}:{self.column}: "
        return where + (f"{self.path}: " if self.path else "") + self.message


@dataclass(kw_only=True)
class Document:
    """Values of a YAML file and where they stand.

    positions, key_positions: (line, column) of every value, and of the key before it in a mapping.
    faults: what could not be read; `data` then holds the rest.
    """

    name: str
    data: Plain = None
    positions: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)
    key_positions: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def position(self, path: KeyPath) -> tuple[int, int]:
        """Where a value stands; for one that is missing, where its nearest parent does."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.positions:
                return self.positions[path[:length]]
        return (1, 1)

    def add_fault(self, path: KeyPath, message: str, position: tuple[int, int] | None = None) -> None:
        line, column = position or self.position(path)
        self.faults.append(Fault(line=line, column=column, path=path_text(path), message=message))

    def raise_faults(self) -> None:
        """Raises: ConfigError with one line for each fault, in file order; nothing when there is none."""
        if self.faults:
            ordered = sorted(set(self.faults), key=lambda f: (f.line, f.column, f.path))
            raise ConfigError("\n".join(fault.text(self.name) for fault in ordered))


def read_yaml(path: Path) -> Document:
    """Reads a file that a person wrote. Raises: ConfigError when it cannot be read at all."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: more than {MAX_BYTES // 1024} KiB; a file this large is refused")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ConfigError(
            f"{path}:{line}:{column}: expected UTF-8 text, got byte 0x{raw[error.start]:02x}; save the file as UTF-8"
        ) from None
    return parse_yaml(text, name=str(path))


def parse_yaml(text: str, *, name: str = "<text>") -> Document:
    """Parses text. Faults are collected in the document; a syntax error ends the reading where it stands."""
    if _FAST_LOADER is not None:
        document = Document(name=name)
        try:
            _Reader(document, yaml.parse(text, Loader=_FAST_LOADER)).read()
        except (yaml.YAMLError, _TooMuchError):
            pass  # read again by the parser that says better what is wrong, and where
        else:
            return document
    document = Document(name=name)
    try:
        _Reader(document, yaml.parse(text, Loader=yaml.SafeLoader)).read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        document.add_fault((), f"expected YAML, got a syntax error: {error.problem or error.context}", position)
    except yaml.reader.ReaderError as error:
        where = text[: error.position]
        position = (where.count("\n") + 1, error.position - where.rfind("\n"))
        document.add_fault(
            (), f"expected printable text, got the character U+{ord(text[error.position]):04X}", position
        )
    except _TooMuchError as error:
        document.add_fault((), str(error), error.position)
    return document


def path_text(path: KeyPath) -> str:
    """`("deployments", 0, "name")` as `deployments[0].name`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _TooMuchError(Exception):
    def __init__(self, message: str, position: tuple[int, int]) -> None:
        super().__init__(message)
        self.position = position


@dataclass(slots=True)
class _Node:
    """A value with its place, depth below it, and the number of values in it, aliases counted each time they are used.

    children: (key or index, place of the key or None, child).
    """

    value: Plain
    position: tuple[int, int]
    count: int = 1
    height: int = 1
    children: list[tuple[str | int, tuple[int, int] | None, _Node]] = field(default_factory=list)

    def add(self, key: str | int, key_place: tuple[int, int] | None, child: _Node) -> None:
        self.children.append((key, key_place, child))
        self.count += child.count
        self.height = max(self.height, child.height + 1)


class _Reader:
    """Builds the values of one document out of the parser's events."""

    def __init__(self, document: Document, events: Iterator[yaml.Event]) -> None:
        self._document = document
        self._events = events
        self._anchors: dict[str, _Node] = {}
        self._num_values = 0

    def read(self) -> None:
        for event in self._events:
            if isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentEndEvent)):
                continue
            if isinstance(event, yaml.DocumentStartEvent):
                if self._document.positions:
                    self._document.add_fault(
                        (), "expected one YAML document, got a second one after ---", _place(event)
                    )
                    return
                continue
            root = self._node(event, (), MAX_DEPTH)
            self._document.data = root.value
            self._note_places(root, ())

    def _node(self, event: yaml.Event, path: KeyPath, depth: int) -> _Node:
        if depth <= 0:
            raise _TooMuchError(f"nested more than {MAX_DEPTH} deep", _place(event))
        if isinstance(event, yaml.AliasEvent):
            node = self._alias(event, path, depth)
        elif isinstance(event, yaml.ScalarEvent):
            node = _Node(self._scalar(event, path), _place(event))
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(event, path, depth)
        elif isinstance(event, yaml.MappingStartEvent):
            node = self._mapping(event, path, depth)
        else:  # the parser yields nothing else inside a document
            raise _TooMuchError(f"unexpected {type(event).__name__}", _place(event))
        anchor = getattr(event, "anchor", None)
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            self._anchors[anchor] = node
        self._num_values += node.count if isinstance(event, yaml.AliasEvent) else 1
        if self._num_values > MAX_VALUES:
            raise _TooMuchError(f"more than {MAX_VALUES} values, aliases counted each time", _place(event))
        return node

    def _alias(self, event: yaml.AliasEvent, path: KeyPath, depth: int) -> _Node:
        node = self._anchors.get(event.anchor or "")
        if node is None:  # unknown, or used inside its own value
            self._document.add_fault(path, f"*{event.anchor} refers to no finished value", _place(event))
            return _Node(None, _place(event))
        if node.height > depth:
            raise _TooMuchError(f"nested more than {MAX_DEPTH} deep", _place(event))
        return node

    def _sequence(self, event: yaml.SequenceStartEvent, path: KeyPath, depth: int) -> _Node:
        self._refuse_tag(event, path)
        values: list[Plain] = []
        node = _Node(values, _place(event))
        for item in self._events:
            if isinstance(item, yaml.SequenceEndEvent):
                break
            child = self._node(item, (*path, len(values)), depth - 1)
            node.add(len(values), None, child)
            values.append(child.value)
        return node

    def _mapping(self, event: yaml.MappingStartEvent, path: KeyPath, depth: int) -> _Node:
        self._refuse_tag(event, path)
        values: dict[str, Plain] = {}
        first_seen: dict[str, tuple[int, int]] = {}
        node = _Node(values, _place(event))
        for key_event in self._events:
            if isinstance(key_event, yaml.MappingEndEvent):
                break
            key = self._key(key_event, path, depth)
            child = self._node(next(self._events), (*path, key), depth - 1)
            place = _place(key_event)
            if key in first_seen:
                line = first_seen[key][0]
                self._document.add_fault(
                    (*path, key), f"expected each key once, got it again; first on line {line}", place
                )
                continue
            first_seen[key] = place
            values[key] = child.value
            node.add(key, place, child)
        return node

    def _key(self, event: yaml.Event, path: KeyPath, depth: int) -> str:
        if isinstance(event, yaml.ScalarEvent):
            if event.value == "<<" and event.implicit[0]:
                self._document.add_fault(path, "merge keys (<<) are not read; write the fields out", _place(event))
            return event.value
        self._node(event, path, depth - 1)
        self._document.add_fault(path, "expected a word as a key, got a list or a mapping", _place(event))
        return ""

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> Plain:
        text: str = event.value
        if event.tag is not None and event.tag not in ("!", "tag:yaml.org,2002:str"):
            self._refuse_tag(event, path)
        if event.tag is not None or not event.implicit[0]:
            return text
        if len(text) > MAX_NUMBER_LENGTH and _NUMBER.fullmatch(text):
            self._document.add_fault(
                path, f"expected a number a machine can hold, got {len(text)} digits", _place(event)
            )
            return None
        value = _resolve(text)
        if isinstance(value, float) and not math.isfinite(value):
            self._document.add_fault(path, f"expected a finite number, got {text}", _place(event))
            return None
        return value

    def _refuse_tag(self, event: yaml.Event, path: KeyPath) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            short = tag.replace("tag:yaml.org,2002:", "!!")
            self._document.add_fault(path, f"expected a plain value, got the YAML tag {short}", _place(event))

    def _note_places(self, node: _Node, path: KeyPath) -> None:
        self._document.positions[path] = node.position
        for key, key_place, child in node.children:
            if key_place is not None:
                self._document.key_positions[(*path, key)] = key_place
            self._note_places(child, (*path, key))


_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|(false|False|FALSE)")
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?|0[ox][0-9a-fA-F]+")


def _resolve(text: str) -> Plain:
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _SPECIAL.fullmatch(text):
        return math.nan if match[3] else math.inf
    return text


def _place(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)
