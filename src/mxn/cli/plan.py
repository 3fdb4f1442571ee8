"""`mxn plan`: what would run where, why, and how far from the best possible that is. Computes, changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXIT_INFEASIBLE = 3


def plan(
    file: Annotated[Path, typer.Argument(metavar="mxn.yaml", help="The file with cluster, policy and deployments.")],
    explain: Annotated[
        bool, typer.Option("--explain", help="Say the runner-up and the reason for every refusal.")
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with the matrix.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    what_if: Annotated[
        str, typer.Option("--what-if", metavar="CHIPS", help='Chips to add and take away: "+2 mi300x,-1 h100-sxm".')
    ] = "",
) -> None:
    """Place deployments on chips, with reasons and a proven gap.

    Says which backend, which format and how many replicas, and what that yields. Computes, changes nothing.
    Exit code 3 when somebody stays unserved and the policy's fallback is "refuse".
    """
    from mxn.cli.console import show_json
    from mxn.config.deployments import load_deployments
    from mxn.fleet.plan import make_plan
    from mxn.fleet.plan_text import plan_lines

    checked = load_deployments(file)
    made = make_plan(checked, what_if=what_if)
    if html is not None:
        from mxn.cli.plan_page import plan_page

        _write_page(html, plan_page(made, title=f"Plan of {file.name}"))
    if json_output:
        show_json(made)
    else:
        print("\n".join(plan_lines(made, explain=explain)))
    fallback = checked.policy.fallback
    if not made.is_complete and fallback != "allow":
        if fallback == "warn":
            typer.echo("warning: not everything is served, and policy.fallback is warn", err=True)
            return
        raise typer.Exit(EXIT_INFEASIBLE)


def _write_page(path: Path, page: str) -> None:
    from mxn.errors import ConfigError

    try:
        path.write_text(page)
    except OSError as error:
        raise ConfigError(f"--html: {path} cannot be written: {error}") from error
