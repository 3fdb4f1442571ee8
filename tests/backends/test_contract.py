"""Classes are held against the interface when they are defined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pytest

from mxn.backends import contract
from mxn.backends.base import Backend, Executor
from mxn.backends.fake import FakeBackend, FakeExecutor
from mxn.errors import BackendError


def define(base: type, *more: type, **members: Any) -> type:
    """A class with these members, as a class statement would make it."""
    return type("Acme", (base, *more), members)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"power_reader": lambda self, chip: None}, '"power_reader" is not part of the interface'),
        (
            {"suports": lambda self, model, chip: None},
            '"suports" is not part of the interface; did you mean "supports"?',
        ),
        ({"supports": lambda self, model: None}, r"supports must take \(self, model, chip\), found \(self, model\)"),
        ({"power": lambda self, device: None}, r"power must take \(self, chip\), found \(self, device\)"),
        ({"chips": lambda self, refresh: ()}, r"chips must take \(self\), found \(self, refresh\)"),
        ({"chips": staticmethod(lambda self: ())}, "chips must be a plain method, found a staticmethod"),
        ({"chips": property(lambda self: ())}, "chips must be a plain method, found a property"),
        ({"serve": lambda self, model, settings, chips: None}, "must have one of load and serve, and has both"),
        ({"load": Backend.load}, "must have one of load and serve, and has neither"),
        ({"probe": Backend.probe}, "probe is missing"),
        ({"api_version": 0}, "speaks adapter version 0; this mxn speaks 1; upgrade the backend's package"),
        ({"api_version": 2}, "speaks adapter version 2; this mxn speaks 1; upgrade mxn"),
        ({"api_version": True}, "speaks adapter version True"),
    ],
)
def test_a_backend_that_breaks_the_contract_cannot_be_defined(members: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendError, match=words):
        define(FakeBackend, **members)


def test_the_current_version_and_the_one_before_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "API_VERSION", 3)
    for version in (2, 3):
        define(FakeBackend, api_version=version)
    with pytest.raises(BackendError, match="adapter version 1; this mxn speaks 2 and 3; upgrade the backend's package"):
        define(FakeBackend)  # one that names no version was written for the first
    with pytest.raises(BackendError, match="speaks adapter version 4; this mxn speaks 2 and 3; upgrade mxn"):
        define(FakeBackend, api_version=4)


def test_all_faults_are_named_at_once() -> None:
    async def chips(self: Any) -> list[Any]:
        return []

    with pytest.raises(BackendError) as caught:
        define(Backend, chips=chips, prob=lambda self: None)
    for words in (
        '"prob" is not part of the interface; did you mean "probe"?',
        "chips must return its result",
        "probe, capabilities, supports, estimate, power are missing",
        'the class attribute "name" is missing',
        "has neither",
    ):
        assert words in str(caught.value)


def test_further_arguments_with_defaults_and_names_of_its_own_are_free() -> None:
    define(FakeBackend, chips=lambda self, refresh=False: (), _helper=lambda self: None)
    define(FakeBackend, chips=lambda self, *args, **kwargs: ())


def test_executors_are_checked_too() -> None:
    with pytest.raises(BackendError, match=r'"exeute" is not part of the interface; did you mean "execute"\?'):
        define(FakeExecutor, exeute=lambda self, batch: None)
    with pytest.raises(BackendError, match="warm_up, execute, copy_kv, close are missing"):
        define(Executor)


def test_a_class_meant_to_be_subclassed_may_add_to_the_interface() -> None:
    class Family(Backend, ABC):
        @abstractmethod
        def command(self) -> list[str]: ...

    with pytest.raises(BackendError, match='"comand" is not part of the interface; did you mean "command"'):
        define(Family, comand=lambda self: [])
