"""Plugins broken each in one way, really installed: the kit names the fault in its line, and nothing else suffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mxn.backends.survey import survey
from mxn.conformance import run
from mxn.conformance.result import table

HEAD = """
import os, time
from dataclasses import replace
import numpy as np
from mxn.backends.base import *
from mxn.backends.fake import FakeBackend, FakeExecutor
from mxn.core.batch import StepResult
from mxn.core.quantity import Provenance, Quantity
from mxn.energy.reader import NullReader, Reading, ReaderKind

class Acme(FakeBackend):
    name = "NAME"
"""
EXECUTOR = (
    HEAD
    + """
    def load(self, model, settings, chips, progress):
        executor = super().load(model, settings, chips, progress)
        executor.__class__ = Broken
        return executor

class Broken(FakeExecutor):
    _steps = 0
"""
)
POWER = (
    HEAD
    + """
    def power(self, chip):
        return Reader("a meter of its own")

class Reader(NullReader):
    name, kind = "acme", ReaderKind.COUNTER
"""
)

FIRST = "it can be imported and answers within its time"
ENDS = "every sequence ends exactly once"
MEMORY = "memory in use moves by what was allocated"
ENERGY = "energy rises and is higher under load"
LEAK = "nothing leaks between requests"
SEED = "a seed draws the same whatever the batch"

# name: level to run, source, the line that must fail, words in it
BROKEN: dict[str, tuple[int, str, str, str]] = {
    "raises_at_import": (0, "raise ImportError('libacme.so is missing')", FIRST, "libacme.so is missing"),
    "wrong_signature": (
        0,
        HEAD + "    def supports(self, model): ...",
        FIRST,
        "supports must take (self, model, chip)",
    ),
    "hangs_in_probe": (0, HEAD + "    def probe(self):\n        time.sleep(3600)", FIRST, "did not answer within 3 s"),
    "dies_at_import": (0, "import os\nos._exit(9)", FIRST, "ended the process that asked it (exit code 9)"),
    "says_no_plain_values": (
        0,
        HEAD + "    def supports(self, model, chip):\n        return Support(verdict='yes', max_context=np.int64(9))",
        "answers are the declared plain values",
        "Support cannot go through JSON",
    ),
    "changes_its_mind": (
        0,
        HEAD
        + "    def supports(self, model, chip):\n        return Support(verdict='yes', reasons=(str(time.time()),))",
        "the same question gets the same answer",
        "asked twice",
    ),
    "is_heavy": (0, "import jax\n" + HEAD, "asking loads no heavy library", "loads jax"),
    "answers_twice": (
        1,
        EXECUTOR
        + "    def execute(self, batch):\n"
        + "        result = super().execute(batch)\n"
        + "        return StepResult(tokens=(*result.tokens, *result.tokens))",
        ENDS,
        "2 results for this sequence in one step",
    ),
    "dies_mid_step": (
        1,
        EXECUTOR
        + "    def execute(self, batch):\n"
        + "        self._steps += 1\n"
        + "        return os._exit(17) if self._steps > 5 else super().execute(batch)",
        ENDS,
        "the replica process ended (exit code 17",
    ),
    "lies_about_memory": (
        2,
        HEAD
        + "    def load(self, model, settings, chips, progress):\n"
        + "        executor = super().load(model, settings, chips, progress)\n"
        + "        executor.info = replace(executor.info, kv_bytes=executor.info.kv_bytes * 2 // 3)\n"
        + "        return executor",
        MEMORY,
        "MiB more in use for 170.7 MiB more reported, more than 5% apart",
    ),
    "energy_goes_back": (
        2,
        POWER
        + "    def read(self):\n"
        + "        now_s = time.monotonic()\n"
        + "        return Reading(energy_j=100 - 5 * now_s, time_s=now_s)",
        ENERGY,
        "energy went back",
    ),
    "zero_for_unknown": (
        2,
        POWER + "    def read(self):\n        return Reading(energy_j=0.0, time_s=time.monotonic())",
        ENERGY,
        "must say that it is unavailable: 0.00 W idle",
    ),
    "no_reason": (
        2,
        POWER + "    def read(self):\n        return Reading(energy_j=None, time_s=time.monotonic())",
        "what is unknown is not zero",
        "no energy, and no reason why",
    ),
    "leaks_between_requests": (
        3,
        EXECUTOR
        + "    def _draw(self, step, slots):\n"
        + "        return super()._draw(step, np.append(slots, 300))  # reads on past the end of what is its own",
        LEAK,
        "alone",
    ),
    "seed_depends_on_batch": (
        3,
        EXECUTOR
        + "    def execute(self, batch):\n"
        + "        steps = [replace(step, seed=step.seed + i) for i, step in enumerate(batch.sequences)]\n"
        + "        return super().execute(replace(batch, sequences=tuple(steps)))",
        SEED,
        "in a batch",
    ),
    "forgets_the_prompt": (
        3,
        EXECUTOR
        + "    def execute(self, batch):\n"
        + "        return replace(super().execute(batch), prompt_logprobs=())\n"
        + "Acme.capabilities = lambda self, chip: replace(FakeBackend.capabilities(self, chip), is_scripted=False)",
        "log probabilities of the prompt are the references",
        "got 0 log probabilities; expected 15",
    ),
    "is_no_model": (
        3,
        HEAD
        + "    def capabilities(self, chip):\n"
        + "        return replace(super().capabilities(chip), is_scripted=False)",
        "tokens and logprobs are the references",
        "the reference's is",
    ),
}


@pytest.fixture(autouse=True)
def plugins(install_plugins: Callable[[Mapping[str, str]], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install_plugins({name: source for name, (_, source, _, _) in BROKEN.items()})
    (folder / "jax.py").write_text("")
    monkeypatch.setattr(run, "ANSWER_LIMIT_S", 3.0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if case[0] else []) for name, case in BROKEN.items()]
)
def test_the_fault_is_named_in_its_line(name: str) -> None:
    level, _, line, words = BROKEN[name]
    certificate = run.conform(name, levels=[level])
    failed = {check.name: check.detail for check in certificate.checks if check.status == "fail"}
    assert line in failed, table(certificate)
    assert words in failed[line]
    assert not certificate.has_passed
    assert certificate.level < level or level == 0 > certificate.level
    assert f"  fail    {line}" in table(certificate)


def test_all_of_them_together_harm_nobody_else() -> None:
    found = survey(time_limit_s=3.0)
    broken = {name for name, said in found.items() if said.probe.state == "broken" and name in BROKEN}
    assert broken == {"raises_at_import", "wrong_signature", "hangs_in_probe", "dies_at_import"}
    assert found["fake"].probe.state == "active"
    assert found["cpu"].probe.state in ("active", "absent")
