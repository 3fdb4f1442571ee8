"""The entry point `mxn`: registers the commands and turns errors into two lines and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mxn import __version__, errors
from mxn.cli.apply import apply
from mxn.cli.backend import backend
from mxn.cli.bench import bench
from mxn.cli.calibrate import calibrate
from mxn.cli.chat import chat
from mxn.cli.chips import chips
from mxn.cli.config import config
from mxn.cli.console import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, show_error
from mxn.cli.cordon import cordon, uncordon
from mxn.cli.demo import demo
from mxn.cli.diff import diff
from mxn.cli.doctor import doctor
from mxn.cli.drain import drain
from mxn.cli.explain import explain
from mxn.cli.fit import fit
from mxn.cli.models import models
from mxn.cli.plan import plan
from mxn.cli.report import report
from mxn.cli.serve import serve
from mxn.cli.simulate import simulate
from mxn.cli.status import status
from mxn.cli.top import top
from mxn.cli.up import up

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 3 not everything can be served (plan), "
    "130 interrupted. "
    "Results go to stdout, progress and errors to stderr."
)

# Plain help: drawing it with rich takes 0.1 s more than everything else together.
app = typer.Typer(
    name="mxn",
    help="Run M models on N kinds of chips and see what every pair yields: tokens/s, watts, tokens per watt.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mxn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


for _command in (
    serve,
    up,
    chat,
    demo,
    plan,
    diff,
    simulate,
    fit,
    calibrate,
    report,
    status,
    top,
    explain,
    apply,
    drain,
    cordon,
    uncordon,
    chips,
    doctor,
):
    app.command()(_command)
app.add_typer(bench, name="bench")
app.add_typer(models, name="models")
app.add_typer(backend, name="backend")
app.add_typer(config, name="config")


def main() -> None:
    """Runs the command line. Exits 0, 1, 2 or 130."""
    try:
        app()
    except errors.ConfigError as error:
        show_error(error)
        sys.exit(EXIT_USAGE)
    except errors.MxnError as error:
        show_error(error)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    main()
