"""The cache never holds half a model: damage, full disks, crashes and rivals."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mxn.config.environment import child_environment
from mxn.config.model_card import ModelCard
from mxn.errors import DownloadError, ModelError
from mxn.store.cache import Cache, disk_errors
from mxn.store.fetch import fetch, list_cached, remove

if TYPE_CHECKING:
    from .conftest import Web


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF" + bytes(1000))
    return path


def test_a_gguf_file_is_converted_once(gguf: Path, converter: list[str], tmp_path: Path) -> None:
    first = fetch(str(gguf), cache=tmp_path / "cache", converter=converter)
    assert fetch(str(gguf), cache=tmp_path / "cache", converter=["false"]) == first
    assert (Path(first.folder) / gguf.name).read_bytes() == gguf.read_bytes(), "the original is kept beside it"
    gguf.write_bytes(b"GGUF" + bytes(1001))
    with pytest.raises(ModelError, match="could not be converted"):
        fetch(str(gguf), cache=tmp_path / "cache", converter=["false"])
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [Path(first.folder).name]


def test_a_local_folder_is_used_where_it_is(model_folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in model_folder.iterdir()}
    model = fetch(str(model_folder), cache=tmp_path / "cache", offline=True)
    assert model.folder == str(model_folder)
    assert {path.name: path.stat().st_mtime_ns for path in model_folder.iterdir()} == before
    again = fetch(str(model_folder), cache=tmp_path / "cache")
    assert again.revision == model.revision


def test_a_revision_follows_the_content(model_folder: Path, tmp_path: Path) -> None:
    first = fetch(str(model_folder), cache=tmp_path / "cache").revision
    weights = model_folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(1, 1))
    assert fetch(str(model_folder), cache=tmp_path / "cache").revision != first


def test_a_damaged_cached_file_is_noticed_and_made_again(gguf: Path, converter: list[str], tmp_path: Path) -> None:
    model = fetch(str(gguf), cache=tmp_path / "cache", converter=converter)
    weights = Path(model.folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    seen: list[str] = []
    again = fetch(
        str(gguf), cache=tmp_path / "cache", converter=converter, progress=lambda phase, f, detail: seen.append(detail)
    )
    assert again == model
    assert any(
        "the cached copy is damaged (model.safetensors has 200077 bytes, expected 200078)" in text for text in seen
    )


def test_changed_bytes_of_the_same_size_are_noticed(hub: Web, tmp_path: Path) -> None:
    model = fetch("org/tiny", cache=tmp_path / "cache")
    weights = Path(model.folder) / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(bytes(stat.st_size))
    with pytest.raises(
        DownloadError, match=r"damaged: model.safetensors does not have the sha256 .*without MXN_OFFLINE"
    ):
        fetch("org/tiny", cache=tmp_path / "cache", offline=True)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fetch("org/tiny", cache=tmp_path / "cache", verify=True) == model
    assert weights.read_bytes()[:8] != bytes(8)


def test_a_missing_manifest_means_that_there_is_no_model(hub: Web, tmp_path: Path) -> None:
    model = fetch("org/tiny", cache=tmp_path / "cache")
    (Path(model.folder) / "manifest.json").write_text("{}")
    assert list_cached(tmp_path / "cache") == []
    assert fetch("org/tiny", cache=tmp_path / "cache") == model


def test_cached_models_are_listed_and_removed(hub: Web, tmp_path: Path) -> None:
    model = fetch("org/tiny", cache=tmp_path / "cache")
    [cached] = list_cached(tmp_path / "cache")
    assert (cached.name, cached.source, cached.revision) == ("org/tiny", "hf:org/tiny", model.revision)
    assert cached.origin == "org/tiny@0123456789abcdef0123456789abcdef01234567"
    assert cached.bytes > 200_000
    with pytest.raises(ModelError, match=r'no model "other" is in the cache; there is org/tiny'):
        remove("other", tmp_path / "cache")
    assert remove("org/tiny", tmp_path / "cache") == [cached]
    assert list_cached(tmp_path / "cache") == []
    assert not Path(model.folder).exists()


def test_an_unfinished_download_is_removed_too(hub: Web, tmp_path: Path) -> None:
    hub.cut_after = [10**9, 10**9, 70_000, *[0] * 10]
    with pytest.raises(DownloadError):
        fetch("org/tiny", cache=tmp_path / "cache")
    [gone] = remove("org/tiny", tmp_path / "cache")
    assert (gone.origin, gone.bytes > 70_000) == ("unfinished", True)
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


def test_a_cached_model_serves_from_a_folder_that_cannot_be_written(hub: Web, tmp_path: Path) -> None:
    model = fetch("org/tiny", cache=tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "locks")
    (tmp_path / "cache" / "locks").write_text("not a folder, so no lock can be made")
    assert fetch("org/tiny", cache=tmp_path / "cache") == model


def test_too_little_space_is_said_before_anything_is_fetched(
    hub: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(DownloadError, match=r"org/tiny .* needs .* which has 0 MiB free; .*MXN_CACHE_DIR"):
        fetch("org/tiny", cache=tmp_path / "cache")
    assert not any("/resolve/" in path for path, _ in hub.log)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_disk_that_becomes_full_leaves_nothing_behind(hub: Web, tmp_path: Path) -> None:
    hub.cut_after = [10**9, 10**9, *[0] * 10]
    with pytest.raises(DownloadError):
        fetch("org/tiny", cache=tmp_path / "cache")
    [staging] = (tmp_path / "cache" / "staging").iterdir()
    (staging / "files" / "model.safetensors.part").unlink(missing_ok=True)
    (staging / "files" / "model.safetensors.part").symlink_to("/dev/full")
    hub.cut_after.clear()
    with pytest.raises(DownloadError, match=r"became full while fetching; .* deleted again.*MXN_CACHE_DIR"):
        fetch("org/tiny", cache=tmp_path / "cache")
    assert not staging.exists()
    assert not (tmp_path / "cache" / "models").exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(DownloadError, match=r"cannot write to /x: .*MXN_CACHE_DIR"),
        disk_errors(Cache(root=tmp_path), None),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", "/x")


def test_a_cache_folder_below_a_file_is_named(hub: Web, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"cannot write to .*/file/cache.*: Not a directory; set MXN_CACHE_DIR"):
        fetch("org/tiny", cache=tmp_path / "file" / "cache")


def test_a_killed_process_leaves_no_model_and_the_next_goes_on(hub: Web, tmp_path: Path) -> None:
    hub.delay_s = 0.3
    cache = tmp_path / "cache"
    code = f"from pathlib import Path; from mxn.store.fetch import fetch; fetch('org/tiny', cache=Path({str(cache)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], env=child_environment({"MXN_HUB_ENDPOINT": hub.url}))
    part = _wait_for(lambda: [path for path in cache.rglob("model.safetensors.part") if path.stat().st_size > 0])[0]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cache / "models").exists()
    have = part.stat().st_size
    hub.delay_s = 0.0
    hub.log.clear()
    fetch("org/tiny", cache=cache)
    assert [wanted for path, wanted in hub.log if path.endswith("model.safetensors")] == [f"bytes={have}-"]


def test_two_at_once_fetch_once(hub: Web, tmp_path: Path) -> None:
    hub.delay_s = 0.05
    phases: list[str] = []
    revisions: list[str] = []

    def run() -> None:
        model = fetch("org/tiny", cache=tmp_path / "cache", progress=lambda phase, f, d: phases.append(phase))
        revisions.append(model.revision)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(revisions) == 3
    assert len(set(revisions)) == 1
    assert "wait" in phases
    assert len([path for path, _ in hub.log if path.endswith("model.safetensors")]) == 1


def test_a_converter_that_fails_leaves_no_model(gguf: Path, tmp_path: Path) -> None:
    code = "import sys, os; os.makedirs(sys.argv[2]); open(sys.argv[2] + '/config.json', 'w').write('{'); sys.exit(1)"
    with pytest.raises(ModelError, match="could not be converted"):
        fetch(str(gguf), cache=tmp_path / "cache", converter=[sys.executable, "-c", code])
    assert not (tmp_path / "cache" / "models").exists()
    assert list((tmp_path / "cache").rglob("config.json")) == []


def test_what_a_converter_gives_is_checked(gguf: Path, tmp_path: Path) -> None:
    code = "import sys, os; os.makedirs(sys.argv[2])"
    with pytest.raises(ModelError, match="has no weights mxn loads"):
        fetch(str(gguf), cache=tmp_path / "cache", converter=[sys.executable, "-c", code])
    assert not (tmp_path / "cache" / "models").exists()


def test_a_folder_of_pickles_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="would be unpickled"):
        fetch(str(model_folder), cache=tmp_path / "cache")


@pytest.mark.parametrize("value", ["two", None, -1, [], {}, float("nan"), 1 << 70])
def test_a_config_whose_values_make_no_model_is_refused(model_folder: Path, tmp_path: Path, value: object) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": value}))
    with pytest.raises(ModelError):
        fetch(str(model_folder), cache=tmp_path / "cache")


def test_a_truncated_local_file_is_refused(model_folder: Path, tmp_path: Path) -> None:
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model.safetensors is not whole: .* fetch it again"):
        fetch(str(model_folder), cache=tmp_path / "cache")


def test_the_cards_hash_counts_for_hub_files(hub: Web, tmp_path: Path) -> None:
    text = json.dumps(
        {"name": "t", "source": "hf:org/tiny", "files": [{"path": "model.safetensors", "sha256": "0" * 64}]}
    )
    with pytest.raises(DownloadError, match=f"expected sha256 {'0' * 64}"):
        fetch(ModelCard.model_validate_json(text), cache=tmp_path / "cache")


def _wait_for(found: Callable[[], list[Path]], limit_s: float = 30.0) -> list[Path]:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if result := found():
            return result
        time.sleep(0.02)
    raise TimeoutError
