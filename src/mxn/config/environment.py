"""The one place that reads environment variables and says where mxn keeps its files.

| variable         | meaning                                                  | default |
|------------------|----------------------------------------------------------|--------------------------------|
| MXN_CACHE_DIR    | downloaded and converted models, built kernels           | $XDG_CACHE_HOME/mxn, ~/.cache/mxn |
| MXN_DATA_DIR     | measured profiles, benchmark records                     | $XDG_DATA_HOME/mxn, ~/.local/share/mxn |
| MXN_RUNTIME_DIR  | sockets and state of running servers                     | $XDG_RUNTIME_DIR/mxn, run in the cache |
| MXN_CONFIG_DIR   | own model and chip cards (`models/`, `chips/`)           | $XDG_CONFIG_HOME/mxn, ~/.config/mxn |
| MXN_API_KEY      | keys that clients must send, separated by commas         | none |
| MXN_OFFLINE      | 1: never touch the network (HF_HUB_OFFLINE is read too)  | 0 |
| MXN_HUB_ENDPOINT | base address of the model hub (HF_ENDPOINT is read too)  | https://huggingface.co |
| HF_TOKEN         | token for gated models on the hub                        | none |
| MXN_LLAMA_SERVER | llama.cpp's `llama-server`                               | found on PATH |
| MXN_VLLM_PYTHON  | interpreter of the environment that vLLM is installed in | `vllm` on PATH |
| MXN_LOG_LEVEL    | debug, info, warning or error                            | info |
| MXN_LOG_FORMAT   | text, or json for one object per line                    | text |
| MXN_FAKE_CHIPS   | kinds of the chips that the fake backend simulates       | one chip of no kind |
| CUDA_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES | chips that drivers show, by number or UUID | all |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mxn.errors import ConfigError

DEFAULT_HUB_ENDPOINT = "https://huggingface.co"
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})
_DEFAULTED = "MXN_DEFAULTED"
"""Where a process that mxn starts finds the names of the variables that only mxn's defaults gave it."""


def cache_dir() -> Path:
    """Folder for what can be fetched or built again. Not created here."""
    return _folder("MXN_CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def data_dir() -> Path:
    """Folder for what was measured on this machine and must be kept. Not created here."""
    return _folder("MXN_DATA_DIR", "XDG_DATA_HOME", ".local/share")


def runtime_dir() -> Path:
    """Folder for sockets and for what must be known again should a server be restarted. Not created here."""
    if os.environ.get("MXN_RUNTIME_DIR"):
        return Path(os.environ["MXN_RUNTIME_DIR"]).expanduser().absolute()
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(base) / "mxn" if os.path.isabs(base) and os.path.isdir(base) else cache_dir() / "run"


def user_config_dir() -> Path:
    """Folder with the user's own model and chip cards. May not exist."""
    return _folder("MXN_CONFIG_DIR", "XDG_CONFIG_HOME", ".config")


def shipped_config_dir() -> Path:
    """Folder with the cards that come with mxn: inside the wheel, or beside `src` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent.parent / "configs"


def config_dirs() -> tuple[Path, ...]:
    """Folders that hold `models/` and `chips/`; a card in a later one replaces a card of the same name."""
    return (shipped_config_dir(), user_config_dir())


def api_keys() -> tuple[str, ...]:
    """Keys from MXN_API_KEY, blanks around them removed."""
    return tuple(key.strip() for key in os.environ.get("MXN_API_KEY", "").split(",") if key.strip())


def is_offline() -> bool:
    """True when nothing may be fetched over the network (MXN_OFFLINE, or the hub's own HF_HUB_OFFLINE)."""
    return _flag("MXN_OFFLINE") or _flag("HF_HUB_OFFLINE")


def hub_endpoint() -> str:
    """Base address of the model hub, without a slash at the end."""
    return (os.environ.get("MXN_HUB_ENDPOINT") or os.environ.get("HF_ENDPOINT") or DEFAULT_HUB_ENDPOINT).rstrip("/")


def hub_token() -> str | None:
    """Token for gated or private models, or None."""
    return os.environ.get("HF_TOKEN", "").strip() or None


def variable(name: str) -> str:
    """The variable of that name, for settings that name one instead of holding a secret; empty when it is not set."""
    return os.environ.get(name, "").strip()


def set_variables(**values: str) -> None:
    """Sets variables for libraries of this process and for those that it starts, unless they are set already."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def log_level() -> str:
    """Name of the level from which log lines are written."""
    level = os.environ.get("MXN_LOG_LEVEL", "info").strip().lower()
    if level not in LOG_LEVELS:
        raise ConfigError(f"MXN_LOG_LEVEL is {level!r}; expected one of {', '.join(LOG_LEVELS)}")
    return level


def log_format(given: str | None = None) -> str:
    """How log lines are written, for people or as JSON for a collector: as `given`, else as the variable says."""
    name = (given or os.environ.get("MXN_LOG_FORMAT") or "text").strip().lower()
    if name not in LOG_FORMATS:
        where = "--log-format" if given else "MXN_LOG_FORMAT"
        raise ConfigError(f"{where} is {name!r}; expected one of {', '.join(LOG_FORMATS)}")
    return name


def fake_chips() -> tuple[str, ...]:
    """Kinds of the chips that the fake backend simulates, one for each chip; empty for one chip of no kind."""
    return tuple(kind.strip() for kind in os.environ.get("MXN_FAKE_CHIPS", "").split(",") if kind.strip())


def visible_chips(variable: str) -> tuple[str, ...] | None:
    """Numbers or UUIDs from one of the drivers' own variables; None when it is not set, nothing when it hides all."""
    text = os.environ.get(variable)
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def child_environment(
    extra: Mapping[str, str] | None = None, *, defaults: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment for a process that mxn starts: `defaults`, above them this process's own, on top `extra`.

    Defaults are for that one process: those that this process got in the same way are not passed on to its children.
    """
    inherited = set(os.environ.get(_DEFAULTED, "").split())
    own = {name: value for name, value in os.environ.items() if name != _DEFAULTED and name not in inherited}
    added = (defaults or {}).keys() - own.keys()
    marker = {_DEFAULTED: " ".join(sorted(added))} if added else {}
    return {**(defaults or {}), **own, **marker, **(extra or {})}


def _folder(own: str, xdg: str, below_home: str) -> Path:
    if os.environ.get(own):
        return Path(os.environ[own]).expanduser().absolute()
    base = os.environ.get(xdg, "")
    # The XDG rule: a relative path is invalid and is not used.
    return (Path(base) if os.path.isabs(base) else Path.home() / below_home) / "mxn"


def _flag(name: str) -> bool:
    text = os.environ.get(name, "").strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ConfigError(f"{name} is {text!r}; expected 1 or 0")
