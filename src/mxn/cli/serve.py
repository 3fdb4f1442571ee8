"""`mxn serve`: one model by name, or all deployments of an mxn.yaml, behind an OpenAI-compatible API."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import asyncio

    from mxn.cli.progress import Phases
    from mxn.config.deployments import DeploymentConfig, DeploymentsFile
    from mxn.core.model import Task
    from mxn.fleet.deployment import Deployment
    from mxn.fleet.desired import Wishes
    from mxn.fleet.fleet import Fleet
    from mxn.fleet.keeper import Keeper
    from mxn.fleet.spec import PlacementSpec
    from mxn.fleet.state import RuntimeFolder
    from mxn.server.settings import ServerSettings


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL | mxn.yaml]",
            help="Card name, hub id (org/name), local folder, .gguf or YAML file. Default: smollm2-135m-instruct.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on; any but a loopback address needs an API key. Default: 127.0.0.1."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 lets the system choose. Default: 8000.", min=0, max=65535)
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that clients must send; may be repeated. MXN_API_KEY keeps it out of process lists."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name that clients ask for.")] = None,
    backend: Annotated[str | None, typer.Option(help="Backend; auto takes the best one that is active.")] = None,
    quantisation: Annotated[str | None, typer.Option(help="auto, fp32, bf16, fp16, fp8, int8 or int4.")] = None,
    context: Annotated[int | None, typer.Option(help="Longest prompt and output together, in tokens.", min=1)] = None,
    kv_gib: Annotated[float | None, typer.Option(help="Memory for the KV cache.", min=0.001)] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads on a CPU.", min=1)] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences in one step at most.", min=1)] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Tokens computed in one step at most.", min=1)] = None,
    max_queue: Annotated[int | None, typer.Option(help="Requests that may wait; more get 429.", min=1)] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache", help="Whether prompts that begin alike share work.", show_default=False
        ),
    ] = None,
    attention: Annotated[str | None, typer.Option(help="Attention backend, or auto.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the backend, such as gguf=model.gguf; may be repeated.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON when ready, instead of text.")
    ] = False,
    vllm_metrics: Annotated[
        bool, typer.Option("--vllm-metrics", help="Tell figures under vLLM's names too, for inference gateways.")
    ] = False,
    log_format: Annotated[
        str | None, typer.Option(help="text, or json: one object per line. Default: MXN_LOG_FORMAT, else text.")
    ] = None,
    until_stdin_closes: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
) -> None:
    """Serve a model, or all of an mxn.yaml.

    Ends on Ctrl-C or SIGTERM, and lets running requests finish; a second signal ends at once.
    """
    from dataclasses import replace

    from mxn.cli.logs import set_up_logging
    from mxn.cli.prepare import backend_options
    from mxn.errors import ConfigError

    set_up_logging(log_format)
    flags = {
        "name": name,
        "backend": backend,
        "quantisation": quantisation,
        "context_length": context,
        "kv_gib": kv_gib,
        "threads": threads,
        "max_num_seqs": max_num_seqs,
        "max_step_tokens": max_step_tokens,
        "max_queue": max_queue,
        "prefix_cache": prefix_cache,
        "attention": attention,
        "options": backend_options(option),
    }
    given = [
        f"--{flag.removesuffix('_length').replace('options', 'option').replace('_', '-')}"
        for flag, value in flags.items()
        if value is not None
    ]
    file = file_for(model, flags)
    if given and _is_file(model):
        raise ConfigError(f"{', '.join(given)} cannot be combined with {model}: write it into the file instead")
    settings = replace(server_settings(file, api_key or []), vllm_metrics=vllm_metrics or file.server.vllm_metrics)
    where = (host or file.server.host, file.server.port if port is None else port)
    if until_stdin_closes:
        _stop_when_stdin_closes()
    if file.cluster.launcher == "ray":
        from mxn.cli.ray_serving import serve_on_ray

        raise typer.Exit(serve_on_ray(file, settings, where, file.cluster.ray.address, json_output=json_output))
    source = Path(model) if model is not None and _is_file(model) else None
    raise typer.Exit(_run(file, source, settings, where, json_output=json_output))


def _stop_when_stdin_closes() -> None:
    """Ends this process as SIGTERM does once nobody can write to its stdin any more: its parent is gone."""
    import os
    import threading

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin", daemon=True).start()


def _run(
    file: DeploymentsFile,
    source: Path | None,
    settings: ServerSettings,
    where: tuple[str, int],
    *,
    json_output: bool,
) -> int:
    import asyncio

    from mxn.cli.prepare import files_progress
    from mxn.cli.progress import Phases
    from mxn.fleet.desired import Wishes
    from mxn.fleet.state import RuntimeFolder
    from mxn.server.run import check_address
    from mxn.store.fetch import fetch

    check_address(where[0], settings)
    folder = RuntimeFolder.of(source) if source is not None else None
    try:
        with Phases() as phases:
            wishes = Wishes.fetched(file, lambda model: fetch(model, progress=files_progress(phases)))
            return asyncio.run(_serve(wishes, folder, source, settings, where, phases, json_output=json_output))
    finally:
        if folder is not None:
            folder.close()


async def _serve(
    wishes: Wishes,
    folder: RuntimeFolder | None,
    source: Path | None,
    settings: ServerSettings,
    where: tuple[str, int],
    phases: Phases,
    *,
    json_output: bool,
) -> int:
    """Opens the port at once, so that probes see the loading, and tells the user when it is done."""
    import asyncio

    from mxn.errors import BackendError
    from mxn.server.app import build_app
    from mxn.server.run import serve as serve_http

    fleet = await _fleet(wishes, folder, source, settings)
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    serving = asyncio.create_task(
        serve_http(build_app(fleet, settings), *where, on_started=lambda base: url.set_result(f"{base}/v1"), stop=stop)
    )
    if source is not None:
        _reload_on_hangup(fleet, stop)
    either: set[asyncio.Future[Any]] = {serving, url}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    try:
        if serving.done():
            return await serving
        loading = asyncio.create_task(_load(fleet, phases))
        either = {serving, loading}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
        elif not any(deployment.is_ready or deployment.state == "unloaded" for deployment in fleet.deployments):
            stop.set()
            await serving
            raise BackendError("; ".join(f"{d.name} could not be loaded: {d.reason}" for d in fleet.deployments))
        else:
            phases.finish()
            _announce(fleet, await url, settings, json_output=json_output)
        return await serving
    finally:
        await fleet.stop(settings.drain_s)


async def _fleet(wishes: Wishes, folder: RuntimeFolder | None, source: Path | None, settings: ServerSettings) -> Fleet:
    """The fleet of a file, which takes over what an earlier server of it left; or the fleet of one model."""
    import asyncio

    from mxn.fleet.fleet import Fleet
    from mxn.fleet.launchers.local import LocalLauncher
    from mxn.fleet.spec import load_of

    if folder is None:
        return Fleet(await asyncio.to_thread(wishes), LocalLauncher(), resolve=wishes, drain_s=settings.drain_s)
    wishes.pids = lambda: [record.pid for record in folder.state.replicas]
    spec = await asyncio.to_thread(wishes, frozenset(folder.state.cordoned))
    launcher = LocalLauncher(folder, adopt_s=wishes.file.cluster.adopt_s)
    wanted = [(one, load_of(one, p), p.environment) for one in spec.deployments for p in one.placements]
    await launcher.keep_only([(load, environment) for _, load, environment in wanted])
    fleet = Fleet(spec, launcher, folder=folder, source=source, resolve=wishes, drain_s=settings.drain_s)
    for one, load, environment in wanted:
        if one.is_on_demand and launcher.holds(load, environment):
            fleet.supervisor.keep_loaded(one.name)
    return fleet


def _reload_on_hangup(fleet: Fleet, stop: asyncio.Event) -> None:
    """Reads the file again on SIGHUP; ends as on SIGTERM when the signal says that the terminal is gone."""
    import asyncio
    import logging

    from mxn.errors import MxnError

    log = logging.getLogger("mxn.serve")
    has_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # as nohup sets it
    tasks: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        try:
            await fleet.reload()
            log.info("SIGHUP: the file was read again")
        except MxnError as error:
            log.error("SIGHUP: nothing was changed:\n%s", error)

    def on_hangup() -> None:
        if has_terminal and not _has_terminal():
            stop.set()
            return
        task = asyncio.get_running_loop().create_task(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)


def _has_terminal() -> bool:
    import os

    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


async def _load(fleet: Fleet, phases: Phases) -> None:
    """Starts the fleet and passes its progress on."""
    import asyncio

    starting = asyncio.create_task(fleet.start())
    prefixes = {d.name: f"{d.name}: " if len(fleet.deployments) > 1 else "" for d in fleet.deployments}
    told: dict[str, tuple[str, float]] = {}
    try:
        while not starting.done():
            for d in fleet.deployments:
                now = (d.load_phase, d.load_fraction)
                is_moving = d.state == "loading" and d.load_phase and not d.load_phase.startswith("waiting")
                if is_moving and told.get(d.name) != now:
                    told[d.name] = now
                    phases(prefixes[d.name] + d.load_phase, d.load_fraction)
            await asyncio.wait({starting}, timeout=0.1)
        await starting
        for d in fleet.deployments:
            if d.is_ready:  # its last phase has ended, whether or not we looked in time
                phases(prefixes[d.name] + d.load_phase, 1.0)
    finally:
        starting.cancel()


def _announce(fleet: Fleet, url: str, settings: ServerSettings, *, json_output: bool) -> None:
    """Tells what is served, what was chosen and how to use it."""
    if json_output:
        print(json.dumps({"url": url, "deployments": [_facts(d) for d in fleet.deployments]}), flush=True)
        return
    from mxn.cli.console import out, print_pairs

    console = out()
    for deployment in fleet.deployments:
        if deployment.state == "unloaded":
            console.print(f"\n{deployment.name} is loaded when it is first asked for", style="bold", markup=False)
        elif not deployment.is_ready:
            console.print(f"{deployment.name} failed: {deployment.reason}", style="red", markup=False, soft_wrap=True)
        elif deployment.trouble:
            console.print(f"{deployment.name}: {deployment.trouble}", style="yellow", markup=False, soft_wrap=True)
        ready = [keeper for keeper in deployment.keepers if keeper.replica is not None and keeper.replica.info]
        for keeper in ready:
            name = deployment.name if len(deployment.keepers) == 1 else keeper.id
            console.print(f"\n{name} is served at {url}", style="bold", markup=False)
            print_pairs(console, _lines(keeper))
    first = next((d for d in fleet.deployments if d.is_ready), fleet.deployments[0])
    route, question = _example(first.name, first.model.spec.task)
    key = ' -H "Authorization: Bearer $MXN_API_KEY"' if settings.api_keys else ""
    console.print("\nTry it:", markup=False)
    console.print(
        f"  curl {url}/{route} -H 'Content-Type: application/json'{key} \\\n    -d '{json.dumps(question)}'",
        markup=False,
        soft_wrap=True,
    )
    console.print("Ctrl-C stops it.", markup=False)


def _example(model: str, task: Task) -> tuple[str, dict[str, Any]]:
    """A route and a body to try a model with."""
    if task == "embed":
        return "embeddings", {"model": model, "input": "What is the capital of France?"}
    message = {"role": "user", "content": "What is the capital of France?"}
    return "chat/completions", {"model": model, "temperature": 0, "messages": [message]}


def _lines(keeper: Keeper) -> list[tuple[str, str]]:
    from mxn.cli.console import size_text

    info, placement = keeper.replica.info if keeper.replica else None, keeper.placement
    if info is None:
        return []
    [chip, *others] = placement.chips
    where = f"{chip.uid} ({chip.name}, {chip.cores} cores)" + "".join(f", {other.uid}" for other in others)
    threads = f", {info.threads} threads" if info.threads else ""
    blocks = f" = {info.num_blocks:,} blocks of {info.block_size} tokens" if info.num_blocks else ""
    seconds = "".join(f", {phase} {s:.1f}" for phase, s in info.load_s.items())
    power = _power_of(placement)
    return [
        ("backend", f"{info.backend} on {where}{threads}: {placement.why}"),
        ("attention", info.attention),
        ("quantisation", f"{info.quantisation}, weights {size_text(info.weight_bytes)}"),
        ("program", info.program),
        ("context", f"{info.max_context:,} tokens; KV cache {size_text(info.kv_bytes)}{blocks}"),
        ("power", f"{power['source']} ({power['kind']}): {power['detail']}"),
        ("loaded in", f"{sum(info.load_s.values()):.1f} s{seconds}"),
        *(("note", note) for note in info.notes),
    ]


def _facts(deployment: Deployment) -> dict[str, object]:
    """A deployment and its first replica, whose facts stand for the others'; `replicas` names them all."""
    import msgspec

    facts: dict[str, object] = {
        "name": deployment.name,
        "folder": deployment.model.folder,
        "state": deployment.state,
        "trouble": deployment.trouble,
        "replicas": [keeper.id for keeper in deployment.keepers],
    }
    keeper = next((keeper for keeper in deployment.keepers if keeper.replica and keeper.replica.info), None)
    if keeper is None or keeper.replica is None:
        return facts
    placement = keeper.placement
    about = {"chip": placement.chips[0].uid, "why": placement.why, "power": _power_of(placement)}
    return {**facts, **about, **msgspec.to_builtins(keeper.replica.info)}


