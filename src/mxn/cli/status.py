"""`mxn status`: what a running server serves, where and how, and how busy it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def status(
    model: Annotated[str | None, typer.Argument(help="Show this deployment alone, with all its details.")] = None,
    url: Annotated[str, typer.Option(help="Address of an mxn server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="MXN_API_KEY", help="Key that the server asks for.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a running mxn server serves, where and how. Exits 1 when nothing of it is ready."""
    from mxn.cli.console import EXIT_FAILURE, out, show_json
    from mxn.cli.converse import get_json, http_client
    from mxn.errors import BackendError

    base = url.rstrip("/").removesuffix("/v1")
    with http_client(api_key) as client:
        found = get_json(client, f"{base}/v1/mxn/status")
    deployments = [d for d in found["deployments"] if model in (None, d["model"])]
    if model is not None and not deployments:
        names = ", ".join(d["model"] for d in found["deployments"]) or "none"
        raise BackendError(f"{base} has no deployment {model}; it has {names}")
    if json_output:
        show_json(found if model is None else deployments[0])
    else:
        _print(out(), base, found, deployments, is_detailed=len(deployments) == 1)
    if not any(d["is_ready"] for d in deployments):
        raise typer.Exit(EXIT_FAILURE)


def _print(
    console: Console, base: str, found: Mapping[str, Any], deployments: list[dict[str, Any]], *, is_detailed: bool
) -> None:
    gateway = found["gateway"]
    state = "draining" if gateway["is_draining"] else "serving"
    console.print(f"mxn {gateway['version']} at {base}: {state}, {gateway['num_active_requests']} requests in work")
    for deployment in deployments:
        replicas = deployment["replicas"]
        count = (
            f", {sum(r['is_ready'] for r in replicas)} of {len(replicas)} replicas ready" if len(replicas) > 1 else ""
        )
        line = f", {deployment['num_waiting']} in line" if deployment["num_waiting"] else ""
        console.print(f"\n[bold]{deployment['model']}[/]: {_state(deployment)}{count}{line}", soft_wrap=True)
        if deployment["trouble"]:
            console.print(f"  degraded: {deployment['trouble']}", style="yellow", markup=False, soft_wrap=True)
        if is_detailed:
            _print_details(console, deployment)
        else:
            _print_table(console, deployment)
    troubled = [chip for chip in found["chips"] if chip["state"] != "ok"]
    if troubled:
        console.print()
    for chip in troubled:
        console.print(f"chip {chip['uid']}: [red]{chip['state']}[/]: {chip['reason']}", soft_wrap=True)


def _print_details(console: Console, deployment: Mapping[str, Any]) -> None:
    from mxn.cli.console import print_pairs

    for replica in deployment["replicas"]:
        if len(deployment["replicas"]) > 1:
            console.print(f"\n  {replica['id']}: {_state(replica)}", soft_wrap=True)
        print_pairs(console, _lines(deployment, replica))


def _print_table(console: Console, deployment: Mapping[str, Any]) -> None:
    """One line per replica."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("  replica")
    for name in ("state", "backend", "chips", "quantisation", "program"):
        table.add_column(name)
    for name in ("running", "waiting", "KV", "tokens out", "restarts"):
        table.add_column(name, justify="right")
    for replica in deployment["replicas"]:
        info, stats = replica["info"] or {}, replica["stats"] or {}
        total = stats.get("num_total_blocks", 0)
        table.add_row(
            f"  {replica['id']}",
            _state(replica, has_reason=False),
            replica["backend"],
            "+".join(replica["chips"]),
            info.get("quantisation", "-"),
            info.get("program", "-"),
            str(stats.get("num_running", "-")),
            str(stats.get("num_waiting", "-")),
            f"{1 - stats['num_free_blocks'] / total:.0%}" if total else "-",
            f"{stats.get('num_output_tokens', 0):,}",
            str(replica["num_restarts"]),
        )
    console.print(table)
    for replica in deployment["replicas"]:
        if replica["reason"]:
            console.print(f"  {replica['id']}: {replica['reason']}", markup=False, soft_wrap=True)


def _state(part: Mapping[str, Any], *, has_reason: bool = True) -> str:
    from mxn.cli.top import state_text

    if part["is_ready"]:
        return "[green]ready[/]"
    from rich.markup import escape

    why = f": {escape(part['reason'])}" if has_reason and part["reason"] else ""
    return f"[red]{state_text(part)}[/]{why}"


def _lines(deployment: Mapping[str, Any], replica: Mapping[str, Any]) -> list[tuple[str, str]]:
    from mxn.cli.console import size_text

    names = {chip["uid"]: chip["name"] for chip in deployment["chips"]}
    chips = ", ".join(f"{uid} ({names[uid]})" for uid in replica["chips"])
    lines = [("backend", f"{replica['backend']} on {chips}" + (f": {replica['why']}" if replica["why"] else ""))]
    info, stats = replica["info"], replica["stats"]
    if info is None or stats is None:
        return lines
    used = stats["num_total_blocks"] - stats["num_free_blocks"]
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in info["load_s"].items())
    restarts = f"; restarted {replica['num_restarts']} times" if replica["num_restarts"] else ""
    return [
        *lines,
        ("attention", info["attention"]),
        ("quantisation", f"{info['quantisation']}, weights {size_text(info['weight_bytes'])}"),
        ("program", info["program"] + (f", {info['threads']} threads" if info["threads"] else "")),
        ("context", f"{info['max_context']:,} tokens; KV cache {size_text(info['kv_bytes'])}"),
        ("KV blocks", f"{used:,} of {stats['num_total_blocks']:,} in use"),
        ("sequences", f"{stats['num_running']} running, {stats['num_waiting']} waiting"),
        ("started in", f"{sum(info['load_s'].values()):.1f} s ({phases}){restarts}"),
        ("power", f"{info['power_source']} ({info['power_provenance']})"),
        (
            "so far",
            f"{stats['num_finished']:,} finished, {stats['num_aborted']:,} aborted, {stats['num_failed']:,} failed; "
            f"{stats['num_output_tokens']:,} tokens out, {stats['num_cached_tokens']:,} of "
            f"{stats['num_prompt_tokens']:,} prompt tokens from the prefix cache",
        ),
        *(("note", note) for note in info["notes"]),
    ]
