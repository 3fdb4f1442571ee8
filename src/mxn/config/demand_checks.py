"""Faults between fields of `mxn.yaml`: names that nothing has, and rules that exclude each other."""

from __future__ import annotations

from collections.abc import Iterator

from mxn.config.checked import suggestion
from mxn.config.yaml_file import KeyPath, Plain


def demand_faults(data: Plain) -> Iterator[tuple[KeyPath, str]]:
    """(path, message) of every name in cluster and deployments that nothing has, and of contradictory affinity."""
    if not isinstance(data, dict):
        return
    cluster = _mapping(data.get("cluster"))
    nodes = _words(entry.get("name") for entry in _entries(cluster.get("nodes")))
    racks = _words(entry.get("name") for entry in _entries(cluster.get("racks")))
    for what, names in (("nodes", nodes), ("racks", racks)):
        for index, name in enumerate(names):
            if name in names[:index]:
                yield ("cluster", what, index, "name"), f'expected a name of its own, got "{name}" again'
    for index, node in enumerate(_entries(cluster.get("nodes"))):
        rack = node.get("rack")
        if isinstance(rack, str) and rack not in racks:
            yield ("cluster", "nodes", index, "rack"), _not_known("rack", rack, racks)
    deployments = _entries(data.get("deployments"))
    names = [str(entry.get("name") or entry.get("model")) for entry in deployments]
    for index, entry in enumerate(deployments):
        where = _mapping(entry.get("where"))
        path: KeyPath = ("deployments", index, "where")
        for key, known, what in (
            ("nodes", nodes or ["here"], "node"),
            ("racks", racks, "rack"),
            ("together_with", names, "deployment"),
            ("apart_from", names, "deployment"),
        ):
            if what in ("node", "rack") and cluster.get("launcher") == "ray":
                continue  # the nodes of a Ray cluster say by their labels what they are called
            for place, word in enumerate(_list(where.get(key))):
                if isinstance(word, str) and word not in known:
                    yield (*path, key, place), _not_known(what, word, known)
        chips, excluded = _list(where.get("chips")), _list(where.get("not_chips"))
        if chips and all(chip in excluded for chip in chips):
            yield (*path, "not_chips"), "expected to leave a chip that `chips` allows, got all of them excluded"
    yield from _contradictions(names, [_mapping(entry.get("where")) for entry in deployments])


def _contradictions(names: list[str], where: list[dict[str, Plain]]) -> Iterator[tuple[KeyPath, str]]:
    """Deployments that must be together, through others too, and apart."""
    leader = {name: name for name in names}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for name, rules in zip(names, where, strict=True):
        for other in _list(rules.get("together_with")):
            if isinstance(other, str) and other in leader:
                leader[find(other)] = find(name)
    for index, (name, rules) in enumerate(zip(names, where, strict=True)):
        for place, other in enumerate(_list(rules.get("apart_from"))):
            if isinstance(other, str) and other in leader and find(other) == find(name):
                message = f'expected one that may be elsewhere, got "{other}", which together_with ties to "{name}"'
                yield ("deployments", index, "where", "apart_from", place), message


def _not_known(what: str, word: str, known: list[str]) -> str:
    there = ", ".join(known[:10]) or "none"
    return f'expected the name of a {what}, got "{word}"{suggestion(word, known)} (there are: {there})'


def _mapping(value: Plain) -> dict[str, Plain]:
    return value if isinstance(value, dict) else {}


def _list(value: Plain) -> list[Plain]:
    return value if isinstance(value, list) else []


def _entries(value: Plain) -> list[dict[str, Plain]]:
    """The entries of a list, those that are no mappings as empty ones so that indices stay true."""
    return [_mapping(entry) for entry in _list(value)]


def _words(values: Iterator[Plain]) -> list[str]:
    return [value if isinstance(value, str) else "" for value in values]
