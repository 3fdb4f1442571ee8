"""`mxn models`: cards with what is cached, `pull` and `rm`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

models = typer.Typer(
    help="List, fetch and remove models.", invoke_without_command=True, no_args_is_help=False, rich_markup_mode=None
)


@models.callback()
def list_models(
    context: typer.Context, json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List model cards: size, licence, whether the model is on this disk. Also: pull, rm."""
    if context.invoked_subcommand is not None:
        return
    from mxn.cli.console import out, show_json, size_text
    from mxn.config.model_card import load_model_cards
    from mxn.store.fetch import list_cached

    cards = load_model_cards()
    cached = {model.name: model for model in list_cached()}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": card.kind,
            "parameters": card.num_parameters,
            "licence": card.licence.name if card.licence else None,
            "source": card.source,
            "gated": card.gated,
            "cached_bytes": cached[name].bytes if name in cached else None,
        }
        for name, card in cards.items()
    ]
    rows += [
        {
            "name": model.name,
            "kind": "decoder",
            "parameters": None,
            "licence": None,
            "source": model.source,
            "gated": False,
            "cached_bytes": model.bytes,
        }
        for name, model in cached.items()
        if name not in cards
    ]
    if json_output:
        show_json(rows)
        return
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        caption="Any hub id (org/name), local folder or .gguf file can be served too.",
        caption_justify="left",
    )
    table.add_column("Model", no_wrap=True)
    table.add_column("Parameters", justify="right", no_wrap=True)
    table.add_column("Licence")
    table.add_column("On this disk", no_wrap=True)
    table.add_column("From", overflow="fold")
    for row in sorted(rows, key=lambda r: (r["cached_bytes"] is None, str(r["name"]))):
        here = f"[green]{size_text(row['cached_bytes'])}[/]" if row["cached_bytes"] else "no"
        table.add_row(
            str(row["name"]) + (" (embedding)" if row["kind"] == "embedding" else ""),
            _count_text(row["parameters"]),
            str(row["licence"] or "unknown") + (" (gated)" if row["gated"] else ""),
            here,
            str(row["source"]).partition("#")[0],
        )
    out().print(table)


@models.command()
def pull(
    name: Annotated[str, typer.Argument(help="Card name, hub id (org/name), local folder or .gguf file.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again if it is here already.")] = False,
) -> None:
    """Fetch a model, check it and convert it if need be."""
    from mxn.cli.console import out
    from mxn.cli.prepare import files_progress
    from mxn.cli.progress import Phases
    from mxn.store.fetch import fetch

    with Phases() as phases:
        model = fetch(name, progress=files_progress(phases), verify=verify)
    console = out()
    console.print(f"{model.name} is in {model.folder}", markup=False, soft_wrap=True)
    if model.licence:
        console.print(f"licence: {model.licence}", markup=False)


@models.command()
def rm(name: Annotated[str, typer.Argument(help="Name of a model in the cache.")]) -> None:
    """Remove a model from the cache."""
    from mxn.cli.console import out, size_text
    from mxn.store.fetch import remove

    for gone in remove(name):
        out().print(f"removed {gone.name} ({size_text(gone.bytes)})", markup=False)


def _count_text(count: object) -> str:
    if not isinstance(count, int):
        return "unknown"
    return f"{count / 1e9:.1f} B" if count >= 0.9995e9 else f"{count / 1e6:.0f} M"
