"""NVIDIA chips: boards and MIG slices by NVML, models by torch with Triton kernels."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from mxn.backends.gpu import Board, GpuBackend, NoBoards, uid_of
from mxn.core.chip import Chip
from mxn.energy.nvml import nvml_reader
from mxn.energy.reader import PowerReader

_DRIVER = Path("/proc/driver/nvidia/version")
_NO_LIBRARY = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded", "NVMLError_LibRmVersionMismatch")


class CudaBackend(GpuBackend):
    """NVIDIA GPUs of this host, or their MIG slices where a board is divided."""

    name = "cuda"
    vendor: ClassVar[str] = "nvidia"
    extra: ClassVar[str] = "cuda"
    wrong_builds: ClassVar[tuple[str, ...]] = ("cpu", "rocm", "xpu")
    visibility: ClassVar[tuple[str, ...]] = ("CUDA_VISIBLE_DEVICES",)

    def __init__(self, nvml: Any = None) -> None:
        """Args: nvml: the pynvml module; tests pass their own."""
        self._nvml = nvml

    def boards(self) -> Sequence[Board]:
        nvml = self._library()
        try:
            count = nvml.nvmlDeviceGetCount()
            found = [board for index in range(count) for board in _boards_at(nvml, index)]
        except nvml.NVMLError as error:
            raise NoBoards(f"NVML failed while it listed chips: {error}", is_normal=False) from error
        if not found:
            raise NoBoards("the NVIDIA driver is here and lists no GPU", is_normal=True)
        return found

    def quantisations(self, target: str) -> tuple[str, ...]:
        capability = int(target.removeprefix("sm_")) if target.removeprefix("sm_").isdigit() else 0
        if capability < 70:
            return ()
        if capability < 80:
            return ("fp16", "fp32")
        return ("bf16", "fp16", "fp32", *(("fp8",) if capability >= 89 else ()), "int4")

    def power(self, chip: Chip) -> PowerReader:
        # A slice has no meter of its own: asked for its board, the reader says so.
        return nvml_reader(chip.facts.get("slice_of", chip.facts["uuid"]), nvml=self._nvml)

    def _library(self) -> Any:
        """NVML, initialised. Raises: NoBoards with what to do."""
        nvml = self._nvml
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError:
                if _DRIVER.exists():
                    reason = "an NVIDIA driver is here, nvidia-ml-py is not installed: pip install 'mxn[cuda]'"
                    raise NoBoards(reason, is_normal=False) from None
                raise NoBoards("no NVIDIA driver on this host", is_normal=True) from None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            is_normal = type(error).__name__ in _NO_LIBRARY[:2] and not _DRIVER.exists()
            reason = "no NVIDIA driver on this host" if is_normal else f"NVML cannot start: {error}"
            raise NoBoards(reason, is_normal=is_normal) from error
        except OSError as error:
            raise NoBoards(f"NVML cannot be loaded: {error}", is_normal=False) from error
        return nvml


def _boards_at(nvml: Any, index: int) -> Iterator[Board]:
    """The board, or its slices where MIG divides it."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    pci = nvml.nvmlDeviceGetPciInfo(handle)
    device = int(pci.pciDeviceId)  # the device's number above the vendor's, 16 bits each
    board = Board(
        uuid=uuid,
        name=name,
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        num_multiprocessors=_multiprocessors(nvml, handle, major, minor),
        target=f"sm_{major}{minor}",
        pci=_text(pci.busId).lower(),
        pci_id=f"{device & 0xFFFF:04x}:{device >> 16:04x}",
        links=tuple(_links(nvml, handle)),
    )
    slices = list(_slices(nvml, handle))
    if not slices:
        yield board
    for part in slices:
        facts = nvml.nvmlDeviceGetAttributes(part)
        yield replace(
            board,
            uuid=_text(nvml.nvmlDeviceGetUUID(part)),
            name=_text(nvml.nvmlDeviceGetName(part)),
            memory_bytes=int(facts.memorySizeMB) * 2**20,
            num_multiprocessors=int(facts.multiprocessorCount),
            slice_of=uuid,
            features=("mig",),
            links=(),
        )


def _slices(nvml: Any, handle: Any) -> Iterator[Any]:
    try:
        is_divided, _ = nvml.nvmlDeviceGetMigMode(handle)
        most = nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if is_divided else 0
    except nvml.NVMLError:  # a board that knows no MIG
        return
    for index in range(most):
        with suppress(nvml.NVMLError):  # places without a slice
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)


def _multiprocessors(nvml: Any, handle: Any, major: int, minor: int) -> int:
    """From the number of CUDA cores, of which a multiprocessor has 64 or 128; 0 where the driver does not tell."""
    try:
        cores = int(nvml.nvmlDeviceGetNumGpuCores(handle))
    except nvml.NVMLError:
        return 0
    return cores // (64 if (major, minor) in ((6, 0), (7, 0), (7, 2), (7, 5), (8, 0)) else 128)


def _links(nvml: Any, handle: Any) -> Iterator[tuple[str, str]]:
    """Other boards that NVLink joins this one to directly; switches have no uid and are left out."""
    seen = set()
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(handle, link):
                continue
            bus = nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId
            other = uid_of(_text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByPciBusId(bus))))
        except nvml.NVMLError:
            continue
        if other not in seen:
            seen.add(other)
            yield other, "nvlink"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
