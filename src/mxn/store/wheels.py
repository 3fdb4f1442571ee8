"""Files inside wheels of a package index: found through the index itself or through pip, checked, taken out safely."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

from mxn.config.environment import child_environment
from mxn.config.source import WheelSource
from mxn.errors import DownloadError, ModelError
from mxn.store.download import RemoteFile, download
from mxn.store.integrity import BUFFER_BYTES, Digest, sha256_of, wrong_file

if TYPE_CHECKING:
    import httpx

POLL_S = 0.2
_SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"


def fetch_wheel(
    client: httpx.Client,
    source: WheelSource,
    folder: Path,
    *,
    index: str | None,
    size: int | None,
    sha256: str | None,
    report: Callable[[int], None],
    note: Callable[[str], None],
) -> Path:
    """The wheel in `folder`, checked against `sha256` when given, else against the hash the index states.

    First straight from the index, which can go on after an interruption; where that does not work (a private index,
    its own certificates, local files), by pip, which knows the user's settings. `note` is told when that happens.

    index: what `index_url` gave.
    Raises: DownloadError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = _find_in_index(client, source, index, note) if index is not None else None
    if found is not None:
        digest = Digest(algorithm="sha256", value=sha256) if sha256 else found.digest
        wheel = folder / found.path
        download(
            client, RemoteFile(path=found.path, url=found.url, size=size or found.size, digest=digest), wheel, report
        )
        return wheel
    wheel = _pip_download(source, folder, report)
    if sha256 is not None and (got := sha256_of(wheel)) != sha256:
        wheel.unlink()
        raise wrong_file(
            wheel.name,
            found=f"sha256 {got}",
            expected=f"sha256 {sha256}",
            do="it was deleted. The index holds another file than the card knows; check the index, then the card",
        )
    return wheel


