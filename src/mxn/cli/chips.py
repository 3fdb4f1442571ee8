"""`mxn chips`: what is there, through which backends, why a backend is absent, what measures power."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def chips(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Print them as JSON for `ray start --resources`.")] = False,
) -> None:
    """List chips, backends and power sources.

    Says why a backend is absent, and how power is measured or why it is not. A chip that several backends reach is
    listed once.
    """
    from mxn.backends.survey import physical_chips, survey
    from mxn.cli.console import out, print_pairs, show_json, size_text

    surveys = survey()
    found = physical_chips(surveys)
    if ray:
        from mxn.config.chip_card import load_chip_cards
        from mxn.fleet.ray_inventory import SeenChip, resources_of

        print(json.dumps(resources_of([SeenChip(seen.chip, seen.backends) for seen in found], load_chip_cards())))
        return
    if json_output:
        show_json({"chips": found, "backends": [{"name": name, "probe": s.probe} for name, s in surveys.items()]})
        return
    console = out()
    for seen in found:
        chip = seen.chip
        if all(surveys[name].is_scripted for name in seen.backends):
            continue
        console.print(f"[bold]{chip.uid}[/] {chip.name}{f' ({chip.kind})' if chip.kind else ''}")
        facts = [
            ("backends", ", ".join(seen.backends)),
            ("cores", str(chip.cores)),
            ("memory", size_text(chip.memory_bytes)),
            ("features", " ".join(chip.features) or "none"),
            ("power", f"{seen.power.name} ({seen.power.kind}): {seen.power.detail}"),
            ("power limit", f"{seen.power.power_limit_w:g} W" if seen.power.power_limit_w else "unknown"),
            *(("note", note) for note in seen.notes),
        ]
        print_pairs(console, facts)
    console.print("\n[bold]Backends[/]")
    colours = {"active": "green", "absent": "dim", "broken": "red"}
    for name, said in surveys.items():
        probe = said.probe
        versions = ", ".join(f"{library} {version}" for library, version in probe.versions.items())
        why = probe.reason + (f" ({versions})" if versions else "")
        console.print(f"  {name:<9} [{colours[probe.state]}]{probe.state}[/]", end=" ")
        console.print(why, markup=False, soft_wrap=True)
