"""Text to token ids and back, without torch or transformers: a Hugging Face folder's `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mxn.errors import ModelError

_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """A model's tokenizer with what templates and stopping need to know.

    eos_token_ids: every id that ends a text, from generation_config.json, config.json and the tokenizer.
    special_tokens: role to text ("bos_token" -> "<s>"), as chat templates expect them.
    special_token_ids: ids that are control tokens, never produced from user text unless asked for.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain = backend  # encodes control tokens as the plain text they are spelled with
        self._added = backend.get_added_tokens_decoder()
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.special_token_ids = frozenset(i for i, token in self._added.items() if token.special)
        if self.special_token_ids:
            self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
            self._plain.encode_special_tokens = True
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: str) -> Tokenizer:
        """Reads a Hugging Face folder.

        Raises: ModelError naming the file that is missing or damaged.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path}: not found; expected a fast tokenizer (convert a slow one with transformers)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path}: cannot be read as a tokenizer: {error}") from error
        settings = _read_json(Path(folder) / "tokenizer_config.json")
        special = _special_tokens(settings, _read_json(Path(folder) / "special_tokens_map.json"))
        bos, eos = special.get("bos_token"), special.get("eos_token")
        eos_ids = _eos_ids(Path(folder))
        if eos is not None and (eos_id := backend.token_to_id(eos)) is not None:
            eos_ids.append(eos_id)
        return cls(
            backend,
            eos_token_ids=tuple(dict.fromkeys(eos_ids)),
            bos_token_id=backend.token_to_id(bos) if bos is not None else None,
            chat_template=_chat_template(Path(folder), settings),
            special_tokens=special,
        )

    def encode(self, text: str, *, add_special_tokens: bool, allow_special: bool = True) -> list[int]:
        """Token ids of a text.

        allow_special: when False, text that spells a control token is encoded as the plain characters it consists of.
        """
        backend = self._backend if allow_special else self._plain
        # The batch call of one lets other threads run meanwhile, `encode` does not; without offsets it is 2-5x faster.
        return list(backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids outside the vocabulary decode to nothing."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself; half characters show as U+FFFD."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token by itself, exact also where the token is part of a character."""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id not in self._added:
            if all(ch in _BYTE_OF for ch in piece) and self.token_text(token_id) != piece:
                return bytes(_BYTE_OF[ch] for ch in piece)
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
        return self.token_text(token_id).encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, reversed (Radford et al., 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(b): b for b in plain}
    for i, byte in enumerate(b for b in range(256) if b not in plain):
        table[chr(256 + i)] = byte
    return table


_BYTE_OF = _byte_level_alphabet()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in sources:
        for role in _SPECIAL_ROLES:
            value = source.get(role)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found.setdefault(role, value)
    return found


def _eos_ids(folder: Path) -> list[int]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    return ids


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
