"""NVIDIA chips on a scripted NVML: what is listed, hidden, divided, refused, and said when something is wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mxn.backends import cuda, gpu
from mxn.backends.cuda import CudaBackend
from mxn.backends.gpu import choose_visible
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, ModelSpec
from mxn.core.quantity import Provenance
from mxn.errors import ChipError

SPEC = ModelSpec(
    architecture="llama",
    num_layers=32,
    hidden_size=4096,
    vocab_size=128256,
    num_heads=32,
    num_kv_heads=8,
    key_dim=128,
    value_dim=128,
    max_context=8192,
    num_parameters=8_030_000_000,
)
GIB = 2**30


class NVMLError(Exception):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class Driver:
    """NVML as far as the backend calls it. boards: (uuid, name, capability, cores, slices)."""

    NVMLError = NVMLError
    NVML_NVLINK_MAX_LINKS = 2

    def __init__(self, *boards: tuple[str, str, tuple[int, int], int, int], fault: NVMLError | None = None) -> None:
        self.boards, self.fault = boards, fault

    def nvmlInit(self) -> None:
        if self.fault:
            raise self.fault

    def nvmlDeviceGetCount(self) -> int:
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return [board[0] for board in self.boards].index(uuid)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> int:
        return int(bus.split(":")[1], 16)

    def nvmlDeviceGetUUID(self, handle: Any) -> Any:
        return handle if isinstance(handle, str) else self.boards[handle][0]

    def nvmlDeviceGetName(self, handle: Any) -> Any:
        return "NVIDIA H100 80GB HBM3 MIG 1g.10gb" if isinstance(handle, str) else self.boards[handle][1].encode()

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return self.boards[handle][2]

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"00000000:{handle:02X}:00.0", pciDeviceId=0x233010DE)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=80 * GIB)

    def nvmlDeviceGetNumGpuCores(self, handle: int) -> int:
        if not self.boards[handle][3]:
            raise NVMLError("Not Supported")
        return self.boards[handle][3]

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:
        if self.boards[handle][2] < (8, 0):
            raise NVMLError("Not Supported")
        return bool(self.boards[handle][4]), 0

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, index: int) -> str:
        if index >= self.boards[handle][4]:
            raise NVMLError("Not Found")
        return f"MIG-{handle}-{index}"

    def nvmlDeviceGetAttributes(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(memorySizeMB=9728, multiprocessorCount=16)

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if len(self.boards) < 2:
            raise NVMLError("Not Supported")
        return 1

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"00000000:{1 - handle:02X}:00.0")


H100 = ("GPU-AB12", "NVIDIA H100 80GB HBM3", (9, 0), 16896, 0)


@pytest.fixture(autouse=True)
def torch_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with what the backend needs, and all chips shown."""
    versions = {"torch": "2.11.0+cu130", "transformers": "5.17.0", "triton": "3.6.0"}
    monkeypatch.setattr(gpu, "version", versions.__getitem__)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_board_becomes_a_chip_with_its_card_and_a_uid_of_its_own() -> None:
    (chip,) = CudaBackend(Driver(H100)).chips()
    assert (chip.uid, chip.kind, chip.vendor) == ("gpu-ab12", "h100-sxm", "nvidia")
    assert chip.cores == 132
    assert chip.memory_bytes == 80 * GIB
    assert chip.facts["uuid"] == "GPU-AB12"
    assert chip.facts["pci_id"] == "10de:2330"
    assert {"sm_90", "bf16", "fp8"} <= set(chip.features)


def test_boards_joined_by_nvlink_name_each_other() -> None:
    first, second = CudaBackend(Driver(H100, ("GPU-CD34", *H100[1:]))).chips()
    assert first.links == ((second.uid, "nvlink"),)
    assert second.links == ((first.uid, "nvlink"),)


def test_slices_are_chips_and_their_board_is_not() -> None:
    chips = CudaBackend(Driver((*H100[:4], 2))).chips()
    assert [chip.uid for chip in chips] == ["gpu-mig-0-0", "gpu-mig-0-1"]
    assert {chip.facts["slice_of"] for chip in chips} == {"GPU-AB12"}
    assert chips[0].memory_bytes == 9728 * 2**20
    assert chips[0].cores == 16
    assert "split by MIG" in CudaBackend(Driver((*H100[:4], 2))).power(chips[0]).detail


def test_the_number_of_multiprocessors_may_be_unknown() -> None:
    (chip,) = CudaBackend(Driver((*H100[:3], 0, 0))).chips()
    assert chip.cores == 0


