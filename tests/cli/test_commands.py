"""Commands that need no server."""

import json
import re
import time
from pathlib import Path

import pytest

from .conftest import Mxn

COMMANDS = (
    "serve",
    "chat",
    "bench",
    "demo",
    "report",
    "plan",
    "diff",
    "fit",
    "config",
    "status",
    "chips",
    "models",
    "doctor",
)


def test_help_lists_every_command_and_is_quick(mxn: Mxn) -> None:
    start_s = time.monotonic()
    ran = mxn("--help")
    assert ran.code == 0
    assert all(re.search(rf"^  {command} ", ran.out, re.MULTILINE) for command in COMMANDS)
    assert "..." not in ran.out.split("Commands:")[1], "a one-line help is cut off"
    assert time.monotonic() - start_s < 5  # the real limit of 0.3 s is for a quiet machine: see the module list below


def test_help_imports_none_of_the_slow_modules() -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "sys.argv = ['mxn', '--help']\n"
        "from mxn.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "slow = 'pydantic rich numpy msgspec tokenizers fastapi uvicorn httpx asyncio yaml'.split()\n"
        "sys.exit(','.join(name for name in slow if name in sys.modules) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(mxn: Mxn, command: str) -> None:
    ran = mxn(command, "--help")
    assert ran.code == 0
    assert "Usage: " in ran.out


def test_version(mxn: Mxn) -> None:
    ran = mxn("--version")
    assert re.fullmatch(r"mxn \d+\.\d+\.\d+\S*\n", ran.out)


@pytest.mark.parametrize(
    ("args", "code", "texts"),
    [
        (("serve", "no-such-model"), 1, ["no-such-model", "what to do:"]),
        (("serve", "/no/such/folder"), 1, ["/no/such/folder"]),
        (("serve", "no-such-file.yaml"), 2, ["no-such-file.yaml"]),
        (("serve", "--port", "99999"), 2, ["--port"]),
        (("serve", "--quantisation", "int3"), 2, ["--quantisation", "int3"]),
        (("serve", "--host", "0.0.0.0"), 2, ["API key"]),
        (("serve", "a.yaml", "--threads", "1"), 2, ["a.yaml"]),
        (("bench", "--workloads", "W9"), 2, ["W9", "available: W1"]),
        (("bench", "--url", "peer=http://127.0.0.1:1/v1"), 1, ["cannot connect to 127.0.0.1:1"]),
        (("chat", "--url", "http://127.0.0.1:1/v1", "hi"), 1, ["127.0.0.1:1", "start a server with `mxn serve`"]),
        (("status", "--url", "http://127.0.0.1:1"), 1, ["127.0.0.1:1"]),
        (("models", "pull", "no-such-model"), 1, ["no-such-model"]),
        (("models", "rm", "no-such-model"), 1, ["no-such-model"]),
        (("srve",), 2, ["srve"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_error_says_what_and_what_to_do_without_a_traceback(
    mxn: Mxn, args: tuple[str, ...], code: int, texts: list[str]
) -> None:
    ran = mxn(*args)
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert all(text in ran.err for text in texts), ran.err


def test_unknown_backend_names_those_that_are_installed(mxn: Mxn, model_folder: str) -> None:
    ran = mxn("serve", model_folder, "--backend", "tpu")
    assert ran.code == 1
    assert '"tpu" is not installed' in ran.err
    assert "fake" in ran.err


@pytest.mark.torch
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--quantisation", "fp16"), "cpu-0 does not offer quantisation fp16; available: auto, int8, fp32, bf16, int4"),
        (("--context", "1000000"), "cannot hold a context of 1,000,000 tokens; the model's limit is"),
    ],
)
def test_what_the_backend_cannot_meet_is_said_before_a_replica_starts(
    mxn: Mxn, model_folder: str, args: tuple[str, ...], message: str
) -> None:
    done = mxn("serve", model_folder, "--backend", "cpu", "--port", "0", *args)
    assert done.code == 1
    assert message in " ".join(done.err.split())


def test_bad_yaml_lists_every_fault_with_its_line(mxn: Mxn, tmp_path: Path) -> None:
    path = tmp_path / "mxn.yaml"
    path.write_text("server: {port: eighty}\ndeployments:\n  - model: x\n    kv_gb: 3\n    threads: 0\n")
    ran = mxn("serve", str(path))
    assert ran.code == 2
    for where in ("mxn.yaml:1", "mxn.yaml:4", "mxn.yaml:5"):
        assert where in ran.err
    assert 'did you mean "kv_gib"' in ran.err


def test_chips_as_json_names_backends_and_power(mxn: Mxn) -> None:
    found = json.loads(mxn("chips", "--json").out)
    assert {entry["name"] for entry in found["backends"]} >= {"cpu", "fake"}
    fake = next(entry for entry in found["chips"] if entry["backends"] == ["fake"])
    assert fake["power"]["kind"] == "replay"


def test_chips_as_text_has_no_colour_codes_off_a_terminal(mxn: Mxn) -> None:
    ran = mxn("chips")
    assert "Backends" in ran.out
    assert "\x1b" not in ran.out + ran.err


def test_models_lists_the_default_card_with_its_licence(mxn: Mxn) -> None:
    rows = {row["name"]: row for row in json.loads(mxn("models", "--json").out)}
    assert rows["smollm2-135m-instruct"]["licence"] == "Apache-2.0"
    assert rows["smollm2-135m-instruct"]["cached_bytes"] is None
    assert "smollm2-135m-instruct" in mxn("models").out


def test_doctor_gives_each_finding_a_state_and_faults_a_cure(mxn: Mxn) -> None:
    ran = mxn("doctor", "--json", "--quick", MXN_OFFLINE="1")
    findings = json.loads(ran.out)
    assert {finding["state"] for finding in findings} <= {"ok", "warn", "fail"}
    names = {finding["what"] for finding in findings}
    assert names >= {"python", "packages", "backend cpu", "compiler", "memory", "cache", "models", "network", "port"}
    assert "warn" in next(f["state"] for f in findings if f["what"] == "models")
    assert not [f for f in findings if "the check broke" in f["detail"]]
    assert ran.code == any(f["state"] == "fail" for f in findings)


def test_output_may_be_cut_off_by_its_reader(environment: dict[str, str]) -> None:
    import subprocess
    import sys

    command = f"{sys.executable} -m mxn.cli.main chips --json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
