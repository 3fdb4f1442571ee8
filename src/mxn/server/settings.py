"""Limits and keys of the HTTP front door, in one value that is passed around."""

from __future__ import annotations

from dataclasses import dataclass, field

from mxn.errors import ConfigError

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """How much one client may ask for, how long it may take, and who may come in.

    api_keys: any of them opens every route; empty means loopback only, no key.
    max_requests: requests in work at once in this gateway; more are answered with 429.
    max_n: completions of one prompt. max_sequences: prompts times `n` of one request.
    send_timeout_s: longest wait for a client to take bytes before its request is aborted.
    socket_buffer_bytes: kernel send buffer per connection, so that slow readers cost little memory.
    template_*: limits of the child process that renders a model's chat template.
    max_template_bytes: what a template may add to the messages it renders.
    vllm_metrics: /metrics tells the figures that inference gateways read under vLLM's names too.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 8 * MIB
    max_json_depth: int = 32
    max_requests: int = 1024
    max_connections: int = 4096
    max_head_bytes: int = 64 * 1024
    max_n: int = 16
    max_sequences: int = 128
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    send_timeout_s: float = 30.0
    socket_buffer_bytes: int = 256 * 1024
    drain_s: float = 30.0
    template_timeout_s: float = 1.0
    template_memory_bytes: int = 512 * MIB
    max_template_bytes: int = 1 * MIB
    vllm_metrics: bool = False

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"an API key is one or more printable ASCII characters without spaces, got one of length {len(key)}"
                )
        for name in ("max_body_bytes", "max_json_depth", "max_requests", "max_connections", "max_n", "max_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
