"""The hub over HTTP: right files only, resume, wrong and truncated content, tokens, errors."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mxn.config.source import HubSource
from mxn.errors import DownloadError, ModelError
from mxn.store.download import RemoteFile, download, http_client
from mxn.store.fetch import fetch
from mxn.store.hub import list_files
from mxn.store.integrity import Digest, sha256_of

if TYPE_CHECKING:
    from .conftest import Web

TINY = HubSource(repo="org/tiny")


def _weights_requests(hub: Web) -> list[str | None]:
    return [wanted for path, wanted in hub.log if path.endswith("model.safetensors")]


def test_a_repository_becomes_a_cached_model(hub: Web, model_files: dict[str, bytes], tmp_path: Path) -> None:
    model = fetch("org/tiny", cache=tmp_path / "cache")
    folder = Path(model.folder)
    assert {path.name for path in folder.iterdir()} == {*model_files, "manifest.json"}
    assert (folder / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    assert (model.name, model.spec.architecture, len(model.revision)) == ("org/tiny", "llama", 64)
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


def test_a_cached_model_needs_no_network(hub: Web, tmp_path: Path) -> None:
    first = fetch("org/tiny", cache=tmp_path / "cache")
    hub.log.clear()
    assert fetch("org/tiny", cache=tmp_path / "cache", offline=True) == first
    assert hub.log == []


def test_offline_refuses_what_is_not_there(hub: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_OFFLINE", "1")
    with pytest.raises(DownloadError, match=r"not in the cache .* MXN_OFFLINE is set"):
        fetch("org/tiny", cache=tmp_path / "cache")
    assert hub.log == []


def test_a_broken_connection_goes_on_where_it_stopped(hub: Web, tmp_path: Path) -> None:
    hub.cut_after = [10**9, 10**9, 70_000, 40_000]
    fetch("org/tiny", cache=tmp_path / "cache")
    assert _weights_requests(hub) == [None, "bytes=70000-", "bytes=110000-"]


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(hub: Web, tmp_path: Path) -> None:
    hub.cut_after = [10**9, 10**9, 70_000, *[0] * 10]
    with pytest.raises(DownloadError, match=r"got 70000 of \d+ bytes, then .*the same command goes on from there"):
        fetch("org/tiny", cache=tmp_path / "cache")
    assert not (tmp_path / "cache" / "models").exists()
    hub.cut_after.clear()
    hub.log.clear()
    fetch("org/tiny", cache=tmp_path / "cache")
    assert _weights_requests(hub) == ["bytes=70000-"]


def test_a_server_without_ranges_is_read_from_the_start(hub: Web, tmp_path: Path) -> None:
    hub.supports_ranges = False
    hub.cut_after = [10**9, 10**9, 70_000]
    fetch("org/tiny", cache=tmp_path / "cache")
    assert _weights_requests(hub) == [None, "bytes=70000-"]


def test_wrong_content_is_deleted_and_both_hashes_are_named(
    hub: Web, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    wrong = bytes(len(model_files["model.safetensors"]))
    hub.serve_model("org/tiny", model_files | {"model.safetensors": wrong}, promise=model_files)
    with pytest.raises(
        DownloadError, match=r"model.safetensors: found sha256 \w{64}, expected sha256 \w{64}; it was d"
    ):
        fetch("org/tiny", cache=tmp_path / "cache")
    assert not (tmp_path / "cache" / "models").exists()
    assert list((tmp_path / "cache").rglob("model.safetensors*")) == []


def test_small_files_are_checked_against_gits_hash(hub: Web, model_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.serve_model("org/tiny", model_files | {"tokenizer.json": b'{"version": "9.9"}'}, promise=model_files)
    with pytest.raises(DownloadError, match=r"tokenizer.json: found git-sha1 \w{40}, expected git-sha1 \w{40}"):
        fetch("org/tiny", cache=tmp_path / "cache")


def test_a_file_longer_than_promised_is_refused(hub: Web, model_files: dict[str, bytes], tmp_path: Path) -> None:
    hub.serve_model(
        "org/tiny", model_files | {"model.safetensors": model_files["model.safetensors"] + b"x"}, promise=model_files
    )
    with pytest.raises(DownloadError, match=r"found more than \d+ bytes"):
        fetch("org/tiny", cache=tmp_path / "cache")


def test_a_part_of_another_file_is_thrown_away(hub: Web, model_files: dict[str, bytes], tmp_path: Path) -> None:
    content = model_files["model.safetensors"]
    file = RemoteFile(
        path="model.safetensors",
        url=f"{hub.url}/org/tiny/resolve/0123456789abcdef0123456789abcdef01234567/model.safetensors",
        size=len(content),
        digest=Digest(algorithm="sha256", value=sha256_of(tmp_path / "tiny" / "model.safetensors")),
    )
    target = tmp_path / "out" / "model.safetensors"
    target.parent.mkdir()
    target.with_name("model.safetensors.part").write_bytes(b"z" * 1000)
    with closing(http_client()) as client:
        download(client, file, target, lambda num_bytes: None)
    assert target.read_bytes() == content
    assert _weights_requests(hub) == ["bytes=1000-", None]


@pytest.fixture(autouse=True)
def _tiny_on_disk(model_folder: Path) -> None:
    """The same files on disk, for their hashes."""


def test_pickles_only_are_refused_before_anything_is_fetched(hub: Web, tmp_path: Path) -> None:
    hub.serve_model("org/old", {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"\x80\x04"})
    with pytest.raises(ModelError, match=r"org/old at 0123.* pytorch_model.bin would be unpickled"):
        fetch("org/old", cache=tmp_path / "cache")
    assert not any("/resolve/" in path for path, _ in hub.log)


def test_code_is_refused_before_weights_are_fetched(hub: Web, model_files: dict[str, bytes], tmp_path: Path) -> None:
    config = model_files["config.json"][:-1] + b', "auto_map": {"AutoModel": "x.Y"}}'
    hub.serve_model("org/code", model_files | {"config.json": config})
    with pytest.raises(ModelError, match="auto_map"):
        fetch("org/code", cache=tmp_path / "cache")
    assert _weights_requests(hub) == []


def test_a_gated_repository_says_what_to_do(hub: Web, tmp_path: Path) -> None:
    hub.answer_json("/api/models/org/gated", {"error": "gated"}, status=401)
    with pytest.raises(
        DownloadError, match=r"answered 401 .*terms accepted at http.*/org/gated and a token in HF_TOKEN"
    ):
        fetch("org/gated", cache=tmp_path / "cache")


def test_the_token_goes_to_the_hub(hub: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch("org/tiny", cache=tmp_path / "cache")
    assert set(hub.tokens) == {"Bearer secret"}


def test_an_unknown_repository_is_not_found(hub: Web, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"answered 404 \(not found\); is the name right"):
        fetch("org/nothing", cache=tmp_path / "cache")


def test_a_hub_that_is_away_cannot_be_reached(hub: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_HUB_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"cannot be reached .*check network, proxy and certificates"):
        fetch("org/tiny", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ({}, "without a commit"),
        ([], "without a commit"),
        ({"sha": "../../etc"}, "without a commit"),
    ],
)
def test_answers_that_are_no_hubs_are_refused(hub: Web, tmp_path: Path, answer: object, part: str) -> None:
    hub.answer_json("/api/models/org/odd", answer)
    with pytest.raises(DownloadError, match=part):
        fetch("org/odd", cache=tmp_path / "cache")


def test_a_file_without_a_promised_hash_is_not_fetched(hub: Web, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub.answer_json("/api/models/org/odd", {"sha": commit})
    rows = [{"type": "file", "path": name} for name in ("config.json", "tokenizer.json", "model.safetensors")]
    hub.answer_json(f"/api/models/org/odd/tree/{commit}?recursive=true", rows)
    with pytest.raises(DownloadError, match=r"states no size and hash for config\.json"):
        fetch("org/odd", cache=tmp_path / "cache")


def test_a_listing_over_several_pages_is_read_whole(hub: Web, model_files: dict[str, bytes]) -> None:
    hub.serve_model("org/tiny", model_files)
    path = "/api/models/org/tiny/tree/0123456789abcdef0123456789abcdef01234567?recursive=true"
    status, headers, body = hub.answers[path]
    hub.answers[path + "&cursor=2"] = (status, headers, body)
    hub.answer_json(path, [], Link=f'<{hub.url}{path}&cursor=2>; rel="next"')
    with closing(http_client()) as client:
        _, files = list_files(client, TINY, endpoint=hub.url, token=None)
        assert [file.path for file in files] == ["config.json", "tokenizer.json", "model.safetensors"]
        hub.answer_json(path, [], Link='<http://elsewhere.example/x>; rel="next"')
        with pytest.raises(DownloadError, match="another server"):
            list_files(client, TINY, endpoint=hub.url, token="secret")


def test_one_gguf_of_a_repository_is_converted(hub: Web, converter: list[str], tmp_path: Path) -> None:
    hub.serve_model("org/quants", {"README.md": b"", "tiny.Q4.gguf": b"GGUF" + bytes(100), "tiny.Q8.gguf": b"GGUF"})
    with pytest.raises(ModelError, match=r"only GGUF files; name one of them: tiny.Q4.gguf, tiny.Q8.gguf"):
        fetch("org/quants", cache=tmp_path / "cache")
    with pytest.raises(ModelError, match=r"has no q9.gguf; GGUF files there: tiny.Q4.gguf"):
        fetch("org/quants#q9.gguf", cache=tmp_path / "cache")
    seen: list[tuple[str, str]] = []
    model = fetch(
        "org/quants@v1#tiny.Q4.gguf",
        cache=tmp_path / "cache",
        converter=converter,
        progress=lambda phase, fraction, detail: seen.append((phase, detail)),
    )
    assert model.name == "tiny.Q4"
    assert ("convert", "tiny.Q4.gguf: weights") in seen
    assert seen[-1][0] == "ready"
