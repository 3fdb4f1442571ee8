"""What the GPU runner asks of torch.cuda, all in one place; torch's ROCm build answers to the same names.

Tests drive the same runner on a CPU with a stand-in for this one class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mxn.errors import ChipError, OutOfMemoryError


@dataclass(frozen=True, slots=True)
class Captured:
    """What was launched once, to be launched again by `replay`, which fills `output` anew."""

    replay: Callable[[], None]
    output: torch.Tensor


class Accelerator(Protocol):
    """A chip with memory of its own that runs what it is given later, in order."""

    device: torch.device

    def select(self) -> None:
        """Makes it the calling thread's chip."""

    def free_bytes(self) -> int:
        """Memory that may still be taken, what the allocator holds unused included."""

    def total_bytes(self) -> int:
        """All of its memory."""

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Memory that `run` held at its highest beyond what was held before."""

    def host_tensor(self, num_bytes: int) -> torch.Tensor:
        """Host memory (num_bytes) uint8 that the chip can read and write while the host goes on."""

    def capture(self, run: Callable[[], torch.Tensor], warm_up: Callable[[], torch.Tensor]) -> Captured:
        """Records what `run` launches, without running it.

        warm_up: launches the same over inputs of its own; it runs first, so that nothing is compiled on the way.
        """

    def mark(self) -> Callable[[], None]:
        """Notes what has been launched so far. The answer, called, returns when all of it has happened."""

    def release(self) -> None:
        """Gives back what the allocator holds unused."""


class CudaAccelerator:
    """A CUDA or HIP device of torch. Graphs share one memory pool, so only one of them may run at a time."""

    def __init__(self, device: str = "cuda:0") -> None:
        self.device = torch.device(device)
        self.select()
        self._pool = torch.cuda.graph_pool_handle()
        self._capturing = torch.cuda.Stream(self.device)  # one for all: libraries keep a workspace per stream

    def select(self) -> None:
        torch.cuda.set_device(self.device)

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()  # libraries take their workspaces when they are first used, and keep them
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return peak

    def host_tensor(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def capture(self, run: Callable[[], torch.Tensor], warm_up: Callable[[], torch.Tensor]) -> Captured:
        # thread_local: the serving thread may launch and allocate meanwhile. torch.cuda.graph() would also stop the
        # chip, collect garbage and empty the allocator's cache, all of it on the serving thread's account.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._capturing):
            for _ in range(2):
                warm_up()
            self._capturing.synchronize()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = run()
            finally:
                graph.capture_end()
        return Captured(graph.replay, output)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def release(self) -> None:
        torch.cuda.empty_cache()


def find_device(uuid: str, pci: str) -> str:
    """torch's name for the chip with this UUID or bus address.

    Raises: ChipError when torch does not see it, with what it does see.
    """
    count = torch.cuda.device_count()
    facts = [torch.cuda.get_device_properties(index) for index in range(count)]
    wanted = _letters(uuid)
    for index, fact in enumerate(facts):
        if _letters(str(getattr(fact, "uuid", ""))) == wanted or (
            pci and not _is_slice(uuid) and _bus(fact) == pci[-10:]
        ):
            return f"cuda:{index}"
    if count == 1 and _is_slice(uuid):
        return "cuda:0"  # a process sees one slice, under its board's name
    seen = ", ".join(f"{fact.name} {getattr(fact, 'uuid', '')}" for fact in facts) or "none"
    hint = f"; start the process with CUDA_VISIBLE_DEVICES={uuid}" if _is_slice(uuid) else ""
    raise ChipError(f"torch {torch.__version__} does not see chip {uuid} ({pci}); it sees {seen}{hint}")


def _is_slice(uuid: str) -> bool:
    return uuid.upper().startswith("MIG-")


def _letters(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-").replace("-", "")


def _bus(fact: Any) -> str:
    """Like the end of NVML's and amdsmi's bus addresses, "0a:00.0" behind its domain's last two digits."""
    bus, device = getattr(fact, "pci_bus_id", None), getattr(fact, "pci_device_id", 0)
    domain = getattr(fact, "pci_domain_id", 0)
    return "" if bus is None else f"{domain:04x}:{bus:02x}:{device:02x}.0"[-10:]


@contextmanager
def chip_errors(what: str) -> Iterator[None]:
    """Turns what torch raises for a chip into mxn's errors.

    Raises: OutOfMemoryError when `what` did not fit and nothing was changed; ChipError when the chip is lost or in a
      state from which only a new process recovers.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"{what} did not fit: {_first_line(error)}") from error
    except RuntimeError as error:
        text = str(error)
        if "ALLOC_FAILED" in text:  # what cuBLAS and its kin say for lack of memory
            raise OutOfMemoryError(f"{what} did not fit: {_first_line(error)}") from error
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "HIP error" in text:
            raise ChipError(f"the chip failed in {what}: {_first_line(error)}") from error
        raise


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
