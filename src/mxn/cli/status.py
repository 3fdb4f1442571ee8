"""`mxn status`: what a running server serves, how, and how busy it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def status(
    url: Annotated[str, typer.Option(help="Address of an mxn server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="MXN_API_KEY", help="Key that the server asks for.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a running mxn server serves and how. Exits 1 when nothing there is ready."""
    from mxn.cli.console import EXIT_FAILURE, out, print_pairs, show_json
    from mxn.cli.converse import get_json, http_client

    base = url.rstrip("/").removesuffix("/v1")
    with http_client(api_key) as client:
        found = get_json(client, f"{base}/v1/mxn/status")
    is_ready = any(d["is_ready"] for d in found["deployments"])
    if json_output:
        show_json(found)
    else:
        console = out()
        gateway = found["gateway"]
        state = "draining" if gateway["is_draining"] else "serving"
        console.print(f"mxn {gateway['version']} at {base}: {state}, {gateway['num_active_requests']} requests in work")
        for deployment in found["deployments"]:
            console.print(f"\n[bold]{deployment['model']}[/]: {_state(deployment)}")
            print_pairs(console, _lines(deployment))
    if not is_ready:
        raise typer.Exit(EXIT_FAILURE)


def _state(deployment: dict[str, Any]) -> str:
    if deployment["is_ready"]:
        return "[green]ready[/]"
    text = "stalled" if deployment["is_stalled"] else deployment["state"]
    if deployment["load_phase"] and deployment["state"] == "loading":
        text += f" ({deployment['load_phase']}, {deployment['load_fraction']:.0%})"
    return f"[red]{text}[/]" + (f": {deployment['reason']}" if deployment["reason"] else "")


def _lines(deployment: dict[str, Any]) -> list[tuple[str, str]]:
    from mxn.cli.console import size_text

    chips = ", ".join(f"{chip['uid']} ({chip['name']})" for chip in deployment["chips"])
    lines = [("backend", f"{deployment['backend']} on {chips}")]
    replica, stats = deployment["replica"], deployment["stats"]
    if replica is None:
        return lines
    used = stats["num_total_blocks"] - stats["num_free_blocks"]
    return [
        *lines,
        ("attention", replica["attention"]),
        ("quantisation", f"{replica['quantisation']}, weights {size_text(replica['weight_bytes'])}"),
        ("program", replica["program"] + (f", {replica['threads']} threads" if replica["threads"] else "")),
        ("context", f"{deployment['max_context']:,} tokens; KV cache {size_text(replica['kv_bytes'])}"),
        ("KV blocks", f"{used:,} of {stats['num_total_blocks']:,} in use"),
        ("sequences", f"{stats['num_running']} running, {stats['num_waiting']} waiting"),
        (
            "so far",
            f"{stats['num_finished']:,} finished, {stats['num_aborted']:,} aborted, {stats['num_failed']:,} failed; "
            f"{stats['num_output_tokens']:,} tokens out, {stats['num_cached_tokens']:,} of "
            f"{stats['num_prompt_tokens']:,} prompt tokens from the prefix cache",
        ),
        *(("note", note) for note in replica["notes"]),
    ]
