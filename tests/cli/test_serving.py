"""Commands against a real `mxn serve` on the fake backend."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .conftest import Mxn, Serving


def test_ready_line_tells_what_was_chosen(server: Serving, model_folder: str) -> None:
    [deployment] = server.ready["deployments"]
    assert deployment["name"] == "tiny"
    assert deployment["folder"] == model_folder
    assert (deployment["backend"], deployment["chip"], deployment["attention"]) == ("fake", "fake-0", "none")
    assert (deployment["power"]["source"], deployment["power"]["kind"]) == ("scripted", "replay")
    assert server.url.startswith("http://127.0.0.1:")


def test_chat_prints_the_answer_on_stdout_and_the_rest_on_stderr(mxn: Mxn, server: Serving) -> None:
    ran = mxn("chat", "--url", server.url, "--stats", "--max-tokens", "8", "--temperature", "0", "hello")
    assert ran.code == 0, ran.err
    assert ran.out.strip()
    assert "TTFT" in ran.err
    assert "8 tokens out" in ran.err
    assert "cut off at 8 tokens" in ran.err
    again = mxn("chat", "--url", server.url, "--max-tokens", "8", "--temperature", "0", "-", stdin="hello")
    assert again.out == ran.out


def test_conversation_reads_lines_until_the_end(mxn: Mxn, server: Serving) -> None:
    ran = mxn(
        "chat", "--url", server.url, "--max-tokens", "4", stdin="hello\n/what\n/clear\nhello\n/exit\nnever asked\n"
    )
    assert ran.code == 0
    assert "/clear forgets" in ran.err
    assert ran.err.count("cut off") == 2


def test_server_refusal_is_shown_in_its_own_words(mxn: Mxn, server: Serving) -> None:
    ran = mxn("chat", "--url", server.url, "--model", "other", "hi")
    assert ran.code == 1
    assert "other" in ran.err
    assert "tiny" in ran.err


def test_status_shows_backend_blocks_and_counts(mxn: Mxn, server: Serving) -> None:
    ran = mxn("status", "--url", server.url)
    assert ran.code == 0, ran.err
    for text in ("tiny: ready", "fake on fake-0", "KV blocks", "finished"):
        assert text in ran.out
    found = json.loads(mxn("status", "--url", server.url, "--json").out)
    assert found["deployments"][0]["backend"] == "fake"


def test_bench_measures_a_server_and_writes_a_record(
    mxn: Mxn, server: Serving, model_folder: str, tmp_path: Path
) -> None:
    path, page = tmp_path / "r.json", tmp_path / "r.md"
    ran = mxn(
        *("bench", "--url", f"a={server.url}", "--url", f"b={server.url}", "--tokenizer", model_folder),
        *("--workloads", "quick,W4", "-r", "2", "--json", str(path), "--markdown", str(page)),
    )
    assert ran.code == 0, ran.out + ran.err
    report = json.loads(path.read_text())
    assert len(report["records"]) == 6
    for record in report["records"]:
        assert record["faults"] == []
        assert record["subject"]["backend"] == "fake"
        assert (
            record["num_output_tokens"] == 2 * record["workload"]["num_requests"] * record["workload"]["output_tokens"]
        )
    assert report["manifest"]["versions"]["mxn"]
    assert "Model x backend" in ran.out
    assert "x" in page.read_text()


def test_bench_starts_a_server_of_its_own(mxn: Mxn, model_folder: str) -> None:
    ran = mxn("bench", "--model", model_folder, "--backend", "fake", "--workloads", "quick1", "-r", "1")
    assert ran.code == 0, ran.err
    assert "Interface: HTTP." in ran.out


def test_bench_in_process_needs_no_http(mxn: Mxn, model_folder: str) -> None:
    ran = mxn("bench", "-m", model_folder, "--backend", "fake", "--in-process", "--workloads", "quick1", "-r", "1")
    assert ran.code == 0, ran.err
    assert "Interface: in process." in ran.out


def test_own_server_ends_with_the_command_that_started_it(environment: dict[str, str], model_folder: str) -> None:
    code = (
        "import os\n"
        "from mxn.cli.own_server import own_server\n"
        f"with own_server({model_folder!r}, ['--backend', 'fake'], is_quiet=True) as server:\n"
        "    print(server.url, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    address = urlsplit(done.stdout.strip())
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection((address.hostname, address.port), timeout=1).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlives its parent")


def test_sigterm_ends_with_exit_code_0(serve: Callable[..., Serving]) -> None:
    serving = serve()
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(20) == 0


def test_yaml_serves_several_deployments_behind_a_key(
    serve: Callable[..., Serving], mxn: Mxn, model_folder: str, tmp_path: Path
) -> None:
    path = tmp_path / "mxn.yaml"
    entries = "".join(f"  - {{name: {n}, model: {model_folder}, backend: fake}}\n" for n in ("one", "two"))
    path.write_text(f"deployments:\n{entries}")
    serving = serve(str(path), MXN_API_KEY="a-long-secret")
    assert [d["name"] for d in serving.ready["deployments"]] == ["one", "two"]
    assert mxn("status", "--url", serving.url).code == 1
    assert mxn("status", "--url", serving.url, MXN_API_KEY="a-long-secret").code == 0
    ran = mxn("chat", "--url", serving.url, "-m", "two", "--max-tokens", "4", "hi", MXN_API_KEY="a-long-secret")
    assert ran.code == 0, ran.err


def test_port_in_use_says_so(mxn: Mxn, server: Serving, model_folder: str) -> None:
    port = server.url.rsplit(":", 1)[1].split("/")[0]
    ran = mxn("serve", model_folder, "--backend", "fake", "--port", port)
    assert ran.code == 2
    assert f"127.0.0.1:{port}" in ran.err
    with urllib.request.urlopen(server.url.replace("/v1", "/readyz")) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("args", [("serve",), ("bench", "--workloads", "quick1")])
def test_offline_without_the_default_model_says_how_to_get_it(mxn: Mxn, args: tuple[str, ...]) -> None:
    ran = mxn(*args, MXN_OFFLINE="1")
    assert ran.code == 1
    assert "MXN_OFFLINE" in ran.err
    assert "Traceback" not in ran.err
