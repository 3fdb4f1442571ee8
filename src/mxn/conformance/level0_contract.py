"""L0: the backend can be asked, and what it says is plain, steady and cheap."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import msgspec

from mxn.backends.base import Capabilities, MemoryEstimate, Probe, Support
from mxn.backends.registry import installed_backends
from mxn.config.environment import child_environment
from mxn.conformance.result import CheckFailed
from mxn.conformance.subject import USUAL, Subject
from mxn.core.chip import Chip

HEAVY = ("torch", "transformers", "onnxruntime", "triton", "ray", "vllm", "openvino", "tensorflow", "jax")


async def answers_are_the_declared_plain_values(subject: Subject) -> str:
    values = [value for answer in _answers(subject) for value in answer]
    for value in values:
        try:
            same = msgspec.json.decode(msgspec.json.encode(value), type=type(value)) == value
        except (msgspec.MsgspecError, TypeError, ValueError) as error:
            raise CheckFailed(f"{type(value).__name__} cannot go through JSON: {error}") from error
        if not same:
            raise CheckFailed(f"{type(value).__name__} changes on its way through JSON: {value}")
    return f"{len(values)} values through JSON and back"


async def the_same_question_gets_the_same_answer(subject: Subject) -> str:
    for first, second in zip(_answers(subject), _answers(subject), strict=True):
        for one, other in zip(first, second, strict=True):
            if _steady(one) != _steady(other):
                raise CheckFailed(f"asked twice, it said {one} and then {other}")
    return ""


async def chips_have_names_and_sizes(subject: Subject) -> str:
    chips = subject.backend.chips()
    uids = [chip.uid for chip in chips]
    if len(set(uids)) < len(uids):
        raise CheckFailed(f"two chips share a uid: {', '.join(uids)}")
    for chip in chips:
        if not (chip.uid and chip.name and chip.vendor and chip.memory_bytes > 0 and chip.cores > 0):
            raise CheckFailed(f"uid, name, vendor, memory and cores must be there and not zero: {chip}")
    return ", ".join(uids)


async def an_unknown_model_is_answered_not_raised_about(subject: Subject) -> str:
    spec = replace(subject.models[0].spec, architecture="no-such-architecture", num_parameters=None)
    support = subject.backend.supports(spec, subject.chip)
    subject.backend.estimate(spec, USUAL, subject.chip)
    if support.verdict == "no" and not support.reasons:
        raise CheckFailed("a no without a reason")
    return f'"{support.verdict}": {"; ".join(support.reasons) or "no reason given"}'


async def asking_loads_no_heavy_library(subject: Subject) -> str:
    target = installed_backends()[subject.backend.name].target
    code = (
        "import importlib, sys\n"
        "module, _, name = sys.argv[1].partition(':')\n"
        "backend = getattr(importlib.import_module(module), name)()\n"
        "backend.probe(), [(backend.capabilities(c), backend.power(c).close()) for c in backend.chips()]\n"
        "print(*(name for name in sys.argv[2:] if name in sys.modules), sep=', ')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, target, *HEAVY],
        capture_output=True,
        text=True,
        timeout=60,
        env=child_environment(),
    )
    loaded = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else [done.stderr.strip()[-200:]]
    if any(loaded):
        raise CheckFailed(f"importing and asking it loads {loaded[0]}; such imports belong inside load")
    return ""


CHECKS = (
    answers_are_the_declared_plain_values,
    the_same_question_gets_the_same_answer,
    chips_have_names_and_sizes,
    an_unknown_model_is_answered_not_raised_about,
    asking_loads_no_heavy_library,
)


def _answers(subject: Subject) -> Iterator[list[Probe | Chip | Capabilities | Support | MemoryEstimate]]:
    """What the backend says of itself, its chips and every model, known parameters or not."""
    backend = subject.backend
    yield [backend.probe()]
    yield list(backend.chips())
    yield [backend.capabilities(subject.chip)]
    for model in subject.models:
        for spec in (model.spec, replace(model.spec, num_parameters=None)):
            yield [backend.supports(spec, subject.chip), backend.estimate(spec, USUAL, subject.chip)]


def _steady(value: object) -> object:
    """A value without what may change from one moment to the next: the free memory of a chip."""
    return replace(value, memory_bytes=0) if isinstance(value, Chip) else value
