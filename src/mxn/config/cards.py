"""Reads a folder of cards: shipped ones first, the user's own on top, every fault of every file at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mxn.config.checked import Checked, load_checked
from mxn.config.environment import config_dirs
from mxn.errors import ConfigError

C = TypeVar("C", bound=Checked)


def load_cards(folder: Path | None, below: str, model: type[C], names: Callable[[C], Sequence[str]]) -> dict[str, C]:
    """Cards by name. `names` gives a card's own name first, then its aliases.

    folder: one folder with YAML files, instead of the `below` folders of what is shipped and what the user has.
    Raises: ConfigError that lists every fault of every file, and any name that two cards claim.
    """
    folders = [folder] if folder is not None else [parent / below for parent in config_dirs()]
    cards: dict[str, C] = {}
    faults: list[str] = []
    for one in folders:
        found: dict[str, C] = {}
        claimed: dict[str, Path] = {}
        for path in sorted([*one.glob("*.yaml"), *one.glob("*.yml")]) if one.is_dir() else []:
            try:
                card = load_checked(path, model)
            except ConfigError as error:
                faults.append(str(error))
                continue
            for name in names(card):
                if name in claimed:
                    faults.append(
                        f'{path}: "{name}" is already the name of {claimed[name]}; names and aliases must differ'
                    )
                claimed[name] = path
            found[names(card)[0]] = card
        cards = {name: card for name, card in cards.items() if name not in claimed}
        cards.update(found)
    if faults:
        raise ConfigError("\n".join(faults))
    return cards
