"""Backends of other vendors, really installed: modules and entry points in a folder that Python searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

InstallPlugins = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def install_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstallPlugins:
    """Installs a distribution "acme-chips" with one module and one entry point `NAME = acme_NAME:Acme` per source."""

    def install(sources: Mapping[str, str]) -> Path:
        info = tmp_path / "acme_chips-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-chips\nVersion: 1.0\n")
        lines = ["[mxn.backends]"]
        for name, source in sources.items():
            (tmp_path / f"acme_{name}.py").write_text(source + "\n")
            lines.append(f"{name} = acme_{name}:Acme")
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the processes that are started
        return tmp_path

    return install
