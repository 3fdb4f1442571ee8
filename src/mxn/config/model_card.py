"""Model cards: where a model's files come from, how they are checked, and what its architecture is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mxn.config.cards import load_cards
from mxn.config.checked import Checked
from mxn.config.source import NAME_PATTERN, Source, WheelSource, parse_source
from mxn.core.model import ModelSpec, Task

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=10**15)]
Quantisation = Literal["fp32", "bf16", "fp16", "int8", "int4"]


class Licence(Checked):
    """Terms under which the weights are given."""

    name: str
    url: str | None = None


class CardFile(Checked):
    """A file of the model as its source holds it."""

    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]*$")]
    bytes: Count | None = None
    sha256: Sha256 | None = None


class Archive(Checked):
    """A wheel to fetch.

    Where a card's source is a folder in a wheel, all its archives go into one folder; of what is not a model's usual
    file, that is kept which the card names in `files`. Elsewhere the members, joined in order, are the card's one file.
    """

    source: str
    bytes: Count | None = None
    """Size of the wheel."""
    sha256: Sha256 | None = None
    """Hash of the wheel."""

    @field_validator("source")
    @classmethod
    def _is_wheel(cls, text: str) -> str:
        if not isinstance(parse_source(text), WheelSource):
            raise ValueError("a source of the form pypi:package==version#path/in/wheel")
        return text


class Architecture(Checked):
    """Facts from the model's config.json; what nobody could confirm stays null."""

    model_type: str | None = None
    """transformers' name of the architecture, such as "llama"."""
    num_layers: Count | None = None
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    """Width of a dense MLP, or of one expert."""
    vocab_size: Count | None = None
    num_heads: Count | None = None
    num_kv_heads: Count | None = None
    key_dim: Count | None = None
    """Size of one key vector."""
    value_dim: Count | None = None
    """Size of one value vector."""
    latent_kv_dim: Count | None = None
    """Elements a token's KV takes in one layer when stored in latent form (multi-head latent attention)."""
    max_context: Count | None = None
    """Longest context the model was made for."""
    sliding_window: Count | None = None
    """Tokens a query of a sliding layer sees, itself included."""
    full_attention_period: Count | None = None
    """Every n-th layer attends to everything, the others slide; null: all slide when there is a window."""
    num_parameters: Count | None = None
    num_active_parameters: Count | None = None
    """Parameters one token uses, where that is less."""
    num_experts: Count | None = None
    num_experts_per_token: Count | None = None
    source: str
    """Where these facts were read."""

    def layer_windows(self) -> tuple[int | None, ...]:
        """Per layer, tokens a query sees, or None for all of them. Empty when every layer sees everything."""
        if self.sliding_window is None or self.num_layers is None:
            return ()
        period = self.full_attention_period
        return tuple(
            None if period and (layer + 1) % period == 0 else self.sliding_window for layer in range(self.num_layers)
        )

    def spec(self, task: Task = "generate") -> ModelSpec | None:
        """The facts as planning needs them, or None when one that it needs is unknown."""
        counts = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "max_context": self.max_context,
        }
        known = {name: count for name, count in counts.items() if count is not None}
        if self.model_type is None or len(known) < len(counts):
            return None
        return ModelSpec(
            architecture=self.model_type,
            num_parameters=self.num_parameters,
            num_active_parameters=self.num_active_parameters,
            layer_windows=self.layer_windows(),
            task=task,
            **known,
        )


class ModelCard(Checked):
    """A model by name: source, files, architecture, licence."""

    name: Name
    aliases: tuple[Name, ...] = ()
    kind: Literal["decoder", "embedding"] = "decoder"
    source: str
    """Where the files come from: hf:, pypi:, folder: or gguf:."""
    archives: tuple[Archive, ...] = ()
    """Wheels of a pypi: source, with sizes and hashes."""
    files: tuple[CardFile, ...] = ()
    """Files with hashes known beforehand; hashes of hub files come from the hub when null."""
    native_dtype: Literal["fp32", "bf16", "fp16", "fp8", "mxfp4", "q4_1", "q4_k_m"] | None = None
    """Format of the published weights."""
    quantisations: tuple[Quantisation, ...] = ("fp32", "bf16", "fp16", "int8", "int4")
    """What mxn may load it as."""
    architecture: Architecture = Architecture(source="not read yet")
    licence: Licence | None = None
    chat: bool | None = None
    """True when it was trained to follow a conversation and has a chat template."""
    gated: bool | None = None
    """True when the hub wants its terms accepted and a token; null when nobody checked."""
    ignores_remote_code: bool = False
    """True when transformers has the architecture itself, so code named by the repository is never fetched."""
    notes: str | None = None

    @field_validator("source")
    @classmethod
    def _source_is_known(cls, text: str) -> str:
        parse_source(text)
        return text

    @model_validator(mode="after")
    def _archives_fit_source(self) -> ModelCard:
        if self.archives and not isinstance(self.parsed_source, WheelSource):
            raise ValueError("archives only beside a pypi: source")
        if len(self.archives) > 1 and len(self.files) != 1 and not self.source.endswith("/"):
            raise ValueError("exactly one entry in files when archives are joined")
        return self

    @property
    def parsed_source(self) -> Source:
        return parse_source(self.source)

    @property
    def num_parameters(self) -> int | None:
        return self.architecture.num_parameters


def load_model_cards(folder: Path | None = None) -> dict[str, ModelCard]:
    """Model cards by name: those shipped with mxn and the user's own on top, or those of one folder.

    Raises: ConfigError that lists every fault of every file.
    """
    return load_cards(folder, "models", ModelCard, lambda card: (card.name, *card.aliases))


def find_model_card(cards: Mapping[str, ModelCard], name: str) -> ModelCard | None:
    """The card with this name or alias, whatever its case; None when there is none.

    A name counts more than an alias, and the user's cards more than those shipped.
    """
    wanted = name.lower()
    latest_first = list(cards.values())[::-1]
    for card in latest_first:
        if card.name.lower() == wanted:
            return card
    return next((card for card in latest_first if wanted in (alias.lower() for alias in card.aliases)), None)
