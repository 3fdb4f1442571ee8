"""Chip cards: a chip's data sheet, each figure with its source and how far it can be trusted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mxn.config.cards import load_cards
from mxn.config.checked import Checked
from mxn.core.quantity import Provenance, Quantity

Confidence = Literal["high", "medium", "low"]
Id = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]


class Figure(Checked):
    """A number from outside. The unit is in the name of the field that holds it; an unknown figure is null, never 0."""

    value: Annotated[float, Field(gt=0, le=1e9)]
    source: Annotated[str, Field(min_length=1)]
    """Where it was read, or "recalled, not checked"."""
    confidence: Confidence
    note: str | None = None


class Compute(Checked):
    """Dense peak rates by data type."""

    bf16_tflops: Figure | None = None
    fp16_tflops: Figure | None = None
    fp8_tflops: Figure | None = None
    fp4_tflops: Figure | None = None
    int8_tops: Figure | None = None


class ChipCard(Checked):
    """What is known of a kind of chip."""

    id: Id
    name: str
    vendor: str
    kind: Literal["gpu", "npu", "tpu", "cpu", "soc"]
    matches: tuple[Annotated[str, Field(min_length=3)], ...] = ()
    """Words by which drivers and operating systems call the chip."""
    memory_type: str | None = None
    memory_gib: Figure | None = None
    """Memory on the chip; null for CPUs, whose memory is the host's."""
    memory_bandwidth_gb_s: Figure | None = None
    compute: Compute = Compute()
    tdp_w: Figure | None = None
    idle_w: Figure | None = None
    all_in_w: Figure | None = None
    """Watts at the utility meter for one chip, its share of host, network and cooling included."""
    price_usd_per_hour: Figure | None = None
    """Rent of one chip."""
    tco_usd_per_hour: Figure | None = None
    """Cost of owning one chip."""
    notes: str | None = None


def load_chip_cards(folder: Path | None = None) -> dict[str, ChipCard]:
    """Chip cards by id: those shipped with mxn and the user's own on top, or those of one folder.

    Raises: ConfigError that lists every fault of every file.
    """
    return load_cards(folder, "chips", ChipCard, lambda card: (card.id,))


def find_chip_card(cards: Mapping[str, ChipCard], name: str) -> ChipCard | None:
    """The card for a chip as a driver or the operating system names it; the longest match wins, None when none does."""
    best: tuple[int, ChipCard | None] = (0, None)
    for card in cards.values():
        for match in card.matches:
            whole_words = rf"(?<![A-Za-z0-9]){re.escape(match)}(?![A-Za-z0-9+])"
            if len(match) > best[0] and re.search(whole_words, name, re.IGNORECASE):
                best = (len(match), card)
    return best[1]


def figure_quantity(figure: Figure | None, unit: str, *, what: str) -> Quantity:
    """A card's figure as a quantity; unavailable, with the reason, when the card does not know it."""
    if figure is None:
        return Quantity.unavailable(unit, f"the chip card has no {what}")
    source = f"{figure.source} (confidence {figure.confidence})"
    return Quantity(value=figure.value, unit=unit, provenance=Provenance.DATASHEET, source=source)
