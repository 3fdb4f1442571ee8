"""Which backend and chips of this machine can run a model; who chooses without a plan takes the first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mxn.backends.base import Backend, Support
from mxn.backends.registry import installed_backends, load_backend
from mxn.backends.survey import survey
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, ModelSpec
from mxn.errors import BackendError

PREFERENCE = ("cuda", "rocm", "cpu", "onnx")
"""Backends that "auto" tries first, in this order; others follow by name."""

BY_NAME_ONLY = ("fake", "server")
"""Backends that nothing chooses by itself: one makes tokens up, the other needs to be told what to start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A backend and a chip that run a model. why: how they were chosen, refusals of others included."""

    backend: Backend
    chip: Chip
    why: str


def choose(name: str, model: ModelSpec, settings: LoadSettings) -> Choice:
    """The backend of that name, or for "auto" the first active one that runs the model so, with its first such chip.

    Raises: BackendError with the reason of every refusal.
    """
    return choices(name, model, settings)[0]


def choices(name: str, model: ModelSpec, settings: LoadSettings, *, without: Collection[str] = ()) -> Sequence[Choice]:
    """Every chip of the first backend that will do. without: uids of chips that may not be used.

    Raises: BackendError with the reason of every refusal.
    """
    refusals: list[str] = []
    for candidate in candidates(name):
        backend = _active(candidate, refusals, is_asked_for=name != "auto")
        if backend is None:
            continue
        found = []
        for chip in backend.chips():
            refusal = "may not be used now" if chip.uid in without else refusal_of(backend, chip, model, settings)
            if refusal is not None:
                refusals.append(f"{candidate} on {chip.uid} {refusal}")
                continue
            why = "as asked" if name != "auto" else "first active backend that runs the model"
            support = backend.supports(model, chip)
            if support.verdict == "degraded":
                why += f"; degraded: {'; '.join(support.reasons)}"
            found.append(Choice(backend=backend, chip=chip, why="; ".join((why, *refusals))))
        if found:
            return found
    raise BackendError(f"no backend can run this {model.architecture} model:\n" + "\n".join(f"- {r}" for r in refusals))


def candidates(name: str) -> list[str]:
    """Backends to try for a name or "auto", in order."""
    if name != "auto":
        return [name]
    known = [n for n in installed_backends() if n not in BY_NAME_ONLY]
    return sorted(known, key=lambda n: (PREFERENCE.index(n) if n in PREFERENCE else len(PREFERENCE), n))


def refusal_of(backend: Backend, chip: Chip, model: ModelSpec, settings: LoadSettings) -> str | None:
    """Why the backend cannot run the model so on the chip; None when it can."""
    tasks = backend.capabilities(chip).tasks
    if model.task not in tasks:
        return f"loads models that {' or '.join(tasks)}; this one is to {model.task}"
    support = backend.supports(model, chip)
    if support.verdict == "no":
        return f"cannot run it: {'; '.join(support.reasons)}"
    return _unmet(support, settings)


def _active(name: str, refusals: list[str], *, is_asked_for: bool) -> Backend | None:
    """The backend if it is active; otherwise the reason is added to `refusals`."""
    entries = installed_backends()
    if name in entries and entries[name].distribution != "mxn":
        probe = survey([name])[name].probe  # another's code may hang or die: not in this process
        if probe.state != "active":
            refusals.append(f"{name} is {probe.state}: {probe.reason}")
            return None
    try:
        backend = load_backend(name)
    except BackendError as error:
        if is_asked_for:
            raise
        refusals.append(str(error))
        return None
    probe = backend.probe()
    if probe.state != "active":
        refusals.append(f"{name} is {probe.state}: {probe.reason}")
        return None
    return backend


def _unmet(support: Support, settings: LoadSettings) -> str | None:
    """Which setting the backend cannot meet with this model, found before a replica is started for it."""
    offered = support.quantisations
    if offered and settings.quantisation not in ("auto", *offered):
        return f"does not offer quantisation {settings.quantisation}; available: {', '.join(('auto', *offered))}"
    wanted, limit = settings.context_length, support.max_context
    if wanted is not None and limit is not None and wanted > limit:
        return f"cannot hold a context of {wanted:,} tokens; the model's limit is {limit:,}"
    return None
