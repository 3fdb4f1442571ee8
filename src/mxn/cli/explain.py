"""`mxn explain`: why a deployment runs where and as it does, and which replica a prompt would go to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer


def explain(
    model: Annotated[str | None, typer.Argument(help="Deployment; the only one when left out.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Tell where a request with this text would go now.")] = None,
    url: Annotated[str, typer.Option(help="Address of an mxn server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="MXN_API_KEY", help="Key that the server asks for.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say why a deployment runs where and how it does.

    With a prompt, also where a request would go. Computes, changes nothing. What a plan chose and refused before
    anything runs is told by `mxn plan --explain`.
    """
    from mxn.cli.console import out, print_pairs, show_json
    from mxn.cli.converse import http_client, post_json

    base = url.rstrip("/").removesuffix("/v1")
    body = {name: value for name, value in (("model", model), ("prompt", prompt)) if value is not None}
    with http_client(api_key) as client:
        found = post_json(client, f"{base}/v1/mxn/explain", body)
    if json_output:
        show_json(found)
        return
    console = out()
    console.print(f"{found['model']}: {found['state']}", style="bold", markup=False)
    if found["trouble"]:
        console.print(f"  degraded: {found['trouble']}", style="yellow", markup=False, soft_wrap=True)
    for placement in found["placements"]:
        console.print(f"\n  {placement['replica']}: {placement['state']}", markup=False)
        print_pairs(console, _lines(placement))
    limits = found["limits"]
    console.print()
    line = f"{limits['max_queue']:,} may wait, each at most {limits['max_wait_s']:g} s; more get 429"
    slo = "none" if limits["ttft_slo_s"] is None else f"first token within {limits['ttft_slo_s']:g} s"
    print_pairs(console, [("line", line), ("limit", slo)])
    if "routing" in found:
        _print_routing(found)


def _lines(placement: Mapping[str, Any]) -> list[tuple[str, str]]:
    from mxn.cli.console import size_text

    planned, measured = placement["planned"], placement["measured"]
    lines = [
        ("where", f"{'+'.join(placement['chips'])} through {placement['backend']}"),
        ("why", placement["why"] or "as the file says"),
    ]
    if placement["reason"]:
        lines.append(("state", placement["reason"]))
    if placement["memory_bytes"]:
        lines.append(("memory", f"{size_text(placement['memory_bytes'])} of each chip"))
    if planned["output_tokens_per_s"] is not None:
        lines.append(("planned", _yield_text(planned)))
    if measured is not None and measured["output_tokens_per_s"] is not None:
        lines.append(("measured", f"{_yield_text(measured)}, while it was computing"))
    return [*lines, *(("note", note) for note in placement["notes"])]


def _yield_text(found: Mapping[str, float | None]) -> str:
    from mxn.cli.top import number

    joules = found["joules_per_token"]
    watt = "" if not joules else f", {number(1 / joules)} tokens/W"
    return f"{number(found['output_tokens_per_s'])} output tokens/s{watt}"


def _print_routing(found: Mapping[str, Any]) -> None:
    from rich.table import Table

    from mxn.cli.console import out
    from mxn.cli.top import number

    console = out()
    console.print(f"\nA request with these {found['num_prompt_tokens']:,} tokens would go", markup=False)
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for name in ("  to", "first token, ms", "work ahead, tokens", "tokens/s", "cached tokens", "J/token"):
        table.add_column(name, justify="left" if name == "  to" else "right")
    for one in found["routing"]:
        mark = "> " if one["is_chosen"] else "  "
        table.add_row(
            f"{mark}{one['replica']}" + ("" if one["has_room"] else " (full)"),
            number(1e3 * one["first_token_s"]),
            f"{one['work_tokens']:,}",
            number(one["tokens_per_s"]),
            f"{one['cached_tokens']:,}",
            number(one["joules_per_token"]),
        )
    console.print(table)
    console.print(
        "The least time to the first token wins; joules count too while that is far within the limit.", style="dim"
    )
