"""`mxn report`: Markdown or one self-contained HTML page from benchmark records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    files: Annotated[list[Path], typer.Argument(help="Records written by mxn bench --json.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with tables and charts to this file.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables to this file; without files, to stdout.")
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Tokens per watt",
) -> None:
    """Turn records into tables or a page.

    Matrix, frontiers, power over time; with a note wherever figures are not like for like.
    """
    from mxn.bench.page import page
    from mxn.bench.records import load, write_whole
    from mxn.bench.report import report_markdown

    reports = [load(path) for path in files]
    text = "\n".join(report_markdown(one) for one in reports)
    if html:
        write_whole(html, page(reports, title=title).encode())
    if markdown:
        write_whole(markdown, text.encode())
    if not html and not markdown:
        typer.echo(text)
