"""`mxn cordon` and `mxn uncordon`: whether replicas may be started on a chip."""

from __future__ import annotations

from typing import Annotated

import typer

from mxn.cli.apply import KEY, URL

CHIP = Annotated[str, typer.Argument(help="The chip's uid, as `mxn chips` shows it.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def cordon(chip: CHIP, url: URL = "http://127.0.0.1:8000", api_key: KEY = None, json_output: JSON = False) -> None:
    """Start no replica on a chip any more.

    What runs there goes on until the next plan.
    """
    from mxn.cli.control import post, show

    show(post(url, api_key, "cordon", {"chip": chip}), json_output=json_output)


def uncordon(chip: CHIP, url: URL = "http://127.0.0.1:8000", api_key: KEY = None, json_output: JSON = False) -> None:
    """Let replicas be started on a chip again.

    A new plan is made with it.
    """
    from mxn.cli.control import post, show

    show(post(url, api_key, "uncordon", {"chip": chip}), json_output=json_output)
