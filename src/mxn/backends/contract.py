"""Checks a class against the interface it implements, when the class is defined, and names every fault at once.

A subclass that also names `ABC` among its bases is meant to be subclassed itself: it is not checked, and the public
names it brings become part of what its own subclasses may define.
"""

from __future__ import annotations

import difflib
import inspect
from abc import ABC
from collections.abc import Iterator
from typing import Any

from mxn.errors import BackendError

API_VERSION = 1

_NOT_PLAIN = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_class(cls: type, interface: type, *, one_of: tuple[str, ...] = ()) -> None:
    """Compares a subclass with the interface: names, signatures, missing methods, and `one_of`, of which it has one.

    Raises: BackendError with every fault.
    """
    if ABC in cls.__bases__:
        return
    faults = [*_unknown_names(cls, interface), *_wrong_methods(cls, interface), *_missing(cls, interface, one_of)]
    if faults:
        raise BackendError(f"{cls.__name__} breaks the adapter contract, version {API_VERSION}: {'; '.join(faults)}")


def accepted_versions(current: int) -> range:
    """The current version and the one before it; 1 is the first."""
    return range(max(1, current - 1), current + 1)


def check_version(cls: type, version: object) -> None:
    """Raises: BackendError when this mxn does not speak the interface version that a backend was written for."""
    accepted = accepted_versions(API_VERSION)
    if type(version) is not int or version not in accepted:
        spoken = " and ".join(map(str, accepted))
        todo = "upgrade mxn" if type(version) is int and version > API_VERSION else "upgrade the backend's package"
        raise BackendError(f"{cls.__name__} speaks adapter version {version}; this mxn speaks {spoken}; {todo}")


def _unknown_names(cls: type, interface: type) -> Iterator[str]:
    known = {name for base in cls.__mro__ if base is interface or ABC in base.__bases__ for name in _public(base)}
    for base in cls.__mro__:
        if not issubclass(base, interface) or base is interface or ABC in base.__bases__:
            continue
        for name in sorted(_public(base) - known):
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f'did you mean "{close[0]}"?' if close else "names of its own begin with _"
            yield f'"{name}" is not part of the interface; {hint}'


def _wrong_methods(cls: type, interface: type) -> Iterator[str]:
    for name, original in _methods(interface).items():
        found = inspect.getattr_static(cls, name)
        if found is original:
            continue
        if not inspect.isfunction(found):
            yield f"{name} must be a plain method, found a {type(found).__name__}"
        elif found.__code__.co_flags & _NOT_PLAIN:
            yield f"{name} must return its result, but it is a coroutine or generator"
        elif not _accepts(found, original):
            yield f"{name} must take {_parameters(original)}, found {_parameters(found)}"


def _missing(cls: type, interface: type, one_of: tuple[str, ...]) -> Iterator[str]:
    missing = [name for name in _methods(interface) if getattr(getattr(cls, name), "__isabstractmethod__", False)]
    if missing:
        yield f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    for name, kind in inspect.get_annotations(interface).items():
        if str(kind).startswith("ClassVar") and not hasattr(cls, name):
            yield f'the class attribute "{name}" is missing'
    has = [name for name in one_of if getattr(cls, name) is not getattr(interface, name)]
    if one_of and len(has) != 1:
        yield f"it must have one of {' and '.join(one_of)}, and has {'both' if has else 'neither'}"


def _accepts(found: Any, original: Any) -> bool:
    """True when `found` takes the same arguments in the same order by the same names, and needs no others."""
    expected, given = _signature(original), _signature(found)
    return [p.name for p in given[: len(expected)]] == [p.name for p in expected] and all(
        p.default is not p.empty or p.kind in _VARIADIC for p in given[len(expected) :]
    )


def _signature(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _parameters(function: Any) -> str:
    return f"({', '.join(str(p.replace(annotation=p.empty)) for p in _signature(function))})"


def _methods(interface: type) -> dict[str, Any]:
    return {n: f for n, f in vars(interface).items() if inspect.isfunction(f) and not n.startswith("_")}


def _public(cls: type) -> set[str]:
    return {name for name in (*vars(cls), *inspect.get_annotations(cls)) if not name.startswith("_")}
