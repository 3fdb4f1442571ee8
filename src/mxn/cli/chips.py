"""`mxn chips`: what is there, through which backends, why a backend is absent, what measures power."""

from __future__ import annotations

from typing import Annotated

import typer


def chips(json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List chips, backends and power sources.

    Says why a backend is absent, and how power is measured or why it is not.
    """
    from mxn.backends.registry import load_backend, probe_all
    from mxn.cli.console import out, print_pairs, show_json, size_text

    probes = probe_all()
    found = []
    for name, probe in probes.items():
        if probe.state != "active":
            continue
        backend = load_backend(name)
        for chip in backend.chips():
            reader = backend.power(chip)
            power = {
                "source": reader.name,
                "kind": str(reader.kind),
                "detail": reader.detail,
                "limit_w": reader.power_limit_w,
            }
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
    console = out()
    for name, chip, power in found:
        if name == "fake":
            continue
        console.print(f"[bold]{chip.uid}[/] {chip.name}{f' ({chip.kind})' if chip.kind else ''}")
        facts = [
            ("backend", name),
            ("cores", str(chip.cores)),
            ("memory", size_text(chip.memory_bytes)),
            ("features", " ".join(chip.features) or "none"),
            ("power", f"{power['source']} ({power['kind']}): {power['detail']}"),
            ("power limit", f"{power['limit_w']:g} W" if power["limit_w"] else "unknown"),
        ]
        print_pairs(console, facts)
    console.print("\n[bold]Backends[/]")
    colours = {"active": "green", "absent": "dim", "broken": "red"}
    for name, probe in probes.items():
        versions = ", ".join(f"{library} {version}" for library, version in probe.versions.items())
        why = probe.reason + (f" ({versions})" if versions else "")
        console.print(f"  {name:<9} [{colours[probe.state]}]{probe.state}[/]", end=" ")
        console.print(why, markup=False, soft_wrap=True)
