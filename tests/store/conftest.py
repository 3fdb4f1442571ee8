"""Small real things for the store: a tiny model, a converter, and a web server that plays hub and package index."""

from __future__ import annotations

import hashlib
import http.server
import json
import struct
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "vocab_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def safetensors_bytes(num_bytes: int = 4096, *, name: str = "w") -> bytes:
    """A whole safetensors file with one tensor of bytes."""
    header = json.dumps({name: {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(i % 251 for i in range(num_bytes))


@pytest.fixture
def model_files() -> dict[str, bytes]:
    """A tiny model by file name."""
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": safetensors_bytes(200_000),
    }


@pytest.fixture
def model_folder(tmp_path: Path, model_files: dict[str, bytes]) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name, content in model_files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def converter(tmp_path: Path, model_folder: Path) -> list[str]:
    """A command that speaks like the real converter and gives the tiny model."""
    script = tmp_path / "converter.py"
    script.write_text(
        "import json, shutil, sys\n"
        "source, out = sys.argv[1:3]\n"
        "assert open(source, 'rb').read(4) == b'GGUF'\n"
        "print(json.dumps({'phase': 'weights', 'fraction': 0.5}), flush=True)\n"
        f"shutil.copytree({str(model_folder)!r}, out)\n"
    )
    return [sys.executable, str(script)]


@dataclass
class Web:
    """A web server whose answers a test sets. `log`: (path, Range header) of every request.

    cut_after: the next answers end their connection after so many bytes of body, one entry each.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    log: list[tuple[str, str | None]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)
    delay_s: float = 0.0
    supports_ranges: bool = True

    def serve_model(self, repo: str, files: dict[str, bytes], *, promise: dict[str, bytes] | None = None) -> None:
        """Plays the hub for one repository; `promise` holds files whose hashes the hub states instead."""
        rows = []
        for name, content in files.items():
            promised = (promise or {}).get(name, content)
            if name.endswith((".safetensors", ".gguf", ".bin")):
                digest = hashlib.sha256(promised).hexdigest()
                rows.append({"type": "file", "path": name, "lfs": {"oid": digest, "size": len(promised)}, "size": 1})
            else:
                digest = hashlib.sha1(b"blob %d\0" % len(promised) + promised).hexdigest()
                rows.append({"type": "file", "path": name, "oid": digest, "size": len(promised)})
            self.files[f"/{repo}/resolve/{COMMIT}/{name}"] = content
        rows.append({"type": "directory", "path": "sub"})
        self.answer_json(f"/api/models/{repo}", {"sha": COMMIT})
        self.answer_json(f"/api/models/{repo}/revision/v1", {"sha": COMMIT})
        self.answer_json(f"/api/models/{repo}/tree/{COMMIT}?recursive=true", rows)

    def answer_json(self, path: str, value: object, status: int = 200, **headers: str) -> None:
        self.answers[path] = (status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        web = self.server.web
        wanted = self.headers.get("Range")
        web.log.append((self.path, wanted))
        web.tokens.append(self.headers.get("Authorization"))
        if self.path in web.answers:
            status, headers, body = web.answers[self.path]
            self._send(status, headers, body, len(body))
            return
        content = web.files.get(unquote(urlsplit(self.path).path))
        if content is None:
            self._send(404, {}, b"", 0)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and web.supports_ranges else 0
        body, headers = content[start:], {}
        if wanted and web.supports_ranges:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        whole = len(body)
        if web.cut_after:
            body = body[: web.cut_after.pop(0)]
        self._send(206 if headers else 200, headers, body, whole)

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        for begin in range(0, len(body), 65_536):
            self.wfile.write(body[begin : begin + 65_536])
            if self.server.web.delay_s:
                self.server.stopping.wait(self.server.web.delay_s)
        if len(body) < length:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    web: Web
    stopping: threading.Event

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that left


@pytest.fixture
def web() -> Iterator[Web]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.web = Web(url=f"http://127.0.0.1:{server.server_port}")
    server.stopping = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.web
    server.stopping.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(web: Web, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Web:
    """The hub with the tiny model as org/tiny."""
    web.serve_model("org/tiny", {**model_files, "modeling.py": b"raise SystemExit", "pytorch_model.bin": b"\x80"})
    monkeypatch.setenv("MXN_HUB_ENDPOINT", web.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("MXN_OFFLINE", raising=False)
    return web


@pytest.fixture
def write_wheel(tmp_path: Path) -> Callable[..., Path]:
    """Writes a wheel with the given members."""

    def write(name: str, members: dict[str, bytes]) -> Path:
        path = tmp_path / "wheels" / f"{name}-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        distribution, version = name.split("-")
        info = f"{distribution}-{version}.dist-info"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return path

    return write


@pytest.fixture
def index(web: Web, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Offers a wheel on a package index that pip is set to use; gives its sha256."""
    monkeypatch.setenv("PIP_INDEX_URL", f"{web.url}/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "MXN_OFFLINE"):
        monkeypatch.delenv(name, raising=False)

    def offer(wheel: Path) -> str:
        content = wheel.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        package = wheel.name.split("-")[0].replace("_", "-")
        web.files[f"/files/{wheel.name}"] = content
        row = {"filename": wheel.name, "url": f"../../files/{wheel.name}", "hashes": {"sha256": digest}}
        web.answer_json(f"/simple/{package}/", {"files": [{**row, "size": len(content)}]})
        return digest

    return offer


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once."""
    monkeypatch.setattr("mxn.store.download.MAX_WAIT_S", 0.01)
