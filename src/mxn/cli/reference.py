"""Prints `docs/cli.md`: every command with its options, from the program itself. Run: python -m mxn.cli.reference"""

from __future__ import annotations

import typer

from mxn.cli.main import EPILOG, app

HEAD = """# The `mxn` command

This page is printed by `python -m mxn.cli.reference` and checked by a test; change the commands, not the page.
"""


def reference() -> str:
    """The page as Markdown."""
    group = typer.main.get_command(app)
    parts = [HEAD, EPILOG + "\n"]
    parts += _section("mxn", group, level=1)
    return "\n".join(parts).rstrip() + "\n"


def _section(path: str, command: object, *, level: int) -> list[str]:
    """One command and those below it. Typer brings its own copy of click, so its types have no public names."""
    subcommands: dict[str, object] = getattr(command, "commands", {})
    lines = [f"{'#' * level} `{path}`", ""] if level > 1 else []
    lines += [(getattr(command, "help", None) or "").strip(), ""] if level > 1 else []
    rows = []
    for parameter in getattr(command, "params", []):
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        is_option = parameter.param_type_name == "option"
        name = (
            ", ".join((*parameter.opts, *parameter.secondary_opts))
            if is_option
            else (parameter.metavar or parameter.name.upper())
        )
        default = parameter.default
        is_shown = not (default in (None, False, True) or callable(default) or parameter.required)
        shown = f"`{default}`" if is_shown else ""
        text = " ".join((parameter.help or "").split()).replace("|", "\\|")
        name = name.replace("|", "\\|")
        rows.append(f"| `{name}` | {text} | {shown} |")
    if rows and level > 1:
        lines += ["| | | default |", "|---|---|---|", *rows, ""]
    for name, sub in subcommands.items():
        lines += _section(f"{path} {name}", sub, level=level + 1)
    return lines


if __name__ == "__main__":
    print(reference(), end="")
