"""What a manifest says of the machine."""

from pathlib import Path

from mxn.bench.environment import drivers


def test_versions_of_loaded_drivers_are_read_and_absent_ones_left_out(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmicrocode\t: 0xb000064\n\nprocessor\t: 1\n")
    said = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\nGCC version:  gcc 12\n"
    (tmp_path / "proc/driver/nvidia/version").write_text(said)
    found = drivers(tmp_path)
    assert (found["microcode"], found["nvidia"]) == ("0xb000064", "570.124.06")
    assert "amdgpu" not in found
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    (tmp_path / "sys/module/amdgpu/version").write_text("6.10.5\n")
    assert drivers(tmp_path)["amdgpu"] == "6.10.5"
    assert list(drivers(tmp_path / "nothing")) == ["kernel"]
