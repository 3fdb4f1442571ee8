"""Who makes room for a replica on chips that lack the memory for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mxn.fleet.member import Member
from mxn.fleet.on_demand import OnDemand, is_busy


def spared_for(
    name: str,
    lacking: Mapping[str, float],
    members: Sequence[Member],
    kept: Collection[str],
    on_demand: OnDemand,
) -> list[Member] | None:
    """Replicas to end so that one of deployment `name` finds room; None when all that can be spared is not enough.

    What is ending already counts first. Then come replicas that leave anyway, first those whose deployment has others,
    and then other models that are loaded on demand and do nothing, longest unused first.

    Args: lacking: bytes that are missing, by chip. kept: ids of replicas that are wanted.
    """
    spared: dict[str, Member] = {}
    for chip, missing in lacking.items():
        there = [member for member in members if member.is_on(chip) and member.holds_memory]
        going = [member for member in there if member.ending is not None or member.keeper.id in spared]
        missing -= sum(member.placement.memory_bytes for member in going)
        for member in (*_leaving(there, kept), *_idle(there, kept, name, on_demand)):
            if missing > 0 and member.keeper.id not in spared:
                missing -= member.placement.memory_bytes
                spared[member.keeper.id] = member
        if missing > 0:
            return None
    return list(spared.values())


def _leaving(there: Sequence[Member], kept: Collection[str]) -> list[Member]:
    leaving = [member for member in there if member.ending is None and member.keeper.id not in kept]
    return sorted(leaving, key=lambda member: sum(keeper.is_ready for keeper in member.deployment.keepers) <= 1)


def _idle(there: Sequence[Member], kept: Collection[str], name: str, on_demand: OnDemand) -> list[Member]:
    idle = [
        member
        for member in there
        if member.ending is None
        and member.keeper.id in kept
        and member.deployment.name != name
        and member.deployment.spec.is_on_demand
        and not is_busy(member.deployment)
    ]
    return sorted(idle, key=lambda member: on_demand.used_s(member.deployment.name))
