"""Which of the models that are loaded on demand are wanted now, and since when nobody has used them."""

from __future__ import annotations

import logging
import time

from mxn.fleet.deployment import Deployment
from mxn.fleet.spec import DeploymentSpec

log = logging.getLogger(__name__)

TRY_AGAIN_S = 10.0
"""How long a model that failed to load is not tried again."""


class OnDemand:
    """Keeps the use of every deployment that may be without a replica until somebody asks for it."""

    def __init__(self) -> None:
        self._wanted: set[str] = set()
        self._used_s: dict[str, float] = {}
        self._num_ended: dict[str, int] = {}

    def ask_for(self, name: str) -> bool:
        """Notes that a deployment is asked for. True when it was not wanted so far."""
        self._used_s[name] = time.monotonic()
        is_new = name not in self._wanted
        self._wanted.add(name)
        return is_new

    def drop(self, name: str) -> None:
        """It is not wanted any more, until it is asked for again."""
        self._wanted.discard(name)

    def is_wanted(self, spec: DeploymentSpec) -> bool:
        """Whether it should be loaded now. One that is to be kept loaded is, when it is seen for the first time."""
        if spec.name not in self._used_s:
            self._used_s[spec.name] = time.monotonic()
            if spec.keep_loaded:
                self._wanted.add(spec.name)
        return spec.name in self._wanted

    def used_s(self, name: str) -> float:
        """When it was last seen in use, on the monotonic clock."""
        return self._used_s.get(name, 0.0)

    def look(self, deployment: Deployment, *, is_cramped: bool) -> bool:
        """Notes whether a deployment is in use, and drops one that was not for its time.

        is_cramped: it waits for room. Returns: whether it takes requests: one that failed to load takes none for a
        while, and then is tried again for the next.
        """
        spec, now_s = deployment.spec, time.monotonic()
        if spec.name not in self._wanted:
            return True
        stats = deployment.stats
        num_ended = stats.num_finished + stats.num_aborted + stats.num_failed
        if is_busy(deployment) or num_ended != self._num_ended.get(spec.name):
            self._num_ended[spec.name] = num_ended
            self._used_s[spec.name] = now_s
        unused_s = now_s - self._used_s[spec.name]
        if deployment.state == "failed" and not is_cramped:
            if unused_s > TRY_AGAIN_S:
                self.drop(spec.name)
            return unused_s > TRY_AGAIN_S
        if spec.idle_unload_s is not None and unused_s > spec.idle_unload_s:
            log.info("%s is unloaded after %g s without a request", spec.name, spec.idle_unload_s)
            self.drop(spec.name)
        return True


def is_busy(deployment: Deployment) -> bool:
    """True while it has sequences, in line or at work."""
    replicas = [keeper.replica for keeper in deployment.keepers if keeper.replica is not None]
    return deployment.num_waiting > 0 or any(replica.num_streams for replica in replicas)