def index_url() -> str | None:
    """The package index pip is set to use, or None when only pip itself can reach it."""
    settings: dict[str, str] = {}
    for line in _ask_pip("config", "list").splitlines():
        key, _, value = line.partition("=")
        try:
            settings[key] = str(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            continue
    scopes = (":env:", "download", "global")  # pip's own order
    if any(settings.get(f"{scope}.no-index", "0").lower() in ("1", "true", "yes", "on") for scope in scopes):
        return None
    url = next((settings[key] for scope in scopes if (key := f"{scope}.index-url") in settings), None)
    if url is None:  # pip's own default, as its help states it
        stated = re.search(r"Package\s+Index\s+\(default\s+(\S+)\)", _ask_pip("help", "download"))
        url = stated.group(1) if stated else ""
    return url if url.startswith(("https://", "http://")) else None


def _ask_pip(*arguments: str) -> str:
    """What pip prints; nothing when it cannot be run."""
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    environment = child_environment({"PIP_QUIET": "0", "COLUMNS": "200"})
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def extract(wheel: Path, member: str, folder: Path, *, max_bytes: int) -> list[Path]:
    """Takes one member, or all files of a folder when `member` ends in a slash, out of a wheel.

    Only plain files with plain names, no more than `max_bytes` in all; each is checked by the archive's own CRC.
    Raises: DownloadError for a damaged archive; ModelError when the member is missing or not a plain file.
    """
    written: list[Path] = []
    left = max_bytes
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in _members(archive, wheel, member):
                relative = info.filename.removeprefix(member) if member.endswith("/") else Path(info.filename).name
                target = _inside(folder, relative, wheel)
                target.parent.mkdir(parents=True, exist_ok=True)
                if info.file_size > left:
                    raise ModelError(f"{wheel.name}: {info.filename} is larger than the {max_bytes} bytes allowed")
                with archive.open(info) as content, target.open("wb") as out:
                    left -= _copy(content, out, left, what=f"{wheel.name}: {info.filename}")
                written.append(target)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
        raise DownloadError(f"{wheel.name} is damaged or not a wheel: {error}; fetch it again") from error
    return written


def unpacked_bytes(wheel: Path, member: str) -> int:
    """Bytes that `extract` would write, as the archive states them."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return sum(info.file_size for info in _members(archive, wheel, member))
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{wheel.name} is damaged or not a wheel: {error}; fetch it again") from error


def _members(archive: zipfile.ZipFile, wheel: Path, member: str) -> list[zipfile.ZipInfo]:
    infos = [
        info
        for info in archive.infolist()
        if info.filename == member or (member.endswith("/") and info.filename.startswith(member) and not info.is_dir())
    ]
    if not infos:
        near = [name for name in archive.namelist() if ".dist-info/" not in name][:8]
        raise ModelError(f"{wheel.name} has no {member}; it holds {', '.join(near)}")
    if len({info.filename for info in infos}) < len(infos):
        raise ModelError(f"{wheel.name} holds {member} twice")
    for info in infos:
        kind = info.external_attr >> 16 & 0o170000
        if kind not in (0, 0o100000) or info.flag_bits & 0x1:
            raise ModelError(f"{wheel.name}: {info.filename} is a link, a device or encrypted; expected a plain file")
    return infos


def _inside(folder: Path, relative: str, wheel: Path) -> Path:
    parts = relative.split("/")
    if not all(re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9._+-]*", part) and part.strip(".") for part in parts):
        raise ModelError(f"{wheel.name} holds a file with the unsafe name {relative!r}")
    return folder.joinpath(*parts)


def _copy(content: IO[bytes], out: IO[bytes], limit: int, *, what: str) -> int:
    written = 0
    while block := content.read(BUFFER_BYTES):
        written += len(block)
        if written > limit:
            raise ModelError(f"{what} unpacks to more than its archive states; it is refused")
        out.write(block)
    return written


def _find_in_index(
    client: httpx.Client, source: WheelSource, index: str, note: Callable[[str], None]
) -> RemoteFile | None:
    """The wheel on the user's index, or None when pip must find it."""
    import httpx

    url = f"{index.rstrip('/')}/{_normal(source.package)}/"
    try:
        response = client.get(url, headers={"Accept": f"{_SIMPLE_JSON}, text/html;q=0.1"})
        response.raise_for_status()
        links = (
            _json_links(response.json())
            if "json" in response.headers.get("Content-Type", "")
            else _html_links(response.text)
        )
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
        note(f"{urlsplit(url).hostname}: {type(error).__name__}; asking pip instead")
        return None
    for link, sha256, size in links:
        address = urljoin(str(response.url), link)
        filename = unquote(urlsplit(address).path.rpartition("/")[2])
        if _is_wheel_of(filename, source) and address.startswith(("https://", "http://")):
            digest = Digest(algorithm="sha256", value=sha256) if sha256 else None
            return RemoteFile(path=filename, url=address.partition("#")[0], size=size, digest=digest)
    note(f"{source.package}=={source.version} is not on {urlsplit(url).hostname}; asking pip instead")
    return None


def _json_links(answer: object) -> list[tuple[str, str | None, int | None]]:
    """(address, sha256, size) of each file in a JSON answer of the simple index (PEP 691, PEP 700)."""
    files = answer.get("files") if isinstance(answer, dict) else None
    links: list[tuple[str, str | None, int | None]] = []
    for file in files if isinstance(files, list) else []:
        if isinstance(file, dict) and isinstance(file.get("url"), str):
            hashes, size = file.get("hashes"), file.get("size")
            sha256 = hashes.get("sha256") if isinstance(hashes, dict) else None
            links.append((file["url"], _hex64(sha256), size if type(size) is int and size > 0 else None))
    return links


def _html_links(text: str) -> list[tuple[str, str | None, int | None]]:
    """The same from an HTML answer (PEP 503)."""
    links: list[tuple[str, str | None, int | None]] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            href = dict(attrs).get("href")
            if tag == "a" and href:
                links.append((href, _hex64(href.partition("#sha256=")[2]), None))

    Links().feed(text)
    return links


def _hex64(text: object) -> str | None:
    return text if isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) else None


def _is_wheel_of(filename: str, source: WheelSource) -> bool:
    parts = filename.removesuffix(".whl").split("-")
    if not filename.endswith("-any.whl") or len(parts) < 5 or not re.fullmatch(r"[A-Za-z0-9._+-]+", filename):
        return False
    return _normal(parts[0]) == _normal(source.package) and parts[1] == source.version


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _pip_download(source: WheelSource, folder: Path, report: Callable[[int], None]) -> Path:
    """Lets pip fetch the wheel; progress is the growth of pip's own temporary folder."""
    requirement = f"{source.package}=={source.version}"
    working = folder / "pip"
    shutil.rmtree(working, ignore_errors=True)
    (working / "out").mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(working / "out"), requirement]
    log = working / "log.txt"
    environment = child_environment({"TMPDIR": str(working), "PIP_QUIET": "0"})
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        try:
            while process.poll() is None:
                report(_bytes_below(working))
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait()
    wheels = sorted((working / "out").glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise DownloadError(
            f"pip could not fetch {requirement}: {_last_error(log)}. Check the network and pip's settings "
            f"(python -m pip config list), or fetch the wheel by hand and give mxn the file inside it"
        )
    return wheels[0].replace(folder / wheels[0].name)


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves and deletes while we look
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "error:")) or "No module named" in line]
    return (errors or lines or ["it said nothing"])[0].removeprefix("ERROR: ").rstrip(".")[:500]
