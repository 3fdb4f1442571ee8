"""`mxn up` and `launcher: ray` where they are refused; what they do on a cluster is in tests/fleet/launchers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from mxn.cli.serve import serve
from mxn.cli.up import up
from mxn.errors import BackendError, ConfigError


def test_up_starts_no_other_kind_of_cluster_than_ray() -> None:
    with pytest.raises(ConfigError, match="mxn up needs --ray"):
        up()


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_the_launcher_ray_says_what_to_install(tmp_path: Path) -> None:
    file = tmp_path / "mxn.yaml"
    file.write_text("cluster: {launcher: ray}\ndeployments: [{model: m}]\n")
    for run in (lambda: serve(model=str(file)), lambda: up(ray=True)):
        with pytest.raises(BackendError, match=r"pip install 'mxn\[ray\]'"):
            run()
