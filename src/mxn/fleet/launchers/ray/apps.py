"""Serve applications made of replica groups and gateways."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import msgspec
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from mxn import __version__
from mxn.fleet.launchers.ray.group import HOST, ReplicaGroup
from mxn.fleet.launchers.ray.host import ReplicaHost
from mxn.fleet.ray_inventory import RESOURCE_PREFIX

GATEWAYS = "mxn-gateways"
"""Name of the Serve application with a gateway on every node."""

_HEALTH_CHECK_S = 1.0
_MANY = 1_000_000
"""Calls at once that Serve lets through: mxn's own line is in front of it."""

_VARIABLES = {
    # Nothing of mxn blocks its event loop, so Serve need not run it in a thread of its own: two hops less per message.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
}

_LOGGING = {"enable_access_log": False}
"""A line for every call would cost as much as the call."""

_DOWNSCALE_S = 60.0
_UPSCALE_S = 3.0
_LOOK_BACK_S = 15.0


def host_application(group: ReplicaGroup, drain_s: float) -> Any:
    """The replicas of one group. drain_s: what a replica that Serve stops may take to finish."""
    resources = {f"{RESOURCE_PREFIX}{group.kind}": group.chips}
    environment = dict(group.runtime_env)
    environment["env_vars"] = _VARIABLES | dict(environment.get("env_vars") or {})  # type: ignore[call-overload]
    return (
        serve.deployment(ReplicaHost)
        .options(
            name=HOST,
            **_version(msgspec.to_builtins(_as_started(group))),
            **({"autoscaling_config": _autoscaling(group)} if _scales(group) else {"num_replicas": group.replicas}),
            max_ongoing_requests=_MANY,
            ray_actor_options={
                "num_cpus": 0,
                "num_gpus": group.chips if group.uses_ray_gpus else 0,
                "resources": resources,
                "runtime_env": environment,
                **({"label_selector": dict(group.selector)} if group.selector else {}),
            },
            logging_config=_LOGGING,
            request_router_config=RequestRouterConfig(
                request_router_class="mxn.fleet.launchers.ray.router:AddressedRouter",
            ),
            health_check_period_s=_HEALTH_CHECK_S,
            health_check_timeout_s=10.0,
            graceful_shutdown_timeout_s=drain_s,
            graceful_shutdown_wait_loop_s=0.2,
        )
        .bind(msgspec.to_builtins(group))
    )


def gateway_application(
    gateway: Any, front: dict[str, Any], groups: list[dict[str, Any]], *, num_nodes: int, drain_s: float
) -> Any:
    """A gateway on every node. groups: what they are joined to, which they take on without starting again."""
    return (
        serve.deployment(gateway)
        .options(
            name="Gateway",
            **_version(front),
            num_replicas=num_nodes,
            max_replicas_per_node=1,
            user_config={"groups": groups},
            ray_actor_options={"num_cpus": 0},
            logging_config=_LOGGING,
            health_check_period_s=_HEALTH_CHECK_S,
            health_check_timeout_s=10.0,
            graceful_shutdown_timeout_s=drain_s + 5.0,
            graceful_shutdown_wait_loop_s=0.2,
        )
        .bind(front)
    )


def _version(of: object) -> dict[str, Any]:
    """Options that keep replicas running while what they were made of stays the same.

    Serve's own version of what `serve.run` is given is a random one: every call would start all replicas again.
    """
    text = json.dumps([__version__, of], sort_keys=True, default=str)
    return {"version": hashlib.sha256(text.encode()).hexdigest()[:16], "_internal": True}


def _as_started(group: ReplicaGroup) -> ReplicaGroup:
    """The group without what may change while its replicas run."""
    counted = replace(group, replicas=0, min_replicas=0, max_replicas=0, batch=0, percentile=0.0)
    return replace(counted, output_tokens_per_s=None, joules_per_token=None)


def _scales(group: ReplicaGroup) -> bool:
    return group.max_replicas > group.min_replicas


def _autoscaling(group: ReplicaGroup) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=group.min_replicas,
        initial_replicas=group.replicas,
        max_replicas=group.max_replicas,
        upscale_delay_s=_UPSCALE_S,
        downscale_delay_s=_DOWNSCALE_S,
        look_back_period_s=_LOOK_BACK_S,
        policy=AutoscalingPolicy(
            policy_function="mxn.fleet.launchers.ray.scaling:ScalingPolicy",
            policy_kwargs={"batch": group.batch or group.settings.max_num_seqs, "percentile": group.percentile},
        ),
    )
