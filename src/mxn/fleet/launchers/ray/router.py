"""Takes a call through a Serve handle to the replica that it names, and notes which replicas Serve routes to.

Which replica gets a request is decided by mxn's own router, which knows prefixes, queues and joules. What is left to
decide in the handle is only which replica a gateway that has room for another one is joined to.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from mxn.fleet.launchers.ray.routes import note_routable


class AddressedRouter(RequestRouter):  # type: ignore[misc]  # Ray's class has no types that we check against
    """Reads a call's first argument: the id of the replica it is for, or the list of those that it is not for."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return []
        # Without this Serve asks again at once while there is no such replica, and its loop does nothing else any more.
        pending_request.routing_context.should_backoff = True
        address = pending_request.args[0]
        if isinstance(address, str):
            return [[r for r in candidate_replicas if r.replica_id.unique_id == address]]
        return [[r for r in candidate_replicas if r.replica_id.unique_id not in address]]

    async def _select_from_candidate_replicas(
        self, candidates: list[RunningReplica], backoff_index: int
    ) -> RunningReplica | None:
        return candidates[0] if candidates else None

    async def _probe_queue_lens(self, replicas: list[RunningReplica], backoff_index: int) -> list[object]:
        """Asks nobody: mxn's line is in front of the gateway, and replicas take whatever is sent."""
        return []

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        note_routable(self._deployment_id.app_name, (r.replica_id.unique_id for r in replicas))
        super().update_replicas(replicas)
