"""`mxn drain`: empties a chip, a deployment or a replica."""

from __future__ import annotations

from typing import Annotated

import typer

from mxn.cli.apply import KEY, URL


def drain(
    name: Annotated[str, typer.Argument(help="A deployment, a replica such as smollm2/0, or a chip such as gpu-0.")],
    url: URL = "http://127.0.0.1:8000",
    api_key: KEY = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let what runs finish and end it. A chip's replicas move to other chips first, where there is room.

    Until the next `mxn apply` for a deployment or replica, until `mxn uncordon` for a chip.
    """
    from mxn.cli.control import post, show

    show(post(url, api_key, "drain", {"name": name}), json_output=json_output)
