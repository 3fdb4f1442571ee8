"""`mxn fit`: whether a model fits on a chip, part by part, with where every figure comes from."""

from __future__ import annotations

from typing import Annotated

import typer


def fit(
    model: Annotated[str, typer.Argument(help="Name of a model card.")],
    chip: Annotated[str | None, typer.Option("--chip", help="Id of a chip card; the chips here when left out.")] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Tokens of a sequence.")] = None,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences of that length at once.")] = 1,
    quantisation: Annotated[
        str | None, typer.Option("--quantisation", help="A format; all that the backend offers when left out.")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option("--memory-gib", min=0, help="Memory of the node, for a chip card of a CPU.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a model fits on a chip, part by part.

    Weights, KV cache, activations, overhead and reserve, each with its source.
    "fits" holds with every estimate's error against it. "may fit" does not.
    """
    from mxn.cli.console import out, show_json
    from mxn.fleet.fit_report import fit_reports

    reports = fit_reports(
        model,
        chip=chip,
        context=context,
        sequences=sequences,
        quantisation=quantisation,
        memory_gib=memory_gib,
    )
    if json_output:
        show_json([{**report.facts, "verdict": report.fit.verdict, "fit": report.fit} for report in reports])
        return
    console = out()
    for report in reports:
        console.print("\n".join(report.lines()), markup=False, soft_wrap=True)
