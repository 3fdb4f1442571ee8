"""What a chip found on a host is. Its data sheet is a chip card in `config`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """One accelerator or CPU socket that is physically there.

    uid: the same for the same silicon whatever backend sees it, for example "cpu-0" or "gpu-<vendor uuid>".
    kind: id of its chip card ("h100-sxm", "epyc-9654"), or None when no card matches.
    name: what the vendor or the operating system calls it.
    memory_bytes: memory that models can use.
    cores: compute units that are visible to this process (CPU cores, multiprocessors).
    features: instruction sets or capabilities, for example "avx512_vnni".
    links: uids of chips it is joined to, with the kind of link.
    """

    uid: str
    kind: str | None
    name: str
    vendor: str
    memory_bytes: int
    cores: int
    features: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
