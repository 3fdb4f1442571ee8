"""`mxn calibrate`: measures this machine, so that plans rank on measurements; writes and reads what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mxn.fleet.calibration.profile import Profile
    from mxn.fleet.calibration.store import MeasurementStore

DEFAULT_MODEL = "smollm2-135m-instruct"


def calibrate(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help=f"Default: {DEFAULT_MODEL}.")] = None,
    backends: Annotated[
        list[str] | None, typer.Option("--backend", help="Backends; every active one when left out. Repeatable.")
    ] = None,
    quantisations: Annotated[
        list[str] | None, typer.Option("--quantisation", help="Formats; the backend's own choice. Repeatable.")
    ] = None,
    budget_s: Annotated[float, typer.Option("--budget-s", min=1, help="Seconds for the points of a cell.")] = 120.0,
    is_list: Annotated[bool, typer.Option("--list", help="Measure nothing; show what was measured.")] = False,
    export_to: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Measure nothing; write all profiles as JSON.")
    ] = None,
    import_from: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", help="Measure nothing; add the profiles of such a file.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the profiles as JSON.")] = False,
) -> None:
    """Measure this machine, so that plans can rank on it.

    Cell by cell of model, backend and format: prompts alone, sequences that decode together, watts, and what the
    chip copies and multiplies without a model. Kept in the user's data folder, where `mxn plan` finds it. Let
    nothing else run meanwhile.
    """
    from mxn.cli.console import EXIT_FAILURE, show_json
    from mxn.errors import ConfigError
    from mxn.fleet.calibration.profile import profile_json
    from mxn.fleet.calibration.store import MeasurementStore

    store = MeasurementStore()
    if sum((is_list, export_to is not None, import_from is not None)) > 1:
        raise ConfigError("mxn calibrate: expected one of --list, --export and --import")
    if export_to is not None:
        _export(store, export_to)
        return
    if import_from is not None:
        _import(store, import_from)
        return
    if is_list:
        found: Sequence[Profile] = store.profiles()
    else:
        found = _measure(models or [DEFAULT_MODEL], backends or (), quantisations or ("auto",), budget_s)
        store.keep_profiles(found)
    if json_output:
        show_json([profile_json(profile) for profile in found])
    else:
        print("\n".join(_table(found)) if found else "no profiles")
    if not found and not is_list:
        raise typer.Exit(EXIT_FAILURE)


def _measure(
    models: Sequence[str], backends: Sequence[str], quantisations: Sequence[str], budget_s: float
) -> list[Profile]:
    from mxn.cli.console import err
    from mxn.fleet.calibration.session import calibrate_cells
    from mxn.store.fetch import fetch

    console = err()
    return calibrate_cells(
        [fetch(name) for name in models],
        backends=backends,
        quantisations=quantisations,
        budget_s=budget_s,
        on_line=lambda line: console.print(line, markup=False, soft_wrap=True),
    )


def _export(store: MeasurementStore, file: Path) -> None:
    import json

    from mxn.errors import ConfigError
    from mxn.fleet.calibration.profile import profile_json

    found = store.profiles()
    try:
        file.write_text(json.dumps([profile_json(profile) for profile in found], indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error
    print(f"wrote {len(found)} profiles to {file}")


def _import(store: MeasurementStore, file: Path) -> None:
    from mxn.errors import ConfigError
    from mxn.fleet.calibration.profile import read_profiles

    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    found = read_profiles(text, str(file))
    store.keep_profiles(found)
    print(f"took {len(found)} profiles from {file}")


def _table(profiles: Sequence[Profile]) -> list[str]:
    from mxn.fleet.calibration.fitting import profile_margins

    rows = [("model", "chip", "through", "tok/s, 1", "tok/s, most", "prefill tok/s", "left out", "idle W", "busy W")]
    for profile in profiles:
        most = max(profile.decode, key=lambda point: point.batch / point.median_s)
        alone = min(profile.decode, key=lambda point: (point.batch, point.context))
        prompt = max(profile.prefill, key=lambda point: point.tokens / point.median_s)
        prefill, decode = profile_margins(profile)
        power = profile.power
        rows.append(
            (
                profile.model,
                f"{profile.chip} x{profile.chip_cores}",
                f"{profile.backend} {profile.quantisation}",
                f"{1 / alone.median_s:.0f}",
                f"{most.batch / most.median_s:.0f} ({most.batch})",
                f"{prompt.tokens / prompt.median_s:.0f}",
                f"{prefill:.0%} / {decode:.0%}",
                "?" if power.idle_w is None else f"{power.idle_w:.1f} ({power.kind})",
                "?" if power.busy_w is None else f"{power.busy_w:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "left out: what nine of ten points of prefill / decode are within, each by a fit to the others"]
