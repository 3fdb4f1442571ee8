import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield
    for name in ("cpu", "peer_arms", "bounds"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the ceilings need g++")
@pytest.mark.skipif(sys.platform != "linux", reason="stops processes through /proc")
async def test_comparison_leaves_out_what_does_not_start_and_goes_on_from_its_record(
    model_folder: str, tmp_path: Path
) -> None:
    from cpu import ALL, compare, tables
    from peer_arms import Peer, Setup

    options = ("--backend", "fake")
    sides = [
        Peer(label="mxn in process", worker="mxn", model=model_folder, options=options),
        Peer(label="peer", worker="mxn", model=model_folder, options=options),
        Peer(label="absent", worker="openvino", python=str(tmp_path / "no-python"), model=model_folder),
        Peer(label="broken", worker="mxn", model=model_folder, options=("--backend", "nonsense")),
    ]
    path = tmp_path / "record.json"

    async def run(*names: str) -> list[tuple[str, str]]:
        report = await compare(
            Setup(model=model_folder),
            sides,
            [ALL[name] for name in names],
            repetitions=2,
            limit_s=60,
            seed=0,
            out_path=path,
        )
        assert [text.split(":")[0] for text in report.absent[:2]] == ["absent", "broken"]
        assert not any(record.faults for record in report.records)
        beside, each = tables(report)
        assert [row[0].split(":")[0] for row in beside.rows] == list(
            dict.fromkeys(r.workload.name for r in report.records)
        )
        assert each.columns[2:] == ("peer",)
        return [(r.workload.name, r.subject.label) for r in report.records]

    assert await run("W3") == [("W3", "mxn in process"), ("W3", "peer")]
    first = path.read_bytes()
    assert await run("W3") == [("W3", "mxn in process"), ("W3", "peer")]
    assert path.read_bytes() == first
    assert [name for name, _ in await run("W2c8", "W3")] == ["W2c8", "W2c8", "W3", "W3"]
