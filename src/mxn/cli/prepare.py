"""From a deployment's settings to what a fleet can start: files on disk, a backend, a chip, a power source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from mxn.backends.base import Backend, Support
from mxn.backends.registry import installed_backends, load_backend
from mxn.backends.survey import survey
from mxn.config.deployments import DeploymentConfig
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, ModelSpec
from mxn.energy.reader import PowerReader
from mxn.errors import BackendError, ConfigError
from mxn.fleet.spec import DeploymentSpec

PREFERENCE = ("cuda", "rocm", "cpu", "onnx")
"""Backends that "auto" tries first, in this order; others follow by name."""

BY_NAME_ONLY = ("fake", "server")
"""Backends that nothing chooses by itself: one makes tokens up, the other needs to be told what to start."""

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A deployment that is ready to be started. `why`: how backend and chip were chosen."""

    spec: DeploymentSpec
    backend: Backend
    chip: Chip
    power: PowerReader
    why: str


def prepare(config: DeploymentConfig, progress: Callable[[str, float, str], None], *, max_queue: int = 256) -> Prepared:
    """Fetches the model and chooses backend and chip.

    Raises: ModelError, DownloadError, BackendError; each says what was found and what to do.
    """
    from mxn.store.fetch import fetch

    model = fetch(config.model, progress=files_progress(progress))
    settings = config.load_settings()
    backend, chip, why = choose(config.backend, model.spec, settings)
    name = config.name or model.name
    spec = DeploymentSpec.single(
        name=name,
        model=replace(model, name=name),
        backend=backend.name,
        chips=[chip],
        settings=settings,
        max_queue=config.max_queue or max_queue,
        stall_s=config.stall_s,
    )
    return Prepared(spec=spec, backend=backend, chip=chip, power=backend.power(chip), why=why)


def files_progress(progress: Callable[[str, float, str], None]) -> Callable[[str, float, str], None]:
    """The store's progress for people: its "ready" means only that the files are."""
    return lambda phase, fraction, detail: progress("files" if phase == "ready" else phase, fraction, detail)


def deployment_config(**flags: object) -> DeploymentConfig:
    """Checked settings from command-line flags; None means not given.

    Raises: ConfigError that names each flag at fault, what was expected and what was got.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return DeploymentConfig.model_validate(given, strict=False)
    except ValidationError as error:
        faults = [
            f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg'][0].lower() + e['msg'][1:]}, got {e['input']!r}"
            for e in error.errors(include_url=False)
        ]
        raise ConfigError("\n".join(dict.fromkeys(faults))) from error


def backend_options(given: Sequence[str] | None) -> dict[str, str] | None:
    """Options for a backend from NAME=VALUE texts; None when there are none. Raises: ConfigError."""
    options = {}
    for text in given or ():
        name, separator, value = text.partition("=")
        if not name or not separator:
            raise ConfigError(f"--option: expected NAME=VALUE, got {text!r}")
        options[name] = value
    return options or None


def choose(name: str, model: ModelSpec, settings: LoadSettings) -> tuple[Backend, Chip, str]:
    """The backend of that name, or for "auto" the first active one that runs the model so, with its first such chip.

    Raises: BackendError with the reason of every refusal.
    """
    if name != "auto":
        names = [name]
    else:
        known = [n for n in installed_backends() if n not in BY_NAME_ONLY]
        names = sorted(known, key=lambda n: (PREFERENCE.index(n) if n in PREFERENCE else len(PREFERENCE), n))
    refusals: list[str] = []
    entries = installed_backends()
    for candidate in names:
        if candidate in entries and entries[candidate].distribution != "mxn":
            probe = survey([candidate])[candidate].probe  # another's code may hang or die: not in this process
            if probe.state != "active":
                refusals.append(f"{candidate} is {probe.state}: {probe.reason}")
                continue
        try:
            backend = load_backend(candidate)
        except BackendError as error:
            if name != "auto":
                raise
            refusals.append(str(error))
            continue
        probe = backend.probe()
        if probe.state != "active":
            refusals.append(f"{candidate} is {probe.state}: {probe.reason}")
            continue
        for chip in backend.chips():
            tasks = backend.capabilities(chip).tasks
            if model.task not in tasks:
                refusals.append(f"{candidate} loads models that {' or '.join(tasks)}; this one is to {model.task}")
                continue
            support = backend.supports(model, chip)
            if support.verdict == "no":
                refusals.append(f"{candidate} on {chip.uid} cannot run it: {'; '.join(support.reasons)}")
                continue
            unmet = _unmet(support, settings)
            if unmet is not None:
                refusals.append(f"{candidate} on {chip.uid} {unmet}")
                continue
            why = "as asked" if name != "auto" else "first active backend that runs the model"
            if support.verdict == "degraded":
                why += f"; degraded: {'; '.join(support.reasons)}"
            return backend, chip, why + "".join(f"; {refusal}" for refusal in refusals)
    raise BackendError(f"no backend can run this {model.architecture} model:\n" + "\n".join(f"- {r}" for r in refusals))


def _unmet(support: Support, settings: LoadSettings) -> str | None:
    """Which setting the backend cannot meet with this model, found before a replica is started for it."""
    offered = support.quantisations
    if offered and settings.quantisation not in ("auto", *offered):
        return f"does not offer quantisation {settings.quantisation}; available: {', '.join(('auto', *offered))}"
    wanted, limit = settings.context_length, support.max_context
    if wanted is not None and limit is not None and wanted > limit:
        return f"cannot hold a context of {wanted:,} tokens; the model's limit is {limit:,}"
    return None
