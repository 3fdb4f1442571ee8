"""`mxn.yaml`: what is served and how. `load_deployments` reads it and reports every fault at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mxn.config.checked import Checked, check, json_schema
from mxn.config.cluster import ClusterConfig, PlannedQuantisation, PolicyConfig
from mxn.config.demand import LoadConfig, ReplicasConfig, SloConfig, WhereConfig
from mxn.config.demand_checks import demand_faults
from mxn.config.source import NAME_PATTERN
from mxn.config.trace_load import expand_traces
from mxn.config.yaml_file import KeyPath, Plain, read_yaml
from mxn.core.model import LoadSettings, QuantisationName

GIB = 1 << 30

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
OptionName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9._-]{0,63}$")]
Seconds = Annotated[float, Field(ge=0, le=86_400)]


class ServerConfig(Checked):
    """The HTTP front door."""

    host: Annotated[str, Field(min_length=1, max_length=253)] = "127.0.0.1"
    """Address to listen on; any but a loopback address needs API keys."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    """Port to listen on; 0 lets the system choose."""
    api_keys: tuple[Annotated[str, Field(min_length=8, max_length=512)], ...] = ()
    """Keys that clients must send. Better kept out of files: the variable MXN_API_KEY adds to them."""
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Requests that may wait in one deployment before others get 429."""
    max_body_mib: Annotated[float, Field(gt=0, le=1024)] = 8.0
    """Largest request body."""
    drain_s: Seconds = 30.0
    """Seconds that running requests get to finish on SIGTERM."""
    vllm_metrics: bool = False
    """Whether /metrics tells the figures that inference gateways read under vLLM's names too."""


class DeploymentConfig(Checked):
    """A model and how it should be served."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Name that clients ask for; the model's own when left out."""
    model: Annotated[str, Field(min_length=1, max_length=4096)]
    """Name of a model card, hub id (org/name), local folder or .gguf file."""
    backend: Word = "auto"
    """Name of a backend; auto takes the best one that is active here."""
    quantisation: QuantisationName = "auto"
    context_length: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Longest prompt and output together, in tokens; the model's own limit when left out."""
    kv_gib: Annotated[float, Field(gt=0, le=1_000_000)] | Literal["auto"] = "auto"
    """Memory for the KV cache of one replica."""
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens in one KV block."""
    max_num_seqs: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Sequences in one step at most."""
    max_step_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 512
    """Tokens computed in one step at most."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Compute threads on a CPU; the backend decides when left out."""
    prefix_cache: bool = True
    """Whether prompts that begin alike share their KV blocks."""
    attention: Word = "auto"
    """Name of an attention backend."""
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests that may wait; the server's when left out."""
    max_wait_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Seconds that a request may wait in line for a replica; then it gets 429, or 503 when none is ready."""
    options: Annotated[dict[OptionName, str | int | float | bool], Field(default_factory=dict)]
    """Settings that only the chosen backend knows, by name."""
    stall_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Seconds without the end of a step, with work at hand, after which a replica is ended and started again."""
    chip_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Part of its chip's memory, and of its energy, that a replica gets beside others; even parts when left out."""
    keep_loaded: bool = True
    """false: loaded when it is first asked for, and unloaded when another model needs its room."""
    idle_unload_s: Seconds | None = None
    """Seconds without a request after which it is unloaded, to be loaded again when it is asked for."""

    load: LoadConfig | None = None
    """Requests to plan for."""
    slo: SloConfig = SloConfig()
    """Limits on latency; a plan counts what a replica serves within them."""
    replicas: ReplicasConfig = ReplicasConfig()
    """Fewest and most replicas."""
    tier: Annotated[int, Field(ge=0, le=1000)] = 0
    """Under overload, tier 0 is served before tier 1, and so on."""
    quantisations: Annotated[tuple[PlannedQuantisation, ...], Field(min_length=1)] | None = None
    """Formats that a plan may choose from when `quantisation` is auto; the model card's when left out."""
    where: WhereConfig = WhereConfig()
    """Where replicas may be."""

    @property
    def served_name(self) -> str:
        return self.name or self.model

    def load_settings(self) -> LoadSettings:
        """The part that a replica needs to load the model."""
        return LoadSettings(
            quantisation=self.quantisation,
            context_length=self.context_length,
            kv_bytes=None if self.kv_gib == "auto" else int(self.kv_gib * GIB),
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_step_tokens=self.max_step_tokens,
            prefix_cache=self.prefix_cache,
            threads=self.threads,
            attention=self.attention,
            options=tuple((name, _option_text(value)) for name, value in self.options.items()),
        )


def _option_text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class DeploymentsFile(Checked):
    """A whole `mxn.yaml`."""

    server: ServerConfig = ServerConfig()
    cluster: ClusterConfig = ClusterConfig()
    policy: PolicyConfig = PolicyConfig()
    deployments: Annotated[tuple[DeploymentConfig, ...], Field(min_length=1, max_length=10_000)]


def load_deployments(path: Path) -> DeploymentsFile:
    """Reads `mxn.yaml`. Raises: ConfigError that lists every fault as `file:line:col: path: expected ..., got ...`."""
    document = read_yaml(path)
    expand_traces(document, path.parent)
    return check(document, DeploymentsFile, _faults_between_fields)


def deployments_schema() -> dict[str, Any]:
    """JSON Schema of `mxn.yaml`, for editors."""
    return json_schema(DeploymentsFile, "mxn.yaml")


def _faults_between_fields(data: Plain) -> Iterator[tuple[KeyPath, str]]:
    yield from _duplicate_names(data)
    yield from demand_faults(data)


def _duplicate_names(data: Plain) -> Iterator[tuple[KeyPath, str]]:
    entries = data.get("deployments") if isinstance(data, dict) else None
    first: dict[str, int] = {}
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if not isinstance(entry, dict):
            continue
        key = "name" if isinstance(entry.get("name"), str) else "model"
        name = entry.get(key)
        if not isinstance(name, str):
            continue
        if name in first:
            yield (
                ("deployments", index, key),
                f'expected a name of its own, got "{name}" like deployments[{first[name]}]; set name',
            )
        first.setdefault(name, index)
