"""`mxn backend`: for those who bring a backend of their own. `new`, `doctor`, `conform`, `certify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mxn.conformance.result import Certificate, CheckResult

backend = typer.Typer(help="Write, check and certify a backend.", no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="Backend name, as `mxn chips` lists it.")]
ModelOption = Annotated[str | None, typer.Option(help="Run this model instead of the kit's tiny ones.")]


@backend.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the backend: lower-case letters, digits and _.")],
    folder: Annotated[Path | None, typer.Option(help="Where to write the package; default: ./mxn-NAME.")] = None,
) -> None:
    """Write a package with a backend that passes level 0, to be filled in."""
    from mxn.cli.console import out
    from mxn.conformance.scaffold import write_scaffold

    written = write_scaffold(name, folder or Path(f"mxn-{name}"))
    console = out()
    for path in written:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    console.print(f"next: pip install -e {written[0].parent} && mxn backend conform {name} --level 0", markup=False)


@backend.command()
def doctor(name: Name, json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what one backend says of this host, and why it cannot be used if it cannot.

    Exits 1 when it is broken.
    """
    from mxn.backends.registry import installed_backends
    from mxn.backends.survey import survey
    from mxn.cli.console import EXIT_FAILURE, out, print_pairs, show_json, size_text
    from mxn.errors import BackendError

    entry = installed_backends().get(name)
    if entry is None:
        raise BackendError(f'backend "{name}" is not installed; available: {", ".join(installed_backends())}')
    said = survey([name])[name]
    if json_output:
        show_json({"entry": entry, "survey": said})
    else:
        console = out()
        pairs = [
            ("package", f"{entry.distribution}, {entry.target}"),
            ("state", f"{said.probe.state}: {said.probe.reason}"),
            ("libraries", ", ".join(f"{library} {v}" for library, v in said.probe.versions.items()) or "none named"),
            ("answered in", f"{said.seconds:.2f} s"),
        ]
        for seen in said.chips:
            can = seen.capabilities
            traits = [field for field in can.__dataclass_fields__ if getattr(can, field) is True]
            pairs += [
                ("chip", f"{seen.chip.uid}: {seen.chip.name}, {size_text(seen.chip.memory_bytes)}"),
                ("kv cache", can.kv),
                ("can", " ".join(traits) or "nothing declared"),
                ("quantisations", " ".join(can.quantisations) or "none named"),
                ("power", f"{seen.power.name} ({seen.power.kind}): {seen.power.detail}"),
            ]
        print_pairs(console, pairs, width=14)
    if said.probe.state == "broken":
        raise typer.Exit(EXIT_FAILURE)


@backend.command()
def conform(
    name: Name,
    level: Annotated[int, typer.Option(min=0, max=4, help="Highest level to run: 4 measures a profile.")] = 3,
    model: ModelOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the result as JSON to this file too.")] = None,
) -> None:
    """Run the conformance kit on a backend.

    L0 contract, L1 lifecycle, L2 truth of memory and energy, L3 numerics, L4 a measured profile. Exits 1 when a check
    fails or could not be run; "n/a" says that there is nothing to judge, with the reason, and is no pass.
    """
    from mxn.cli.console import EXIT_FAILURE, show_json
    from mxn.conformance.result import table

    certificate = _run(name, level, model)
    if out_file is not None:
        _write(certificate, out_file)
    if json_output:
        show_json(certificate)
    else:
        print(table(certificate))
    if not certificate.has_passed:
        raise typer.Exit(EXIT_FAILURE)


@backend.command()
def certify(
    name: Name,
    model: ModelOption = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Default: ./NAME-certificate.json.")] = None,
) -> None:
    """Run every level, and write the certificate: results, profile, versions and hashes.

    Nothing is written when a check fails.
    """
    from mxn.cli.console import EXIT_FAILURE, err
    from mxn.conformance.result import table

    certificate = _run(name, 4, model)
    print(table(certificate))
    if not certificate.has_passed:
        err().print("no certificate: see what failed above", markup=False)
        raise typer.Exit(EXIT_FAILURE)
    path = out_file or Path(f"{name}-certificate.json")
    _write(certificate, path)
    print(f"wrote {path}")


def _run(name: str, level: int, model: str | None) -> Certificate:
    from mxn.backends.registry import installed_backends
    from mxn.cli.console import err
    from mxn.conformance.run import conform as run
    from mxn.errors import BackendError
    from mxn.store.fetch import fetch

    if name not in installed_backends():
        raise BackendError(f'backend "{name}" is not installed; available: {", ".join(installed_backends())}')
    console = err()

    def on_check(result: CheckResult) -> None:
        if console.is_terminal:
            console.print(f"  {result.status:<7} L{result.level} {result.name} ({result.seconds:.1f} s)", markup=False)

    models = [fetch(model)] if model is not None else []
    return run(name, levels=range(level + 1), models=models, on_check=on_check)


def _write(certificate: Certificate, path: Path) -> None:
    import json
    from dataclasses import asdict

    path.write_text(json.dumps(asdict(certificate), indent=2) + "\n")
