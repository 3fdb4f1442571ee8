"""Runs converters that need torch in a process of their own: GGUF to Hugging Face layout, and others like it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mxn.config.environment import child_environment
from mxn.errors import ModelError

CONVERTER = (sys.executable, "-m", "mxn.runner.convert_gguf")
LAST_LINES = 6


def convert_gguf(
    source: Path, out: Path, *, dtype: str, command: Sequence[str] = CONVERTER, progress: Callable[[str, float], None]
) -> None:
    """Converts `source` into the folder `out`. `progress` gets the converter's (phase, fraction).

    Raises: ModelError with the converter's own last words; OSError when the disk became full.
    """
    arguments = [*command, str(source), str(out), "--dtype", dtype]
    run_converter(arguments, out, f"{source.name} could not be converted", extra="cpu", progress=progress)


def run_converter(
    arguments: Sequence[str], out: Path, what_failed: str, *, extra: str, progress: Callable[[str, float], None]
) -> None:
    """Runs a command that writes the folder `out`; `extra` is the extra of mxn that brings what it needs.

    It writes JSON lines: {"phase", "fraction"} while it works, {"error"} when it cannot go on.
    Raises: ModelError that begins with `what_failed`; OSError when the disk became full.
    """
    failure: str | None = None
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=child_environment({"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}),
        )
        try:
            for line in process.stdout or ():
                message = _message(line)
                phase, fraction = message.get("phase"), message.get("fraction")
                if "error" in message:
                    failure = str(message["error"])
                elif isinstance(phase, str) and isinstance(fraction, (int, float)):
                    progress(phase, min(1.0, max(0.0, fraction)))
            process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if process.returncode == 0 and failure is None:
            return
        errors.seek(0)
        stderr = errors.read()[-20_000:].decode(errors="replace").strip().splitlines()
    failure = failure or _last_words(process.returncode, stderr, extra)
    if os.strerror(errno.ENOSPC) in failure:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
    raise ModelError(f"{what_failed}: {failure}")


def _message(line: bytes) -> dict[str, object]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _last_words(code: int, stderr: Sequence[str], extra: str) -> str:
    text = " | ".join(stderr[-LAST_LINES:]) or "it said nothing"
    if "No module named" in text:
        return f"{stderr[-1]}; converting needs torch: pip install 'mxn[{extra}]'"
    if code == -9:
        return f"the converter was killed, most likely for lack of memory ({text})"
    return f"the converter ended with code {code}: {text}"
