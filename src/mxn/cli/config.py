"""`mxn config`: what may stand in files."""

from __future__ import annotations

import typer

config = typer.Typer(help="Say what may stand in mxn.yaml.", no_args_is_help=True, rich_markup_mode=None)


@config.callback()
def _root() -> None: ...


@config.command()
def schema() -> None:
    """Print the JSON Schema of mxn.yaml, for editors."""
    from mxn.cli.console import show_json
    from mxn.config.deployments import deployments_schema

    show_json(deployments_schema())
