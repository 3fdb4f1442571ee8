"""What `mxn.yaml` says of Ray, for `cluster.launcher: ray`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mxn.config.checked import Checked

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Text = Annotated[str, Field(min_length=1, max_length=4096)]


class BackendEnvironment(Checked):
    """What a backend's replicas need beside what is installed on the nodes. Ray sets it up, once per node."""

    pip: tuple[_Text, ...] = ()
    """Requirements for an environment of their own on top of the node's."""
    image: _Text | None = None
    """Container image that replicas run in, with mxn in it."""
    python: _Text | None = None
    """Interpreter on the nodes, with mxn and Ray in its environment."""
    variables: dict[str, str] = Field(default_factory=dict)
    """Environment variables."""

    def runtime_env(self) -> dict[str, object]:
        """The same as Ray's `runtime_env`."""
        parts = {
            "pip": list(self.pip),
            "image_uri": self.image,
            "py_executable": self.python,
            "env_vars": dict(self.variables),
        }
        return {name: value for name, value in parts.items() if value}


class RayConfig(Checked):
    """How a Ray cluster is reached and used."""

    address: _Text = "auto"
    """Address of the head, host:port; auto takes RAY_ADDRESS or the cluster that runs on this machine."""
    environments: dict[_Name, BackendEnvironment] = Field(default_factory=dict)
    """By backend, what its replicas need beside what is installed on the nodes."""
