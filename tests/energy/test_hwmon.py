from pathlib import Path

import pytest

from mxn.energy.hwmon import hwmon_reader
from mxn.energy.reader import Loss, NullReader, ReaderKind


def sensor(root: Path, number: int, name: str, **files: str) -> Path:
    folder = root / f"hwmon{number}"
    folder.mkdir(parents=True)
    for file, text in {"name": name, **files}.items():
        (folder / file).write_text(text + "\n")
    return folder


def test_power_sensor_is_sampled_with_its_cap(tmp_path: Path) -> None:
    sensor(tmp_path, 0, "nvme", temp1_input="40000")
    sensor(tmp_path, 1, "amdgpu", power1_average="90000000", power1_cap="200000000")
    reader = hwmon_reader("amdgpu", root=tmp_path)
    reader.close()
    assert (reader.kind, reader.name, reader.power_limit_w) == (ReaderKind.SAMPLED, "hwmon-amdgpu", 200)
    assert "power1_average" in reader.detail


def test_of_several_boards_the_one_at_the_address_is_read(tmp_path: Path) -> None:
    for number, address in enumerate(("0000:c1:00.0", "0000:c2:00.0")):
        device = tmp_path / "devices" / address
        device.mkdir(parents=True)
        folder = sensor(tmp_path, number, "amdgpu", power1_input=str((number + 1) * 10_000_000))
        (folder / "device").symlink_to(device)
    reader = hwmon_reader("amdgpu", pci_address="0000:c2:00.0", root=tmp_path)
    reader.close()
    assert isinstance(hwmon_reader("amdgpu", pci_address="0000:c3:00.0", root=tmp_path), NullReader)
    assert "at 0000:c3:00.0" in hwmon_reader("amdgpu", pci_address="0000:c3:00.0", root=tmp_path).detail
    assert reader.name == "hwmon-amdgpu"


def test_stuck_counter_is_not_trusted_and_rubbish_is_told(tmp_path: Path) -> None:
    folder = sensor(tmp_path, 0, "amd_energy", energy1_input="5", energy1_label="Esocket0", energy2_label="Ecore000")
    (folder / "energy2_input").write_text("7")
    reader = hwmon_reader("amd_energy", labels=("Esocket",), root=tmp_path, settle_s=0.02)
    assert isinstance(reader, NullReader)
    assert reader.loss is Loss.FROZEN
    (folder / "energy1_input").write_text("rubbish")
    damaged = hwmon_reader("amd_energy", labels=("Esocket",), root=tmp_path)
    assert isinstance(damaged, NullReader)
    assert damaged.loss is Loss.NOT_A_NUMBER


def test_moving_counters_of_the_sockets_are_summed_without_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensor(
        tmp_path,
        0,
        "amd_energy",
        energy1_input="0",
        energy2_input="0",
        energy1_label="Esocket0",
        energy2_label="Ecore0",
    )
    count = iter(range(0, 10**9, 500_000))
    real = Path.read_text

    def read_text(self: Path) -> str:
        return str(next(count)) if self.name == "energy1_input" else real(self)

    monkeypatch.setattr(Path, "read_text", read_text)
    reader = hwmon_reader("amd_energy", labels=("Esocket",), root=tmp_path, settle_s=0.2)
    first, second = reader.read(), reader.read()
    reader.close()
    assert reader.kind is ReaderKind.COUNTER
    assert "1 energy counters" in reader.detail
    assert first.energy_j is not None
    assert second.energy_j == pytest.approx(first.energy_j + 0.5)


def test_absent_sensor_is_null(tmp_path: Path) -> None:
    assert "no zenpower sensor" in hwmon_reader("zenpower", root=tmp_path).detail
    sensor(tmp_path, 0, "zenpower")
    assert "neither energy nor power" in hwmon_reader("zenpower", root=tmp_path).detail