@pytest.mark.parametrize(
    ("value", "uids"),
    [
        ("1,0", ["gpu-cd34", "gpu-ab12"]),
        ("GPU-CD", ["gpu-cd34"]),
        ("0,7,1", ["gpu-ab12"]),
        ("0,0", ["gpu-ab12"]),
        ("", []),
    ],
    ids=["order", "beginning of a UUID", "ends at an unknown one", "ends at a repeated one", "hides all"],
)
def test_hidden_chips_are_not_listed(value: str, uids: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    backend = CudaBackend(Driver(H100, ("GPU-CD34", *H100[1:])))
    assert [chip.uid for chip in backend.chips()] == uids
    if not uids:
        assert backend.probe().state == "absent"
        assert "hidden by CUDA_VISIBLE_DEVICES" in backend.probe().reason


def test_slices_are_shown_by_uuid() -> None:
    boards = CudaBackend(Driver((*H100[:4], 2))).boards()
    assert [board.uuid for board in choose_visible(boards, ["MIG-0-1"])] == ["MIG-0-1"]
    assert choose_visible(boards, ["0"]) == [], "a divided board has no number of its own here"


def test_no_driver_is_absence_and_a_driver_that_fails_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(cuda, "_DRIVER", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    probe = CudaBackend().probe()
    assert (probe.state, probe.reason) == ("absent", "no NVIDIA driver on this host")
    assert CudaBackend().chips() == ()
    assert CudaBackend(Driver(fault=NVMLError_DriverNotLoaded("Driver Not Loaded"))).probe().state == "absent"
    assert CudaBackend(Driver(fault=NVMLError("Unknown Error"))).probe().state == "broken"
    assert CudaBackend(Driver()).probe().state == "absent"
    (tmp_path / "none").touch()
    assert CudaBackend().probe().state == "broken"
    assert "pip install 'mxn[cuda]'" in CudaBackend().probe().reason
    assert CudaBackend(Driver(fault=NVMLError_DriverNotLoaded("Driver Not Loaded"))).probe().state == "broken"


@pytest.mark.parametrize(
    ("versions", "state", "words"),
    [
        ({"torch": "2.13.0+cpu", "transformers": "5.23.0"}, "broken", "torch 2.13.0+cpu is a build for something else"),
        ({"torch": "2.13.0+rocm7.1", "transformers": "5.23.0"}, "broken", "is a build for something else"),
        ({"transformers": "5.23.0"}, "broken", "torch is not installed: pip install 'mxn[cuda]'"),
        ({"torch": "2.13.0", "transformers": "5.23.0"}, "active", "triton is not installed"),
    ],
)
def test_probe_says_what_is_missing(
    versions: dict[str, str], state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(package: str) -> str:
        if package not in versions:
            raise gpu.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(gpu, "version", found)
    probe = CudaBackend(Driver(H100)).probe()
    assert probe.state == state
    assert words in probe.reason


def test_probing_here_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from mxn.backends.cuda import CudaBackend; from mxn.backends.rocm import RocmBackend\n"
        "for b in (CudaBackend(), RocmBackend()): b.probe(); b.chips()\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    )
    begin_s = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.monotonic() - begin_s < 20


def chip_of(capability: tuple[int, int]) -> Chip:
    (chip,) = CudaBackend(Driver(("GPU-1", "a chip", capability, 0, 0))).chips()
    return chip


def test_old_chips_are_refused_or_served_without_bf16() -> None:
    backend = CudaBackend(Driver())
    assert backend.supports(SPEC, chip_of((6, 1))).verdict == "no"
    old = backend.supports(SPEC, chip_of((7, 5)))
    assert old.verdict == "degraded"
    assert "has no bf16" in old.reasons[0]
    assert old.quantisations == ("fp16", "fp32")
    assert backend.capabilities(chip_of((7, 5))).dtypes == ("fp16", "fp32")
    assert "fp8" not in backend.supports(SPEC, chip_of((8, 0))).quantisations
    assert "fp8" in backend.supports(SPEC, chip_of((9, 0))).quantisations


def test_models_that_cannot_be_served_have_their_reason() -> None:
    backend, chip = CudaBackend(Driver()), chip_of((9, 0))
    assert "recurrent" in backend.supports(replace(SPEC, architecture="mamba"), chip).reasons[0]
    big = backend.supports(replace(SPEC, num_parameters=70_000_000_000), chip)
    assert big.verdict == "no"
    assert "130.4 GiB as bf16, the chip has 80.0" in big.reasons[0]
    assert backend.supports(SPEC, chip).verdict == "yes"


def test_estimates_add_up_to_the_chip() -> None:
    backend, chip = CudaBackend(Driver()), chip_of((9, 0))
    found = backend.estimate(SPEC, LoadSettings(), chip)
    parts = (found.weights, found.kv_cache, found.activations, found.overhead)
    assert found.weights.value == pytest.approx(2 * 8.03e9)
    assert sum(part.value or 0.0 for part in parts) == pytest.approx(chip.memory_bytes)
    assert all(part.provenance is Provenance.ESTIMATED for part in parts)
    assert backend.estimate(SPEC, LoadSettings(kv_bytes=GIB), chip).kv_cache.value == GIB
    int4 = backend.estimate(SPEC, LoadSettings(quantisation="int4"), chip).weights.value
    assert int4 is not None
    assert int4 < 6.5e9
    unknown = backend.estimate(replace(SPEC, num_parameters=None), LoadSettings(), chip)
    assert unknown.weights.provenance is unknown.kv_cache.provenance is Provenance.UNAVAILABLE


def test_a_replica_takes_one_chip() -> None:
    backend, chip = CudaBackend(Driver()), chip_of((9, 0))
    with pytest.raises(ChipError, match="one chip, got 2"):
        backend.load(None, LoadSettings(), [chip, chip], lambda phase, fraction: None)  # type: ignore[arg-type]