def _power_of(placement: PlacementSpec) -> dict[str, str]:
    """What meters the placement's first chip."""
    from mxn.backends.registry import load_backend

    power = load_backend(placement.backend).power(placement.chips[0])
    try:
        return {"source": power.name, "kind": str(power.kind), "detail": power.detail}
    finally:
        power.close()


def _is_file(model: str | None) -> bool:
    return model is not None and model.endswith((".yaml", ".yml"))


def file_for(model: str | None, flags: Mapping[str, object]) -> DeploymentsFile:
    """A YAML file as it is, or one deployment made of the command line."""
    from mxn.cli.prepare import DEFAULT_MODEL, deployment_config
    from mxn.config.deployments import DeploymentsFile, load_deployments

    if model is not None and _is_file(model):
        return load_deployments(Path(model))
    config: DeploymentConfig = deployment_config(model=model or DEFAULT_MODEL, **flags)
    return DeploymentsFile(deployments=(config,))


def server_settings(file: DeploymentsFile, keys: list[str]) -> ServerSettings:
    """The file's limits and keys, with keys of the command line and of the environment."""
    from mxn.config.environment import api_keys
    from mxn.server.settings import MIB, ServerSettings

    return ServerSettings(
        api_keys=tuple(dict.fromkeys((*keys, *file.server.api_keys, *api_keys()))),
        max_body_bytes=int(file.server.max_body_mib * MIB),
        drain_s=file.server.drain_s,
    )
