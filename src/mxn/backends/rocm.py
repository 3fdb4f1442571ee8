"""AMD chips: boards and partitions by amdsmi, models by torch's ROCm build with Triton kernels."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from mxn.backends.gpu import Board, GpuBackend, NoBoards
from mxn.core.chip import Chip
from mxn.energy.amdsmi import amdsmi_reader
from mxn.energy.reader import PowerReader

_DRIVER = Path("/dev/kfd")
_MATRIX_CORES = ("gfx90a", "gfx942", "gfx950")
"""CDNA 2 and later: torch's int4 kernels refuse all others."""
_BF16 = ("gfx90a", "gfx942", "gfx950", "gfx11", "gfx12")


class RocmBackend(GpuBackend):
    """AMD GPUs of this host; a partitioned one is listed as its partitions."""

    name = "rocm"
    vendor: ClassVar[str] = "amd"
    extra: ClassVar[str] = "rocm"
    wrong_builds: ClassVar[tuple[str, ...]] = ("cpu", "cu", "xpu")
    visibility: ClassVar[tuple[str, ...]] = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")

    def __init__(self, amdsmi: Any = None) -> None:
        """Args: amdsmi: the module; tests pass their own."""
        self._amdsmi = amdsmi

    def boards(self) -> Sequence[Board]:
        if self._amdsmi is None and not _DRIVER.exists():
            raise NoBoards(f"no AMD GPU driver on this host ({_DRIVER} is missing)", is_normal=True)
        amdsmi = self._library()
        try:
            found = [_board(amdsmi, handle) for handle in amdsmi.amdsmi_get_processor_handles()]
        except amdsmi.AmdSmiException as error:
            raise NoBoards(f"amdsmi failed while it listed chips: {error}", is_normal=False) from error
        if not found:
            raise NoBoards("the AMD driver is here and lists no GPU", is_normal=True)
        return found

    def quantisations(self, target: str) -> tuple[str, ...]:
        if not target.startswith("gfx"):
            return ()
        if not target.startswith(_BF16):
            return ("fp16", "fp32")
        fp8 = ("fp8",) if target in ("gfx942", "gfx950") else ()
        int4 = ("int4",) if target in _MATRIX_CORES else ()
        return ("bf16", "fp16", "fp32", *fp8, *int4)

    def power(self, chip: Chip) -> PowerReader:
        return amdsmi_reader(chip.facts["uuid"], amdsmi=self._amdsmi)

    def _library(self) -> Any:
        """amdsmi, initialised. Raises: NoBoards with what to do."""
        amdsmi = self._amdsmi
        if amdsmi is None:
            try:
                amdsmi = importlib.import_module("amdsmi")
            except Exception as error:  # without ROCm's library the module raises KeyError
                reason = f"an AMD GPU driver is here, amdsmi is not usable ({type(error).__name__}: {error})"
                reason += "; it comes with ROCm: pip install /opt/rocm/share/amd_smi"
                raise NoBoards(reason, is_normal=False) from error
        try:
            amdsmi.amdsmi_init()
        except amdsmi.AmdSmiException as error:
            raise NoBoards(f"amdsmi cannot start: {error}", is_normal=False) from error
        return amdsmi


def _board(amdsmi: Any, handle: Any) -> Board:
    facts = amdsmi.amdsmi_get_gpu_asic_info(handle)
    target = str(facts.get("target_graphics_version", ""))
    units = facts.get("num_compute_units", facts.get("num_of_compute_units", 0))
    return Board(
        uuid=str(amdsmi.amdsmi_get_gpu_device_uuid(handle)),
        name=str(facts["market_name"]),
        memory_bytes=int(amdsmi.amdsmi_get_gpu_memory_total(handle, amdsmi.AmdSmiMemoryType.VRAM)),
        num_multiprocessors=units if isinstance(units, int) else 0,
        target=target if target.startswith("gfx") or not target else f"gfx{target}",
        pci=str(amdsmi.amdsmi_get_gpu_device_bdf(handle)).lower(),
        pci_id=f"{_number(facts.get('vendor_id')):04x}:{_number(facts.get('device_id')):04x}",
    )


def _number(value: Any) -> int:
    """amdsmi writes ids as numbers in some versions and as hexadecimal text in others."""
    if isinstance(value, int):
        return value
    try:
        return int(str(value), 16)
    except ValueError:
        return 0
