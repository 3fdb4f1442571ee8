"""`mxn diff`: what would change between a plan that runs and the best one now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def diff(
    file: Annotated[Path, typer.Argument(metavar="mxn.yaml", help="The file with cluster, policy and deployments.")],
    running: Annotated[Path, typer.Argument(metavar="PLAN.json", help="What runs, as `mxn plan --json` printed it.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    what_if: Annotated[str, typer.Option("--what-if", metavar="CHIPS", help="As for `mxn plan`.")] = "",
) -> None:
    """Show what would move if the plan were made again.

    A replica that runs is moved only when that saves `policy.stability.min_gain` of its cost and the price of loading.
    """
    from mxn.cli.console import show_json
    from mxn.config.deployments import load_deployments
    from mxn.fleet.moves import moves, read_running
    from mxn.fleet.plan import make_plan

    before = read_running(running)
    found = list(moves(before, make_plan(load_deployments(file), what_if=what_if, running=before)))
    if json_output:
        show_json(found)
        return
    for move in found:
        loading = "" if move.load_s is None else f", loads in about {move.load_s:.0f} s"
        print(f"{move.action:<5} {move.replicas:>4} x {move.deployment} in {move.pool}: {move.cell}{loading}")
    if all(move.action == "keep" for move in found):
        print("nothing would move")
