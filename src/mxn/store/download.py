"""Downloads over HTTP that go on where they stopped and are checked against a promised hash before they count."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import mxn
from mxn.errors import DownloadError
from mxn.store.integrity import BUFFER_BYTES, Digest, wrong_file

if TYPE_CHECKING:
    import httpx

NUM_TRIES = 5
MAX_WAIT_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file to fetch. size, digest: None when nobody promises one; such a file is never resumed.

    hint: what a person can do when the server says that the file is not for them.
    """

    path: str
    url: str
    size: int | None = None
    digest: Digest | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""


def http_client() -> httpx.Client:
    """A client that trusts the system's certificates and follows redirects."""
    import httpx  # 0.15 s to import, and most runs find everything in the cache

    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        import certifi

        context.load_verify_locations(certifi.where())
    return httpx.Client(
        verify=context,
        follow_redirects=True,
        timeout=httpx.Timeout(60.0, connect=15.0),
        headers={"User-Agent": f"mxn/{mxn.__version__}"},
    )


def download(client: httpx.Client, file: RemoteFile, target: Path, report: Callable[[int], None]) -> None:
    """Fetches a file to `target`, which appears only when whole and right. `report` is told the bytes there so far.

    A `.part` file beside it survives a crash; the next call asks for the rest only.
    Raises: DownloadError.
    """
    part = target.with_name(target.name + ".part")
    if target.exists() and file.digest is not None:
        target.replace(part)  # from an earlier try: checked again like any other part
    elif file.digest is None:
        part.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    started_s = part.stat().st_size if part.exists() else 0
    try:
        _fetch(client, file, part, report)
    except _WrongContentError as error:
        part.unlink(missing_ok=True)
        if not started_s:
            raise error.as_download_error() from None
        try:  # the part may have come from another file: once more, from the start
            _fetch(client, file, part, report)
        except _WrongContentError as again:
            part.unlink(missing_ok=True)
            raise again.as_download_error() from None
    part.replace(target)


def get_json(client: httpx.Client, url: str, *, headers: Mapping[str, str], hint: str) -> tuple[object, str | None]:
    """A JSON answer and the address of its next page. Raises: DownloadError."""
    import httpx

    for turn in range(NUM_TRIES):
        try:
            response = client.get(url, headers=dict(headers))
        except httpx.RequestError as error:
            if turn + 1 == NUM_TRIES:
                raise _unreachable(url, error) from error
            time.sleep(_wait_s(turn, None))
            continue
        if response.status_code in _TRY_AGAIN and turn + 1 < NUM_TRIES:
            time.sleep(_wait_s(turn, response.headers.get("Retry-After")))
            continue
        if response.status_code != 200:
            raise _refused(url, response.status_code, hint)
        try:
            return response.json(), response.links.get("next", {}).get("url")
        except (ValueError, RecursionError):
            raise DownloadError(
                f"{public_url(url)} answered with something that is not JSON; is it a model hub?"
            ) from None
    raise DownloadError(f"{public_url(url)} did not answer")


_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class _WrongContentError(Exception):
    def __init__(self, what: str, found: str, expected: str) -> None:
        super().__init__(what)
        self.what, self.found, self.expected = what, found, expected

    def as_download_error(self) -> DownloadError:
        return wrong_file(
            self.what,
            found=self.found,
            expected=self.expected,
            do="it was deleted. Try again; if it happens again, the file was changed at its source or on the way",
        )


def _fetch(client: httpx.Client, file: RemoteFile, part: Path, report: Callable[[int], None]) -> None:
    """Fills `part` until it is whole, over several connections if need be, and checks it."""
    import httpx

    turn = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        if file.size is not None and before >= file.size:
            break
        try:
            if _stream(client, file, part, before, report):
                break
            problem: Exception = DownloadError(f"{public_url(file.url)} ended early")
            wait = None
        except httpx.RequestError as error:
            problem, wait = _unreachable(file.url, error), None
        except _BusyError as error:
            problem, wait = _refused(file.url, error.status, file.hint), error.retry_after
        if part.exists() and part.stat().st_size > before:
            turn = 0  # it moves on
        turn += 1
        if turn >= NUM_TRIES:
            have = part.stat().st_size if part.exists() else 0
            raise DownloadError(
                f"{file.path}: got {have} of {file.size or 'an unknown number of'} bytes, then {problem}. "
                "What arrived is kept: the same command goes on from there"
            )
        time.sleep(_wait_s(turn - 1, wait))
    _check(file, part)


def _stream(client: httpx.Client, file: RemoteFile, part: Path, have: int, report: Callable[[int], None]) -> bool:
    """One connection. True when the file is as long as promised, or as the server said when nothing was promised."""
    headers = dict(file.headers)
    headers["Accept-Encoding"] = "identity"  # else a range would count compressed bytes
    if have:
        headers["Range"] = f"bytes={have}-"
    with client.stream("GET", file.url, headers=headers) as response:
        status = response.status_code
        if status in _TRY_AGAIN:
            raise _BusyError(status, response.headers.get("Retry-After"))
        if status == 416:
            raise _WrongContentError(file.path, f"{have} bytes before the end was asked for", "fewer")
        if status not in (200, 206):
            raise _refused(file.url, status, file.hint)
        resumes = status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if status == 206 and not resumes:
            got = response.headers.get("Content-Range")
            raise DownloadError(f"{public_url(file.url)}: asked for bytes from {have}, got {got}")
        written = have if resumes else 0
        with part.open("ab" if resumes else "wb") as out:
            for chunk in response.iter_bytes():
                written += len(chunk)
                if file.size is not None and written > file.size:
                    raise _WrongContentError(file.path, f"more than {file.size} bytes", f"{file.size} bytes")
                out.write(chunk)
                report(written)
    return file.size is None or written == file.size


def _check(file: RemoteFile, part: Path) -> None:
    size = part.stat().st_size
    if file.size is not None and size != file.size:
        raise _WrongContentError(file.path, f"{size} bytes", f"{file.size} bytes")
    if file.digest is None:
        return
    running = file.digest.start(size)
    with part.open("rb") as content:
        while block := content.read(BUFFER_BYTES):
            running.update(block)
    if running.hexdigest() != file.digest.value:
        algorithm = file.digest.algorithm
        raise _WrongContentError(file.path, f"{algorithm} {running.hexdigest()}", f"{algorithm} {file.digest.value}")


class _BusyError(Exception):
    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(status)
        self.status, self.retry_after = status, retry_after


def _wait_s(turn: int, retry_after: str | None) -> float:
    asked = float(retry_after) if retry_after and retry_after.isdigit() else 0.0
    return min(MAX_WAIT_S, max(asked, 0.25 * float(1 << turn)))


def public_url(url: str) -> str:
    """An address without user, password and query, fit to be shown."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _unreachable(url: str, error: Exception) -> DownloadError:
    return DownloadError(
        f"{public_url(url)} cannot be reached ({type(error).__name__}: {error}); check network, proxy and certificates"
    )


def _refused(url: str, status: int, hint: str) -> DownloadError:
    meaning = {401: "not allowed without a token", 403: "not allowed", 404: "not found"}.get(status, "refused")
    return DownloadError(
        f"{public_url(url)} answered {status} ({meaning})" + (f"; {hint}" if hint and status in (401, 403, 404) else "")
    )
