"""What `mxn.yaml` says of a deployment's demand: its load, its limits, and where its replicas may be."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from mxn.config.checked import Checked
from mxn.config.chip_card import Id
from mxn.config.cluster import Name

Tokens = Annotated[int, Field(ge=1, le=10_000_000)]


class LengthConfig(Checked):
    """A part of the requests and how long they are."""

    share: Annotated[float, Field(gt=0, le=1)]
    prompt_tokens: Tokens
    output_tokens: Tokens


class LoadConfig(Checked):
    """Requests that come in."""

    # With a trace nothing else is written: rate and lengths are put in before the file is checked.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required", None))

    requests_per_s: Annotated[float, Field(gt=0, le=1e7)]
    prompt_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    lengths: tuple[LengthConfig, ...] = ()
    """Instead of one length for all: parts of the requests, whose shares make 1."""
    trace: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Instead of all these: a file of requests (Azure .csv, Mooncake .jsonl), relative to this one. Planned for are the
    rate of its busiest minute and the lengths of its requests."""
    trace_scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Multiplies the trace's rate."""

    @model_validator(mode="after")
    def _lengths_are_given_once(self) -> LoadConfig:
        has_one = self.prompt_tokens is not None and self.output_tokens is not None
        if self.lengths and (self.prompt_tokens is not None or self.output_tokens is not None):
            raise ValueError("either lengths or prompt_tokens and output_tokens")
        if not self.lengths and not has_one:
            raise ValueError("prompt_tokens and output_tokens, or lengths")
        if self.lengths and abs(sum(part.share for part in self.lengths) - 1) > 0.005:
            raise ValueError("shares of lengths that make 1")
        return self

    @property
    def parts(self) -> tuple[LengthConfig, ...]:
        """Lengths with their shares, whichever way they were given."""
        if self.lengths:
            return self.lengths
        return (LengthConfig(share=1.0, prompt_tokens=self.prompt_tokens or 1, output_tokens=self.output_tokens or 1),)


class SloConfig(Checked):
    """Limits on latency. A replica's capacity is what it serves within them."""

    ttft_ms: Annotated[float, Field(gt=0, le=3.6e6)] | None = None
    """Time to the first token."""
    tpot_ms: Annotated[float, Field(gt=0, le=3.6e6)] | None = None
    """Time per output token after the first."""
    percentile: Annotated[float, Field(ge=50, lt=100)] = 95.0
    """Per cent of the requests that must be within the limits."""


class ReplicasConfig(Checked):
    """How many replicas there may be."""

    min: Annotated[int, Field(ge=0, le=100_000)] = 0
    max: Annotated[int, Field(ge=1, le=100_000)] | None = None

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> ReplicasConfig:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} not above max {self.max}")
        return self


class WhereConfig(Checked):
    """Where replicas may be. What is left out is not restricted."""

    chips: tuple[Id, ...] | None = None
    not_chips: tuple[Id, ...] = ()
    nodes: tuple[Name, ...] | None = None
    racks: tuple[Name, ...] | None = None
    together_with: tuple[str, ...] = ()
    """Deployments whose replicas must be in the same failure domain: the rack, or the node where no rack is named."""
    apart_from: tuple[str, ...] = ()
    """Deployments that may have no replica in a failure domain where this one has one."""
    max_domain_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest share of the replicas in one failure domain."""
    survives_domain_loss: bool = False
    """Whether the load must still be served when any one failure domain is lost."""
