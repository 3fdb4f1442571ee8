"""Serving on a Ray cluster: what `mxn serve` does for `cluster.launcher: ray`, and `mxn up --ray` for this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from typing import TYPE_CHECKING, Any

from mxn.errors import BackendError

if TYPE_CHECKING:
    from mxn.cli.progress import Phases
    from mxn.config.deployments import DeploymentsFile
    from mxn.fleet.ray_controller import RayController
    from mxn.server.settings import ServerSettings

_LOOK_S = 0.5


def require_ray() -> None:
    """Raises: BackendError when Ray is not installed."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise BackendError("the launcher ray needs Ray Serve: pip install 'mxn[ray]'")


def serve_on_ray(
    file: DeploymentsFile, settings: ServerSettings, where: tuple[str, int], address: str, *, json_output: bool
) -> int:
    """Deploys a file on the cluster at `address` and keeps it so until SIGTERM or SIGINT; returns the exit code.

    Replicas and gateways go when this ends in order. If it is killed they run on, and are taken over by the next.
    """
    require_ray()
    from mxn.cli.progress import Phases
    from mxn.fleet.launchers.ray.node import use_token
    from mxn.fleet.launchers.ray.nodes import connect
    from mxn.server.run import check_address

    check_address(where[0], settings)
    use_token()
    connect(address)
    with Phases() as phases:
        return asyncio.run(_serve(file, settings, where, phases, json_output=json_output))


async def _serve(
    file: DeploymentsFile, settings: ServerSettings, where: tuple[str, int], phases: Phases, *, json_output: bool
) -> int:
    import msgspec

    from mxn.cli.prepare import files_progress
    from mxn.fleet.ray_controller import RayController
    from mxn.server.ray_gateway import FrontDoor, RayGateway
    from mxn.store.fetch import fetch

    front = FrontDoor(host=where[0], port=where[1], settings=settings)
    controller = RayController(
        file,
        lambda model: fetch(model, progress=files_progress(phases)),
        RayGateway,
        msgspec.to_builtins(front),
        drain_s=settings.drain_s,
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    keeping: asyncio.Task[None] | None = None
    try:
        phases("plan", 0.0)
        await controller.start()
        phases("plan", 1.0)
        await _until_ready(controller, where, phases, stop)
        phases.finish()
        _announce(controller, where, json_output=json_output)
        keeping = asyncio.create_task(controller.keep())
        await asyncio.wait({keeping, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            await keeping
        return 0
    finally:
        if keeping is not None:
            keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeping
        await controller.stop()


async def _until_ready(controller: RayController, where: tuple[str, int], phases: Phases, stop: asyncio.Event) -> None:
    """Returns when every group has a replica and this node's gateway knows. Raises: BackendError when none starts."""
    while not stop.is_set():
        running = await controller.num_running()
        failures = await controller.failures()
        waiting = [app for app in controller.groups if not running.get(app) and app not in failures]
        phases("replicas", 1 - len(waiting) / len(controller.groups))
        if not waiting:
            if all(app in failures for app in controller.groups):
                raise BackendError("; ".join(f"{app}: {reason}" for app, reason in failures.items()))
            started = {group.deployment for app, group in controller.groups.items() if app not in failures}
            if await _gateway_is_ready(where, len(started)):
                return
        await asyncio.sleep(_LOOK_S)


async def _gateway_is_ready(where: tuple[str, int], num_deployments: int) -> bool:
    """True when the gateway of this node has so many deployments ready."""
    import httpx

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(where[0], where[0])
    url = f"http://{f'[{host}]' if ':' in host else host}:{where[1]}/readyz"
    async with httpx.AsyncClient(trust_env=False, timeout=2.0) as client:
        with contextlib.suppress(httpx.HTTPError):
            told = (await client.get(url)).json()["deployments"]
            return len([one for one in told if one["is_ready"]]) >= num_deployments
    return False


def _announce(controller: RayController, where: tuple[str, int], *, json_output: bool) -> None:
    url = f"http://{where[0]}:{where[1]}/v1"
    if json_output:
        groups: list[dict[str, Any]] = [
            {"name": g.deployment, "backend": g.backend, "chip": g.kind, "replicas": g.replicas}
            for g in controller.groups.values()
        ]
        print(json.dumps({"url": url, "deployments": groups, "shortfalls": controller.shortfalls}), flush=True)
        return
    from mxn.cli.console import out, print_pairs

    console = out()
    for name, reason in controller.shortfalls.items():
        console.print(f"{name} is short of replicas: {reason}", style="red", markup=False, soft_wrap=True)
    console.print(f"\nServed at {url}, by a gateway on every node", style="bold", markup=False)
    bounds = {g.app: f"{g.min_replicas} to {g.max_replicas}" for g in controller.groups.values()}
    print_pairs(
        console,
        [
            (
                g.deployment,
                f"{bounds[g.app]} replicas through {g.backend} on {g.kind}"
                if g.max_replicas > g.min_replicas
                else f"{g.replicas} replica{'s' if g.replicas > 1 else ''} through {g.backend} on {g.kind}",
            )
            for g in controller.groups.values()
        ],
    )
    console.print("Ctrl-C stops it.", markup=False)
