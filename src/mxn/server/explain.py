"""POST /v1/mxn/explain: why a deployment runs where and as it does, and which replica a prompt would go to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from mxn.core.request import SamplingParams
from mxn.server.body import read_json
from mxn.server.errors import fit_to_show, send_json
from mxn.server.openai import ExplainRequest, check
from mxn.server.sampling import check_prompt_ids
from mxn.server.status import readiness

if TYPE_CHECKING:
    from mxn.fleet.deployment import Deployment
    from mxn.fleet.keeper import Keeper
    from mxn.server.gateway import Gateway


class ExplainEndpoint:
    """An ASGI endpoint. Asking begins nothing and changes nothing."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        gateway = self._gateway
        request = check(ExplainRequest, await read_json(scope["headers"], receive, gateway.settings))
        deployment = gateway.deployment(request.model)
        answer = _placements(deployment)
        if request.prompt is not None:
            ids = await gateway.served(deployment).encoder.encode_text(request.prompt, add_special_tokens=True)
            check_prompt_ids(ids, deployment, "prompt")
            sampling = SamplingParams(max_tokens=request.max_tokens or 1)
            weighed = deployment.weigh(ids, sampling, cache_salt=gateway.cache_salt(scope))
            answer["num_prompt_tokens"] = len(ids)
            answer["routing"] = [
                {
                    "replica": one.replica_id,
                    "is_chosen": one.is_chosen,
                    "has_room": one.has_room,
                    "first_token_s": round(one.first_token_s, 4),
                    "cached_tokens": one.candidate.cached_tokens,
                    "work_tokens": round(one.candidate.work_tokens),
                    "tokens_per_s": round(one.candidate.tokens_per_s, 1),
                    "prompt_token_s": one.candidate.prompt_token_s,
                    "joules_per_token": one.candidate.joules_per_token,
                }
                for one in weighed
            ]
        await send_json(send, msgspec.json.encode(answer))


def _placements(deployment: Deployment) -> dict[str, Any]:
    spec = deployment.spec
    return {
        **readiness(deployment, shows_reason=True),
        "trouble": fit_to_show(deployment.trouble),
        "limits": {
            "max_queue": spec.max_queue,
            "max_wait_s": spec.max_wait_s,
            "ttft_slo_s": spec.ttft_slo_s,
            "stall_s": spec.stall_s,
            "keep_loaded": spec.keep_loaded,
            "idle_unload_s": spec.idle_unload_s,
        },
        "placements": [_placement(keeper) for keeper in deployment.keepers],
    }


def _placement(keeper: Keeper) -> dict[str, Any]:
    """planned: what the plan expects at full load. measured: since the replica started, busy time only."""
    placement, replica = keeper.placement, keeper.replica
    found: dict[str, Any] = {
        "replica": keeper.id,
        "state": keeper.state,
        "reason": fit_to_show(keeper.reason),
        "backend": placement.backend,
        "chips": [chip.uid for chip in placement.chips],
        "why": fit_to_show(placement.why),
        "chip_share": placement.chip_share,
        "memory_bytes": placement.memory_bytes,
        "planned": {
            "output_tokens_per_s": placement.output_tokens_per_s,
            "joules_per_token": placement.joules_per_token,
        },
        "measured": None,
        "notes": [],
    }
    if replica is not None and replica.info is not None:
        stats = replica.stats
        joules = stats.request_energy_j if stats.request_energy_j is not None else stats.chip_energy_j
        found["measured"] = {
            "output_tokens_per_s": stats.num_output_tokens / stats.busy_s if stats.busy_s else None,
            "joules_per_token": joules / stats.num_output_tokens
            if joules is not None and stats.num_output_tokens
            else None,
        }
        found["notes"] = [fit_to_show(note) for note in replica.info.notes]
    return found
