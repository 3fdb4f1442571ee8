"""AMD chips on a scripted amdsmi."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mxn.backends import gpu, rocm
from mxn.backends.rocm import RocmBackend


class AmdSmiException(Exception):
    pass


class Library:
    """amdsmi as far as the backend calls it; ids are numbers in some versions and text in others."""

    AmdSmiException = AmdSmiException

    class AmdSmiMemoryType:
        VRAM = 0

    def __init__(self, *chips: dict[str, Any], fault: str = "") -> None:
        self.chips, self.fault = chips, fault

    def amdsmi_init(self) -> None:
        if self.fault:
            raise AmdSmiException(self.fault)

    def amdsmi_get_processor_handles(self) -> list[int]:
        return list(range(len(self.chips)))

    def amdsmi_get_gpu_asic_info(self, handle: int) -> dict[str, Any]:
        return self.chips[handle]

    def amdsmi_get_gpu_device_uuid(self, handle: int) -> str:
        return f"{handle:02x}ff74a1-0000-1000-80d0-000000000000"

    def amdsmi_get_gpu_memory_total(self, handle: int, kind: int) -> int:
        return 192 * 2**30

    def amdsmi_get_gpu_device_bdf(self, handle: int) -> str:
        return f"0000:{handle + 0xC1:02X}:00.0"


MI300X = {
    "market_name": "AMD Instinct MI300X",
    "vendor_id": "0x1002",
    "device_id": "0x74a1",
    "num_compute_units": 304,
    "target_graphics_version": "gfx942",
}
OLDER = {"market_name": "AMD Instinct MI100", "vendor_id": 0x1002, "device_id": 0x738C, "num_of_compute_units": 120}


@pytest.fixture(autouse=True)
def torch_for_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+rocm7.1", "transformers": "5.23.0", "triton": "3.7.1"}
    monkeypatch.setattr(gpu, "version", versions.__getitem__)
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)


def test_chips_are_listed_with_card_target_and_bus_address() -> None:
    first, second = RocmBackend(Library(MI300X, OLDER)).chips()
    assert (first.uid, first.kind, first.vendor) == ("gpu-00ff74a1-0000-1000-80d0-000000000000", "mi300x", "amd")
    assert first.cores == 304
    assert first.facts["pci"] == "0000:c1:00.0"
    assert first.facts["pci_id"] == "1002:74a1"
    assert {"gfx942", "bf16", "fp8"} <= set(first.features)
    assert second.cores == 120
    assert RocmBackend().capabilities(first).has_graph_capture
    assert "int4" in RocmBackend().capabilities(first).quantisations
    assert "int4" not in RocmBackend().quantisations("gfx1100"), "torch's kernel refuses it there"


def test_hidden_chips_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = RocmBackend(Library(MI300X, MI300X, MI300X))
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "2,1")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    (chip,) = backend.chips()
    assert chip.uid.startswith("gpu-02"), "the second variable numbers what the first one left"


def test_absence_and_faults_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rocm, "_DRIVER", tmp_path / "kfd")
    assert RocmBackend().probe().state == "absent"
    assert "no AMD GPU driver" in RocmBackend().probe().reason
    assert RocmBackend(Library(fault="not initialised")).probe().state == "broken"
    assert RocmBackend(Library()).probe().state == "absent"
    (tmp_path / "kfd").touch()
    monkeypatch.setattr(rocm.importlib, "import_module", raise_key_error)
    probe = RocmBackend().probe()
    assert probe.state == "broken"
    assert "libamd_smi.so" in probe.reason


def test_a_build_of_torch_for_nvidia_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "version", {"torch": "2.13.0+cu130", "transformers": "5"}.get)
    assert "torch 2.13.0+cu130 is a build for something else" in RocmBackend(Library(MI300X)).probe().reason


def raise_key_error(name: str) -> Any:
    raise KeyError("libamd_smi.so")
