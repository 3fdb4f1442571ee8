"""Model hub: which files a repository holds at which commit, with the hub's own hashes. Plain HTTPS, no hub library."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin

from mxn.config.source import HubSource
from mxn.errors import DownloadError, ModelError
from mxn.store.download import RemoteFile, get_json
from mxn.store.integrity import Digest, select_files

if TYPE_CHECKING:
    import httpx

MAX_PAGES = 50


def list_files(
    client: httpx.Client, source: HubSource, *, endpoint: str, token: str | None
) -> tuple[str, list[RemoteFile]]:
    """The commit a revision stands for, and the files to fetch from it.

    Raises: DownloadError when the hub does not answer or refuses; ModelError when the repository holds nothing for mxn.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    hint = (
        f"is the name right? A gated model needs its terms accepted at {endpoint}/{source.repo} and a token in HF_TOKEN"
        + (" (the one given was refused)" if token else " (none is set)")
    )
    commit = _commit(client, source, endpoint, headers, hint)
    entries = _tree(client, f"{endpoint}/api/models/{source.repo}/tree/{commit}?recursive=true", headers, hint)
    where = f"{source.repo} at {commit[:12]}"
    if source.file is not None:
        if source.file not in entries:
            ggufs = sorted(name for name in entries if name.endswith(".gguf"))
            raise ModelError(f"{where} has no {source.file}; GGUF files there: {', '.join(ggufs) or 'none'}")
        names = [source.file]
    else:
        names = select_files(entries, where=where)
    base = f"{endpoint}/{source.repo}/resolve/{commit}/"
    files = []
    for name in names:
        size, digest = _promise(name, entries[name])
        files.append(
            RemoteFile(path=name, url=base + quote(name), size=size, digest=digest, headers=headers, hint=hint)
        )
    return commit, files


def _commit(client: httpx.Client, source: HubSource, endpoint: str, headers: dict[str, str], hint: str) -> str:
    url = f"{endpoint}/api/models/{source.repo}"
    if source.revision is not None:
        url += f"/revision/{quote(source.revision, safe='')}"
    info, _ = get_json(client, url, headers=headers, hint=hint)
    commit = info.get("sha") if isinstance(info, dict) else None
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise DownloadError(f"{url} answered without a commit; is {endpoint} a model hub?")
    return commit


def _tree(client: httpx.Client, url: str, headers: dict[str, str], hint: str) -> dict[str, dict[str, Any]]:
    """Every file of a commit by path."""
    entries: dict[str, dict[str, Any]] = {}
    page: str | None = url
    for _ in range(MAX_PAGES):
        if page is None:
            return entries
        rows, following = get_json(client, page, headers=headers, hint=hint)
        if not isinstance(rows, list):
            raise DownloadError(f"{page} answered without a list of files")
        for row in rows:
            if isinstance(row, dict) and row.get("type") == "file" and isinstance(row.get("path"), str):
                entries[row["path"]] = row
        page = urljoin(url, following) if following else None
        if page is not None and not page.startswith(url.split("/api/", 1)[0] + "/"):
            raise DownloadError(f"{url} names a next page on another server: {page}")
    raise DownloadError(f"{url} lists more than {MAX_PAGES} pages of files; that is no model repository")


def _promise(name: str, row: dict[str, Any]) -> tuple[int, Digest]:
    """Size and hash that the hub promises: SHA-256 for large files, git's hash for small ones."""
    large = row.get("lfs")
    facts = large if isinstance(large, dict) else row
    size, value = facts.get("size"), facts.get("oid")
    length, algorithm = (64, "sha256") if isinstance(large, dict) else (40, "git-sha1")
    if type(size) is int and size >= 0 and isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{length}}}", value):
        return size, Digest(algorithm=algorithm, value=value)  # type: ignore[arg-type]
    raise DownloadError(f"the hub states no size and hash for {name}, so it could not be checked; nothing was fetched")
