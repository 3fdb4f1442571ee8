"""What all scenarios are run with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MODEL = "m"
"""The name under which every scenario's model is served."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """backend: "fake" scripts the speed of its steps; any other runs the model's own.

    scale: share of the full durations and counts, for a short look.
    """

    model: str
    backend: str = "fake"
    scale: float = 1.0

    @property
    def is_fake(self) -> bool:
        return self.backend == "fake"

    def seconds(self, full: float, at_least: float = 2.0) -> float:
        """A duration, scaled."""
        return max(at_least, full * self.scale)

    def count(self, full: int, at_least: int = 1) -> int:
        """A number of things, scaled."""
        return max(at_least, round(full * self.scale))

    def deployment(
        self, name: str = MODEL, *, step_ms: float = 5.0, options: dict[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any]:
        """An entry of `deployments` in mxn.yaml.

        What a CPU would otherwise choose by measuring is set, so that all replicas compute alike.
        """
        own: dict[str, Any] = {"step_ms": step_ms} if self.is_fake else {"tune": "off", "order": "fixed"}
        more = {} if self.is_fake else {"quantisation": "int8", "threads": 1, "kv_gib": 0.25, "context_length": 1024}
        entry = {"name": name, "model": self.model, "backend": self.backend, **more, **fields}
        return {**entry, "options": {**own, **(options or {})}}

    def config(self, *deployments: dict[str, Any], **server: Any) -> dict[str, Any]:
        """A whole mxn.yaml."""
        return {"server": {"drain_s": 30, **server}, "deployments": list(deployments)}

    def replicas(self, count: int, **fields: Any) -> dict[str, Any]:
        """A whole mxn.yaml with one deployment of so many replicas."""
        return self.config(self.deployment(replicas={"min": count, "max": count}, **fields))
