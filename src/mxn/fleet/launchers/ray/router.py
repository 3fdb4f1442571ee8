"""Takes a call through a Serve handle to the replica that it names, and says which replicas Serve routes to.

Which replica gets a request is decided by mxn's own router, which knows prefixes, queues and joules. What is left to
decide in the handle is only which replica a gateway that has room for another one is joined to.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

_routable: dict[str, frozenset[str]] = {}
"""Replicas by application, as Serve last told this process's routers, which it makes and hands to nobody."""


def routable(app: str) -> frozenset[str]:
    """Ids of the replicas that Serve routes to: started, healthy, not about to be stopped."""
    return _routable.get(app, frozenset())


class AddressedRouter(RequestRouter):  # type: ignore[misc]  # Ray's class has no types that we check against
    """Reads a call's first argument: the id of the replica it is for, or the list of those that it is not for."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return []
        address = pending_request.args[0]
        if isinstance(address, str):
            return [[r for r in candidate_replicas if r.replica_id.unique_id == address]]
        return [[r for r in candidate_replicas if r.replica_id.unique_id not in address]]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        _routable[self._deployment_id.app_name] = frozenset(r.replica_id.unique_id for r in replicas)
        super().update_replicas(replicas)
