"""Writes a package with a new backend: every method is there, passes level 0 and says what is to be filled in."""

from __future__ import annotations

import re
from pathlib import Path

from mxn.backends.registry import installed_backends
from mxn.errors import ConfigError

_PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "mxn-{name}"
version = "0.1.0"
description = "The {name} chip as a backend of mxn"
requires-python = ">=3.11"
dependencies = ["mxn"]

[project.entry-points."mxn.backends"]
{name} = "mxn_{name}:{cls}Backend"

[tool.hatch.build.targets.wheel]
packages = ["mxn_{name}"]
"""

_MODULE = '''"""The {name} chip as a backend of mxn. Import the driver's library inside `load`, not here."""

from __future__ import annotations

from collections.abc import Sequence

from mxn.backends.base import Backend, Capabilities, Executor, LoadProgress, MemoryEstimate, Probe, Support
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.quantity import Quantity
from mxn.energy.reader import NullReader, PowerReader
from mxn.errors import UnsupportedModelError


class {cls}Backend(Backend):
    """Fill in from the top; `mxn backend conform {name} --level N` says how far it carries."""

    name = "{name}"
    api_version = 1

    def probe(self) -> Probe:
        """Look for the driver: "absent" with what to install when it is not here, "broken" when it does not answer."""
        return Probe(state="active", reason="a scaffold: it reaches a chip that does not exist")

    def chips(self) -> Sequence[Chip]:
        """Ask the driver. The uid is the silicon's own: the same through every backend, and after a restart."""
        return [Chip(uid="{name}-0", kind=None, name="{cls} scaffold", vendor="{name}", memory_bytes=1, cores=1)]

    def capabilities(self, chip: Chip) -> Capabilities:
        """What the executor will be able to do; the engine and the kit hold it to this."""
        return Capabilities(
            kv="paged",
            has_mixed_steps=True,
            has_prefix_sharing=True,
            has_multi_token_verify=False,
            has_graph_capture=False,
            can_share_chip=False,
        )

    def supports(self, model: ModelSpec, chip: Chip) -> Support:
        """A no has its reasons. "degraded" is a yes with something a person should know."""
        return Support(verdict="no", reasons=("load is not written yet",))

    def estimate(self, model: ModelSpec, settings: LoadSettings, chip: Chip) -> MemoryEstimate:
        """Bytes, each part with where its figure comes from. Unknown is unavailable, never zero."""
        unknown = Quantity.unavailable("B", "not measured on this chip yet")
        return MemoryEstimate(weights=unknown, kv_cache=unknown, activations=unknown, overhead=unknown)

    def power(self, chip: Chip) -> PowerReader:
        """The driver's energy counter, or a NullReader with the reason."""
        return NullReader("no energy counter is read yet")

    def load(self, model: Model, settings: LoadSettings, chips: Sequence[Chip], progress: LoadProgress) -> Executor:
        """Return an Executor. A backend that launches a server has `serve` instead of this."""
        raise UnsupportedModelError("load is not written yet")
'''


def write_scaffold(name: str, folder: Path) -> tuple[Path, ...]:
    """Writes the package and returns its files, pyproject.toml first.

    Raises: ConfigError when the name or the folder cannot be used.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f'"{name}" cannot name a backend: lower-case letters, digits and _, a letter first')
    if name in installed_backends():
        raise ConfigError(f'a backend "{name}" is installed already ({installed_backends()[name].distribution})')
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and not an empty folder")
    words = {"name": name, "cls": name.title().replace("_", "")}
    files = {
        folder / "pyproject.toml": _PYPROJECT.format(**words),
        folder / f"mxn_{name}" / "__init__.py": _MODULE.format(**words),
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tuple(files)
