"""Chips of a node that replicas of a Ray cluster take by locks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mxn.errors import BackendError
from mxn.fleet.launchers.ray import lease
from mxn.fleet.launchers.ray.lease import ChipLease

CHIPS = ["chip-a", "chip-b", "chip-c"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(lease, "_WAIT_S", 0.0)


def test_no_two_replicas_hold_the_same_whole_chip_and_ends_give_them_back() -> None:
    first, second = ChipLease.take("n", CHIPS, 1), ChipLease.take("n", CHIPS, 2)
    assert (first.uids, second.uids) == (("chip-a",), ("chip-b", "chip-c"))
    with pytest.raises(BackendError, match="only 0 are free"):
        ChipLease.take("n", CHIPS, 1)
    second.release()
    assert ChipLease.take("n", CHIPS, 2).uids == ("chip-b", "chip-c")


def test_parts_of_a_chip_fill_it_and_leave_no_room_for_a_whole_one() -> None:
    leases = [ChipLease.take("n", CHIPS[:1], 0.25) for _ in range(4)]
    assert {one.uids for one in leases} == {("chip-a",)}
    with pytest.raises(BackendError):
        ChipLease.take("n", CHIPS[:1], 0.125)
    leases[0].release()
    with pytest.raises(BackendError):
        ChipLease.take("n", CHIPS[:1], 1)
    ChipLease.take("n", CHIPS[:1], 0.25)


def test_nodes_of_one_host_do_not_share_chips() -> None:
    held = ChipLease.take("one", CHIPS[:1], 1)
    assert ChipLease.take("two", CHIPS[:1], 1).uids == held.uids


def test_chips_of_a_killed_replica_are_free(tmp_path: Path) -> None:
    program = (
        "import sys, tempfile, time; tempfile.tempdir = sys.argv[1]\n"
        "from mxn.fleet.launchers.ray.lease import ChipLease\n"
        "held = ChipLease.take('n', ['chip-a'], 1); print(held.uids, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        with pytest.raises(BackendError):
            ChipLease.take("n", CHIPS[:1], 1)
        other.kill()
        other.wait()
        assert ChipLease.take("n", CHIPS[:1], 1).uids == ("chip-a",)
