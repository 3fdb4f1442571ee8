"""Which replicas Serve routes to, as it last told this process.

Serve makes the request routers and hands them to nobody, and it makes them from a copy of their module, so what they
learn is kept here.
"""

from __future__ import annotations

from collections.abc import Iterable

_routable: dict[str, frozenset[str]] = {}


def routable(app: str) -> frozenset[str]:
    """Ids of the replicas of a Serve application that are started, healthy and not about to be stopped."""
    return _routable.get(app, frozenset())


def note_routable(app: str, replica_ids: Iterable[str]) -> None:
    """Called by a router whenever Serve tells it."""
    _routable[app] = frozenset(replica_ids)
