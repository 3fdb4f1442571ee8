"""How benchmarks/cpu.py talks to a library that runs in a process, and mostly an environment, of its own.

One line of JSON in, one line out. First the worker says what it loaded; then every line names prompts as token ids,
and the answer holds one entry per request. Between lines the worker waits in a read. Standard library only.

    -> {"backend": ..., "quantisation": ..., "program": ..., "threads": ..., "notes": [...]}
    <- {"prompts": [[1, 2, 3], ...], "max_tokens": 64, "concurrency": 8}
    -> {"requests": [{"start_s": ..., "end_s": ..., "times_s": [...], "num_output_tokens": 64}, ...]}

Times are time.monotonic(), one clock for all processes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

Run = Callable[[list[list[int]], int, int], list[dict[str, Any]]]
"""Answers (prompts, max_tokens, concurrency), greedy, not stopping at end of text; one entry per prompt, in order."""


def private_stdout() -> TextIO:
    """The pipe to the harness. What libraries print goes to stderr from now on."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def serve(pipe: TextIO, about: dict[str, Any], run: Run) -> None:
    """Answers until stdin ends."""

    def send(value: dict[str, Any]) -> None:
        pipe.write(json.dumps(value) + "\n")
        pipe.flush()

    send(about)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            send({"requests": run(task["prompts"], task["max_tokens"], task["concurrency"])})
        except Exception as error:  # whatever a library raises is this peer's result
            send({"error": f"{type(error).__name__}: {error}"})
