"""`mxn apply`: a running server goes over to what a file says now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

URL = Annotated[str, typer.Option(help="Address of an mxn server on this machine.")]
KEY = Annotated[str | None, typer.Option(envvar="MXN_API_KEY", help="Key that the server asks for.")]


def apply(
    file: Annotated[
        Path | None, typer.Argument(metavar="[mxn.yaml]", help="Default: the file that the server was started with.")
    ] = None,
    url: URL = "http://127.0.0.1:8000",
    api_key: KEY = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Have a running server go over to what a file says.

    Replica by replica and without a gap. A bad file changes nothing: its faults are printed and the old plan goes
    on. What it says under `server` counts from the next start on.
    """
    from mxn.cli.control import post, show
    from mxn.config.deployments import load_deployments

    if file is not None:
        load_deployments(file)  # its faults are told here, with the path as the user knows it
    body = {} if file is None else {"path": str(file.resolve())}
    show(post(url, api_key, "apply", body), json_output=json_output)
