"""What a chip can do, as far as kernels care.

Built from a device, from a name, or by hand for a chip that is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Facts of one chip.

    name: matched by implementations and tuning tables ("sm_90", "gfx942").
    vendor: "nvidia", "amd" or a vendor's own word; which launch options make sense hangs on it.
    shared_memory_bytes: most that one program may use. fp8_dtypes: those the chip converts itself.
    """

    name: str
    vendor: str
    warp_size: int
    num_multiprocessors: int
    shared_memory_bytes: int
    fp8_dtypes: tuple[torch.dtype, ...] = ()
    has_bf16: bool = True
    is_interpreted: bool = False

    @classmethod
    def named(cls, name: str) -> Target:
        """A chip known by name, with the counts of its largest product. Raises: ValueError listing the names."""
        if name not in _KNOWN:
            raise ValueError(
                f"no target is named {name!r}; known here: {', '.join(_KNOWN)}. Build a Target by hand for another"
            )
        return _KNOWN[name]

    @classmethod
    def of(cls, device: torch.device | str) -> Target:
        """The chip behind a torch device; for the CPU, Triton's interpreter if on, else one that runs no Triton."""
        device = torch.device(device)
        if device.type == "cuda":
            return _of_accelerator(torch.cuda.current_device() if device.index is None else device.index)
        if device.type == "cpu":
            return _cpu()
        raise ValueError(f"no target is known for device {device}; pass target=Target(...) with the chip's facts")

    def supports(self, dtype: torch.dtype) -> bool:
        if dtype in FP8_DTYPES:
            return dtype in self.fp8_dtypes
        return self.has_bf16 if dtype is torch.bfloat16 else dtype in (torch.float16, torch.float32)


FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_OCP, _FNUZ = (torch.float8_e4m3fn,), (torch.float8_e4m3fnuz,)


def _nvidia(name: str, num_multiprocessors: int, shared_kib: int, fp8: tuple[torch.dtype, ...]) -> Target:
    return Target(
        name=name,
        vendor="nvidia",
        warp_size=32,
        num_multiprocessors=num_multiprocessors,
        shared_memory_bytes=shared_kib * KIB,
        fp8_dtypes=fp8,
    )


def _amd(name: str, num_multiprocessors: int, shared_kib: int, fp8: tuple[torch.dtype, ...]) -> Target:
    return replace(_nvidia(name, num_multiprocessors, shared_kib, fp8), vendor="amd", warp_size=64)


# Shared memory per block: CUDA C++ programming guide, table of compute capabilities (1 KiB of it is the system's);
# LDS per workgroup: CDNA3 and CDNA4 instruction set guides. Triton converts e4m3fn from compute capability 8.9 on.
_KNOWN = {
    target.name: target
    for target in (
        _nvidia("sm_80", 108, 163, ()),
        _nvidia("sm_86", 84, 99, ()),
        _nvidia("sm_89", 142, 99, _OCP),
        _nvidia("sm_90", 132, 227, _OCP),
        _nvidia("sm_100", 148, 227, _OCP),
        _nvidia("sm_120", 188, 99, _OCP),
        _amd("gfx942", 304, 64, _FNUZ),
        _amd("gfx950", 256, 160, _OCP),
    )
}


@lru_cache
def _of_accelerator(index: int) -> Target:
    facts = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = facts.gcnArchName.split(":")[0]
        known = _KNOWN.get(name) or _amd(name, facts.multi_processor_count, 64, ())
    else:
        capability = facts.major * 10 + facts.minor
        name = f"sm_{capability}"
        known = _KNOWN.get(name) or _nvidia(name, facts.multi_processor_count, 99, _OCP if capability >= 89 else ())
        known = replace(known, has_bf16=capability >= 80)
    limit = getattr(facts, "shared_memory_per_block_optin", 0) or known.shared_memory_bytes
    warp_size = getattr(facts, "warp_size", known.warp_size)
    return replace(
        known, num_multiprocessors=facts.multi_processor_count, shared_memory_bytes=limit, warp_size=warp_size
    )


def triton_is_interpreted() -> bool:
    """Whether this process's Triton runs kernels on the CPU.

    Decided by TRITON_INTERPRET when Triton is first imported.
    """
    try:
        from triton import language
    except ImportError:
        return False
    return type(language.sum).__name__ == "InterpretedFunction"


@lru_cache
def _cpu() -> Target:
    return INTERPRETER if triton_is_interpreted() else _PLAIN_CPU


# Few multiprocessors, so that tests meet every number of splits with small inputs.
INTERPRETER = Target(
    name="interpreter",
    vendor="interpreter",
    warp_size=32,
    num_multiprocessors=8,
    shared_memory_bytes=227 * KIB,
    fp8_dtypes=FP8_DTYPES,
    is_interpreted=True,
)
_PLAIN_CPU = Target(name="cpu", vendor="cpu", warp_size=1, num_multiprocessors=1, shared_memory_bytes=0)
