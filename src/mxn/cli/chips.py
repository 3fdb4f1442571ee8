"""`mxn chips`: what is there, through which backends, why a backend is absent, what measures power."""

from __future__ import annotations

from typing import Annotated

import typer


def chips(json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List chips, backends and power sources, and why a backend is absent."""
    from mxn.backends.registry import load_backend, probe_all
    from mxn.cli.console import out, show_json, size_text

    probes = probe_all()
    found = []
    for name, probe in probes.items():
        if probe.state != "active":
            continue
        backend = load_backend(name)
        for chip in backend.chips():
            reader = backend.power(chip)
            power = {"source": reader.name, "kind": str(reader.kind), "detail": reader.detail}
            reader.close()
            found.append((name, chip, power))
    if json_output:
        show_json(
            {
                "chips": [{"backend": name, "chip": chip, "power": power} for name, chip, power in found],
                "backends": [{"name": name, "probe": probe} for name, probe in probes.items()],
            }
        )
        return
    from rich import box
    from rich.table import Table

    console = out()
    table = Table(title="Chips", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("Chip", "Name", "Backend", "Cores", "Memory", "Features", "Power"):
        table.add_column(column, overflow="fold")
    for name, chip, power in found:
        cells = (chip.uid, chip.name + (f" ({chip.kind})" if chip.kind else ""), name, str(chip.cores))
        table.add_row(*cells, size_text(chip.memory_bytes), " ".join(chip.features), power["source"])
    console.print(table)
    table = Table(title="Backends", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("Backend", "State", "Why"):
        table.add_column(column, overflow="fold")
    colours = {"active": "green", "absent": "dim", "broken": "red"}
    for name, probe in probes.items():
        versions = ", ".join(f"{library} {version}" for library, version in probe.versions.items())
        why = probe.reason + (f" ({versions})" if versions else "")
        table.add_row(name, f"[{colours[probe.state]}]{probe.state}[/]", why)
    console.print(table)
    for _, chip, power in found:
        console.print(f"Power of {chip.uid}: {power['source']}, {power['kind']}. {power['detail']}", markup=False)
