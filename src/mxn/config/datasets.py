"""Files that say what to ask: prompts as JSON lines, and traces of lengths and arrival times."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from mxn.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One request of a dataset.

    text: the prompt; empty when only its length is known, which is `prompt_tokens` then.
    at_s: seconds after the first arrival; None where the dataset has no times.
    block_ids: names of the 512-token blocks a prompt begins with; the same name is the same text.
    """

    text: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    at_s: float | None = None
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What a file holds. `losses`: what of it was left out, in words; they go into the record."""

    name: str
    sha256: str
    asks: tuple[Ask, ...]
    losses: tuple[str, ...] = ()


def load_dataset(path: Path, *, limit: int | None = None) -> Dataset:
    """Prompts (.jsonl with "prompt"), a Mooncake trace (.jsonl with "input_length") or an Azure LLM trace (.csv).

    limit: take only so many, from the beginning. Entries that cannot be asked (empty prompts, no tokens) are left out
    and told in `losses`. Raises: ConfigError for a file that is none of these.
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        raise ConfigError(f"the dataset {path} cannot be read: {err}") from err
    read = _azure if path.suffix == ".csv" else _jsonl
    asks, losses = read(path, data.decode(errors="replace"), limit)
    if not asks:
        raise ConfigError(f"the dataset {path} holds nothing to ask: {'; '.join(losses) or 'it is empty'}")
    return Dataset(name=path.name, sha256=hashlib.sha256(data).hexdigest(), asks=tuple(asks), losses=tuple(losses))


def _azure(path: Path, text: str, limit: int | None) -> tuple[list[Ask], list[str]]:
    rows = csv.DictReader(text.splitlines())
    wanted = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
    if not wanted <= set(rows.fieldnames or ()):
        raise ConfigError(
            f"{path} has the columns {rows.fieldnames}; an Azure LLM trace has {', '.join(sorted(wanted))}"
        )
    asks: list[Ask] = []
    num_empty, first_s = 0, None
    for number, row in enumerate(rows, start=2):
        try:
            # Seven digits of a second are more than fromisoformat takes.
            at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            prompt_tokens, output_tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (ValueError, TypeError) as err:
            raise ConfigError(f"{path}, line {number}: {err}") from err
        first_s = at_s if first_s is None else first_s
        if prompt_tokens < 1 or output_tokens < 1:
            num_empty += 1
            continue
        asks.append(Ask(prompt_tokens=prompt_tokens, output_tokens=output_tokens, at_s=at_s - first_s))
        if len(asks) == limit:
            break
    return asks, _losses(num_empty, "have no prompt or no output tokens")


def _jsonl(path: Path, text: str, limit: int | None) -> tuple[list[Ask], list[str]]:
    asks: list[Ask] = []
    num_empty = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=dict[str, Any])
            ask = _mooncake_ask(entry) if "input_length" in entry else _prompt_ask(entry)
        except (msgspec.DecodeError, TypeError, ValueError) as err:
            raise ConfigError(f"{path}, line {number}: {err}") from err
        if ask is None:
            num_empty += 1
        else:
            asks.append(ask)
        if len(asks) == limit:
            break
    return asks, _losses(num_empty, "have an empty prompt or ask for no output")


def _prompt_ask(entry: dict[str, Any]) -> Ask | None:
    prompt = entry.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(f'expected a "prompt" of text or an "input_length", got the fields {", ".join(entry)}')
    output = entry.get("max_tokens", entry.get("output_tokens"))
    at_s = entry.get("at_s")
    if not prompt.strip() or output == 0:
        return None
    return Ask(
        text=prompt, output_tokens=None if output is None else int(output), at_s=None if at_s is None else float(at_s)
    )


def _mooncake_ask(entry: dict[str, Any]) -> Ask | None:
    prompt_tokens, output_tokens = int(entry["input_length"]), int(entry.get("output_length", 0))
    if prompt_tokens < 1 or output_tokens < 1:
        return None
    return Ask(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        at_s=float(entry.get("timestamp", 0)) / 1e3,  # milliseconds in the trace
        block_ids=tuple(int(one) for one in entry.get("hash_ids", ())),
    )


def _losses(num_empty: int, why: str) -> list[str]:
    return [f"{num_empty} entries of the dataset {why} and were left out"] if num_empty else []
