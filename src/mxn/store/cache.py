"""The cache folder: complete models only, written beside and renamed into place, one writer at a time.

<cache>/models/<key>/         a model in Hugging Face layout with manifest.json
<cache>/staging/<key>/        what is being fetched; kept after a failure so that the next try goes on from there
<cache>/locks/<key>.lock      held while a model is fetched or removed; released by the kernel when a process dies
<cache>/hashes.json           hashes of local files, by path, size and time, so that they are computed once
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mxn
from mxn.errors import DownloadError, ModelError
from mxn.store.integrity import read_json, sha256_of

MANIFEST_NAME = "manifest.json"
LOCK_POLL_S = 0.2
MAX_HASHES = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What a cached file was when it was checked last."""

    sha256: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a cached folder holds. `origin`: the exact commit or wheel the files came from."""

    name: str
    source: str
    origin: str
    files: dict[str, FileRecord] = field(default_factory=dict)
    created_s: int = 0
    mxn_version: str = mxn.__version__

    @property
    def revision(self) -> str:
        return revision_of({name: record.sha256 for name, record in self.files.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """The cache under one folder."""

    root: Path

    def model_folder(self, key: str) -> Path:
        return self.root / "models" / key

    def staging_folder(self, key: str) -> Path:
        return self.root / "staging" / key

    def model_keys(self) -> list[str]:
        """Keys of complete models."""
        return _folders(self.root / "models")

    def staged_keys(self) -> list[str]:
        """Keys of models that are being fetched, or whose fetching ended early."""
        return _folders(self.root / "staging")

    @contextmanager
    def lock(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Holds the lock of one model; calls `on_wait` while another process has it."""
        path = self.root / "locks" / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    on_wait()
                    time.sleep(LOCK_POLL_S)
            yield

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of a complete model, or None when there is none or it cannot be read."""
        try:
            raw = read_json(self.model_folder(key) / MANIFEST_NAME)
            files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
            return Manifest(files=files, **raw)
        except (OSError, ModelError, KeyError, TypeError, AttributeError):
            return None

    def damage(self, key: str, manifest: Manifest, *, thorough: bool = False) -> str | None:
        """What is wrong with a cached model, or None. Files whose time changed are hashed again; thorough: all."""
        for name, record in manifest.files.items():
            path = self.model_folder(key) / name
            try:
                stat = path.stat()
            except OSError:
                return f"{name} is missing"
            if stat.st_size != record.bytes:
                return f"{name} has {stat.st_size} bytes, expected {record.bytes}"
            if (thorough or stat.st_mtime_ns != record.mtime_ns) and sha256_of(path) != record.sha256:
                return f"{name} does not have the sha256 it had when it was fetched"
        return None

    def publish(
        self, key: str, staged: Path, manifest: Manifest, hash_of: Callable[[Path], str] = sha256_of
    ) -> Manifest:
        """Makes a staged folder a cached model: hashes, manifest, sync to disk, one rename. Call with the lock held."""
        files: dict[str, FileRecord] = {}
        for path in sorted(path for path in staged.rglob("*") if path.is_file()):
            stat = path.stat()
            name = path.relative_to(staged).as_posix()
            files[name] = FileRecord(sha256=hash_of(path), bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
        whole = Manifest(
            name=manifest.name, source=manifest.source, origin=manifest.origin, files=files, created_s=int(time.time())
        )
        (staged / MANIFEST_NAME).write_text(json.dumps(asdict(whole), indent=1) + "\n", encoding="utf-8")
        for path in [*(path for path in staged.rglob("*")), staged]:
            _sync(path)
        target = self.model_folder(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.discard(key)
        os.rename(staged, target)
        _sync(target.parent)
        return whole

    def discard(self, key: str) -> None:
        """Takes a cached model away in one rename, then frees its space. Call with the lock held."""
        target = self.model_folder(key)
        if target.exists():
            trash = self.staging_folder(key) / "removed"
            shutil.rmtree(trash, ignore_errors=True)
            trash.parent.mkdir(parents=True, exist_ok=True)
            os.rename(target, trash)
            shutil.rmtree(trash, ignore_errors=True)

    def local_hash(self, path: Path, report: Callable[[int], None] | None = None) -> str:
        """SHA-256 of a file outside the cache, remembered while its size and time stay the same."""
        stat = path.stat()
        seal = [stat.st_size, stat.st_mtime_ns]
        known = self._known_hashes().get(str(path))
        if isinstance(known, list) and known[:2] == seal:
            return str(known[2])
        digest = sha256_of(path, report)
        with self.lock("hashes", lambda: None):
            hashes = self._known_hashes()
            hashes.pop(str(path), None)
            hashes[str(path)] = [*seal, digest]
            kept = dict(list(hashes.items())[-MAX_HASHES:])
            beside = self.root / "hashes.json.new"
            beside.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(beside, self.root / "hashes.json")
        return digest

    def _known_hashes(self) -> dict[str, object]:
        try:
            return read_json(self.root / "hashes.json")
        except (OSError, ModelError):
            return {}


def revision_of(hashes: dict[str, str]) -> str:
    """One hash for a model: over names and hashes of its files."""
    text = "".join(f"{digest} {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def require_space(folder: Path, needed_bytes: int, *, what: str) -> None:
    """Raises: DownloadError when the disk of `folder` has less than `needed_bytes` free."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise DownloadError(
            f"{what} needs {_mib(needed_bytes)} on the disk of {folder}, which has {_mib(free)} free; "
            "free some space, or set MXN_CACHE_DIR to a folder on a larger disk"
        )


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder that may not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


@contextmanager
def disk_errors(cache: Cache, key: str | None) -> Iterator[None]:
    """Turns a full or unwritable disk into an error that says what to do; a full disk gets its space back."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            if key is not None:
                shutil.rmtree(cache.staging_folder(key), ignore_errors=True)
            free = free_bytes(cache.root)
            raise DownloadError(
                f"the disk of {cache.root} became full while fetching; what was fetched is deleted again, "
                f"{_mib(free)} are free now. Free some space, or set MXN_CACHE_DIR to a folder on a larger disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
            raise DownloadError(
                f"cannot write to {error.filename or cache.root}: {error.strerror}; "
                "set MXN_CACHE_DIR to a folder you may write to"
            ) from error
        raise


def _folders(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
