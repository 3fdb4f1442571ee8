"""From what a user typed to a model card: a card's name, a hub id, a folder, a GGUF file or a source."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from mxn.config.model_card import ModelCard, find_model_card, load_model_cards
from mxn.config.source import NAME_PATTERN, FolderSource, GgufSource, HubSource, Source, parse_source
from mxn.errors import ModelError

_SCHEMES = ("hf:", "pypi:", "folder:", "gguf:")
_HUB_ID = re.compile(r"[^/\s@#]+/[^/\s@#]+(@[^#\s]+)?(#\S+)?")


def resolve(name: str, cards: Mapping[str, ModelCard] | None = None) -> ModelCard:
    """The card for a name. Looks at cards and the local disk only, never at the network.

    Order: card name or alias, local path, hub id of a card, any hub id.
    Raises: ModelError that lists near names and the forms a name may have.
    """
    if cards is None:
        cards = load_model_cards()
    if (card := find_model_card(cards, name)) is not None:
        return card
    source = _as_source(name)
    if source is None:
        raise _unknown(name, cards)
    if isinstance(source, (FolderSource, GgufSource)):
        return _local_card(source)
    for card in cards.values():
        known = card.parsed_source
        if known == source or (
            isinstance(known, HubSource)
            and isinstance(source, HubSource)
            and (known.repo.lower(), known.revision, known.file) == (source.repo.lower(), source.revision, source.file)
        ):
            return card
    title = source.repo if isinstance(source, HubSource) else source.package
    if isinstance(source, HubSource) and source.file is not None:
        title = Path(source.file).stem
    return ModelCard(name=title, source=str(source))


def _as_source(name: str) -> Source | None:
    if not name or "\0" in name or len(name) > 4096:
        return None
    if name.startswith(_SCHEMES):
        try:
            return parse_source(name)
        except ValueError as error:
            raise ModelError(f'"{name}" is not a source: expected {error}') from None
    path = Path(name).expanduser()
    if name.endswith(".gguf") and (path.is_file() or "#" not in name):
        return GgufSource(path=path.absolute())
    if (path / "config.json").is_file() or name.startswith((".", "~", os.sep)):
        return FolderSource(path=path.absolute())
    if _HUB_ID.fullmatch(name):
        try:
            return parse_source(f"hf:{name}")
        except ValueError:
            return None
    return None


def _local_card(source: FolderSource | GgufSource) -> ModelCard:
    path = source.path
    if isinstance(source, GgufSource) and not path.is_file():
        raise ModelError(f"{path}: no such GGUF file; check the path")
    if isinstance(source, FolderSource) and not path.is_dir():
        raise ModelError(f"{path}: no such folder; give a folder with config.json, tokenizer.json and *.safetensors")
    title = path.stem if isinstance(source, GgufSource) else path.name
    clean = re.sub(r"[^A-Za-z0-9._-]", "-", title).lstrip("._-")[:96]
    return ModelCard(name=clean if re.fullmatch(NAME_PATTERN, clean) else "model", source=str(source))


def _unknown(name: str, cards: Mapping[str, ModelCard]) -> ModelError:
    words = {word.lower(): card.name for card in cards.values() for word in (card.name, *card.aliases)}
    near = difflib.get_close_matches(name.lower(), list(words), n=5, cutoff=0.5)
    names = dict.fromkeys(words[word] for word in near)
    shown = name if len(name) <= 100 else name[:97] + "..."
    return ModelError(
        f'no model is called "{shown}". '
        + (f"Near names: {', '.join(names)}. " if names else "")
        + "Give a name that `mxn models` lists, a hub id (org/name), a folder with safetensors, or a .gguf file"
    )
