"""From a deployment's settings to what a fleet can start: files on disk, a backend, a chip, a power source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from mxn.backends.base import Backend
from mxn.config.deployments import DeploymentConfig
from mxn.core.chip import Chip
from mxn.energy.reader import PowerReader
from mxn.errors import ConfigError
from mxn.fleet.choice import choose
from mxn.fleet.spec import DeploymentSpec

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
    choice = choose(config.backend, model.spec, settings)
    name = config.name or model.name
    spec = DeploymentSpec.single(
        name=name,
        model=replace(model, name=name),
        backend=choice.backend.name,
        chips=[choice.chip],
        settings=settings,
        max_queue=config.max_queue or max_queue,
        max_wait_s=config.max_wait_s,
        ttft_slo_s=None if config.slo.ttft_ms is None else config.slo.ttft_ms / 1e3,
        stall_s=config.stall_s,
    )
    power = choice.backend.power(choice.chip)
    return Prepared(spec=spec, backend=choice.backend, chip=choice.chip, power=power, why=choice.why)


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
