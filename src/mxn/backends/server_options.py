"""What backends that describe a server have in common: reading their options, and saying what nobody knows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TypeVar, cast, get_args

from mxn.backends.base import Extension, MemoryEstimate
from mxn.config.environment import variable
from mxn.core.model import Model
from mxn.core.quantity import Quantity
from mxn.errors import BackendError

_Choice = TypeVar("_Choice", bound=str)
_ENVIRONMENT = "env."


class ServerOptions:
    """The options of a deployment whose model runs in a server. What is read is checked; `check_all_read` finds typos.

    | option          | meaning                                                                          |
    |-----------------|----------------------------------------------------------------------------------|
    | command         | what to start, split as a shell would; filled in are {port}, {key}, {folder},    |
    |                 | {name}, {context}, {max_num_seqs}, {threads} and {kv_bytes}                      |
    | url             | where a server runs already, instead of command                                  |
    | arguments       | more arguments for the command that a preset makes                               |
    | env.NAME        | a variable of the server's environment                                           |
    | key_variable    | the environment variable that holds the key to send                              |
    | model           | the name the server knows the model by; the model's own otherwise                |
    | protocol        | completions (default) or llama.cpp                                               |
    | extensions      | fields beyond OpenAI's that it takes, separated by commas                        |
    | prompts         | ids (default) or text                                                            |
    | ready_path      | answers 200 once it is ready                                                     |
    | ready_timeout_s, stop_timeout_s | how long that, and stopping, may take                            |
    """

    def __init__(self, options: tuple[tuple[str, str], ...]) -> None:
        self._values = dict(options)
        self._known: set[str] = set()

    def text(self, name: str) -> str:
        """An option, empty when it is not given."""
        self._known.add(name)
        return self._values.pop(name, "")

    def words(self, name: str) -> tuple[str, ...]:
        """An option split as a shell would. Raises: BackendError for an open quote."""
        text = self.text(name)
        try:
            return tuple(shlex.split(text))
        except ValueError as error:
            raise BackendError(f"option {name} is not a command line: {error}, in {text!r}") from error

    def seconds(self, name: str, default: float) -> float:
        """A positive number of seconds. Raises: BackendError."""
        text = self.text(name)
        try:
            value = float(text) if text else default
        except ValueError:
            value = -1.0
        if not 0 < value < 1e6:
            raise BackendError(f"option {name} is {text!r}; expected seconds above 0")
        return value

    def one_of(self, name: str, choices: Sequence[_Choice]) -> _Choice:
        """One of `choices`, the first when it is not given. Raises: BackendError."""
        text = self.text(name)
        if text and text not in choices:
            raise BackendError(f"option {name} is {text!r}; expected {' or '.join(choices)}")
        return next((choice for choice in choices if choice == text), choices[0])

    def extensions(self) -> tuple[Extension, ...]:
        """Names of extensions. Raises: BackendError for one that mxn does not know."""
        given = tuple(word.strip() for word in self.text("extensions").split(",") if word.strip())
        if unknown := sorted(set(given) - set(get_args(Extension))):
            raise BackendError(
                f"option extensions names {', '.join(unknown)}; mxn knows {', '.join(get_args(Extension))}"
            )
        return cast(tuple[Extension, ...], given)

    def environment(self) -> tuple[tuple[str, str], ...]:
        """The variables given as env.NAME."""
        names = [name for name in self._values if name.startswith(_ENVIRONMENT)]
        return tuple((name.removeprefix(_ENVIRONMENT), self._values.pop(name)) for name in names)

    def secret(self, name: str) -> str:
        """Content of the environment variable that an option names. Raises: BackendError when it is not set."""
        wanted = self.text(name)
        value = variable(wanted) if wanted else ""
        if wanted and not value:
            raise BackendError(f"option {name} names the environment variable {wanted}, which is not set")
        return value

    def check_all_read(self, backend: str) -> None:
        """Raises: BackendError for options that nobody has asked for."""
        if self._values:
            known = ", ".join([*sorted(self._known), f"{_ENVIRONMENT}NAME"])
            raise BackendError(
                f"the {backend} backend does not know the option {', '.join(sorted(self._values))}; it knows {known}"
            )


def served_name(options: ServerOptions, model: Model) -> str:
    """The name by which the server knows the model."""
    return options.text("model") or model.name


def no_estimate(reason: str) -> MemoryEstimate:
    """An estimate that knows nothing, and why."""
    unknown = Quantity.unavailable("B", reason)
    return MemoryEstimate(weights=unknown, kv_cache=unknown, activations=unknown, overhead=unknown)
