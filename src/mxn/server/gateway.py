"""What all routes share: the fleet, limits, metrics, and what the gateway keeps for each deployment."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING, Any

from mxn.core.model import Task
from mxn.errors import RequestError, UnavailableError
from mxn.server.errors import brief
from mxn.server.metrics import Metrics, ModelMetrics
from mxn.server.prompt import PromptEncoder
from mxn.server.settings import ServerSettings

if TYPE_CHECKING:
    from mxn.fleet.deployment import Deployment
    from mxn.fleet.fleet import Fleet

PRINCIPAL = "mxn.principal"
"""Key in an ASGI scope: SHA-256 of the API key that the request came with, empty when no key is set."""

MODEL = "mxn.model"
"""Key in an ASGI scope: name of the deployment that a request is for, once that is known."""


class Served:
    """What the gateway keeps for one deployment."""

    def __init__(self, deployment: Deployment, gateway: Gateway) -> None:
        self.deployment = deployment
        self.encoder = PromptEncoder(deployment, gateway.settings)
        self.metrics = ModelMetrics(gateway.metrics, deployment.name)
        self.fingerprint = f"mxn-{deployment.model.revision[:12]}"

    @property
    def power_source(self) -> str:
        """What meters the deployment's chip, and how far to trust it."""
        info = self.deployment.info
        return f"{info.power_source} ({info.power_provenance})" if info is not None else "none (unavailable)"


class Gateway:
    """One front door. `is_draining` turns new work away while what runs is finished."""

    def __init__(self, fleet: Fleet, settings: ServerSettings) -> None:
        self.fleet = fleet
        self.settings = settings
        self.metrics = Metrics(fleet, has_vllm_names=settings.vllm_metrics)
        self.is_draining = False
        self.num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._served: dict[str, Served] = {}
        self._salt_secret = secrets.token_bytes(32)

    def deployment(self, name: str | None) -> Deployment:
        """The deployment that serves `name`; the only one when no name is given.

        Raises: RequestError when there is none.
        """
        deployments = self.fleet.deployments
        if name is None:
            if len(deployments) == 1:
                return deployments[0]
            raise RequestError(f"model is required; available: {self._names()}", param="model")
        found = self.fleet.get(name)
        if found is None:
            raise RequestError(
                f"the model {brief(name)} does not exist; available: {self._names()}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return found

    def deployment_for(self, task: Task, name: str) -> Deployment:
        """The deployment that serves `name`, whose model must be for `task`. Raises: RequestError."""
        found = self.deployment(name)
        if (own := found.model.spec.task) != task:
            routes = {"generate": "/v1/chat/completions and /v1/completions", "embed": "/v1/embeddings"}
            what = "makes vectors" if own == "embed" else "generates text"
            raise RequestError(
                f"the model {brief(name)} {what}; it is served at {routes[own]}",
                param="model",
                code="unsupported_model",
            )
        return found

    def served(self, deployment: Deployment) -> Served:
        """What is kept for a deployment, made at its first use."""
        served = self._served.get(deployment.name)
        if served is None:
            served = self._served[deployment.name] = Served(deployment, self)
        return served

    def cache_salt(self, scope: dict[str, Any]) -> str:
        """Whose prefix blocks the request may share: those of the same API key, since this gateway's start."""
        principal: bytes = scope.get(PRINCIPAL, b"")
        return hmac.new(self._salt_secret, principal, hashlib.sha256).hexdigest()[:32]

    def enter(self) -> None:
        """A request begins."""
        self.num_active += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request has ended."""
        self.num_active -= 1
        if not self.num_active:
            self._idle.set()

    async def wait_until_idle(self) -> None:
        """Returns when no request is in work."""
        await self._idle.wait()

    async def start(self) -> None:
        """Starts the processes that render chat templates, ahead of the first conversation."""
        await asyncio.gather(*(self.served(d).encoder.start() for d in self.fleet.deployments))

    async def close(self) -> None:
        """Ends the processes that this gateway started; the fleet belongs to the caller."""
        await asyncio.gather(*(served.encoder.close() for served in self._served.values()))

    def _names(self) -> str:
        names = [deployment.name for deployment in self.fleet.deployments]
        return ", ".join(names[:20]) or "none"


def require_ready(deployment: Deployment) -> None:
    """Raises UnavailableError with the state and what is being waited for, unless requests are served or may wait."""
    if deployment.accepts:
        return
    found: str = "stalled" if deployment.is_stalled else deployment.state
    if deployment.state == "loading" and deployment.load_phase:
        found += f" ({deployment.load_phase}, {deployment.load_fraction:.0%})"
    reason = f": {deployment.reason}" if deployment.reason else ""
    raise UnavailableError(f"{deployment.name} cannot serve now, it is {found}{reason}")
