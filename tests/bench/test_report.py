from dataclasses import replace
from io import StringIO

from rich.console import Console

from mxn.bench.metrics import Spread
from mxn.bench.records import Skipped
from mxn.bench.report import cells, compared_groups, comparison, grids_of, matrix, to_markdown, to_rich
from mxn.bench.workloads import WORKLOADS
from mxn.core.quantity import Provenance

from .made import record, report, subject


def test_cell_shows_the_fastest_batch_that_is_a_result() -> None:
    slow = record((100.0, 100.0), workload=WORKLOADS["W2c8"])
    fast = record((400.0, 400.0), workload=WORKLOADS["W2c32"])
    wrong = record((900.0, 900.0), workload=replace(WORKLOADS["W2c32"], name="c64"), faults=("a request failed",))
    (cell,) = cells([slow, fast, wrong])
    assert cell.main is fast


def test_one_stream_of_a_sweep_stands_in_its_own_column() -> None:
    single = replace(WORKLOADS["W2c8"], name="c1", concurrency=1)
    one = record((50.0,), workload=single)
    one = replace(one, metrics={**one.metrics, "decode_tokens_per_s": Spread.of([61.0])})
    (cell,) = cells([one, record((200.0,))])
    assert cell.one is one
    assert cell.main is not one
    assert "61.0" in matrix([one, record((200.0,))]).rows[0]
    (alone,) = cells([one])
    assert alone.main is one


def test_same_label_on_two_models_is_two_cells() -> None:
    both = [record(of=subject("cpu int8", model="a")), record(of=subject("cpu int8", model="b"))]
    assert [row[0] for row in matrix(both).rows] == ["a", "b"]


def test_ratio_of_arms_that_took_turns_has_an_interval_and_says_when_nothing_is_shown() -> None:
    base = record((100.0, 120.0, 80.0))
    twice = record((200.0, 242.0, 159.0), of=subject("twice"))
    same = record((101.0, 119.0, 80.5), of=subject("same"))
    first, second, third = comparison([base, twice, same]).rows
    assert first[2:] == ("mxn", "100 [80.0, 120]", "-")
    assert "x2.00 [" in second[4]
    assert "no difference shown" not in second[4]
    assert "no difference shown" in third[4]


def test_ratio_of_arms_that_took_no_turns_has_the_wider_interval_of_two_means_and_says_so() -> None:
    both = [record((100.0, 120.0, 80.0)), record((110.0, 132.5, 88.0), of=subject("other"))]
    assert "no difference shown" not in comparison(both).rows[1][4]
    apart = comparison(both, took_turns=False)
    assert "no difference shown" in apart.rows[1][4]
    assert any("not in turns" in note for note in apart.notes)


def test_rows_of_one_model_on_different_meters_are_warned_of() -> None:
    grid = matrix([record(), record(of=subject("b"), provenance=Provenance.ESTIMATED)])
    assert any("Not like for like: power is measured" in note for note in grid.notes)
    other_model = matrix([record(), record(of=subject("b", model="b"), provenance=Provenance.ESTIMATED)])
    assert not any("Not like for like" in note for note in other_model.notes)


def test_record_with_a_fault_is_marked_in_every_table() -> None:
    faulty = record(faults=("3 of 32 requests: the server died",))
    text = to_markdown(matrix([faulty])) + to_markdown(comparison([faulty]))
    assert "NO RESULT" in text
    assert "FAULT" in text
    assert "the server died" in text


def test_sides_of_one_run_are_compared_whatever_they_call_the_model() -> None:
    both = (record(), record((200.0, 220.0, 180.0), of=subject("peer", model="m")))
    in_turns = report(*both)
    ((title, group),) = compared_groups([in_turns])
    assert title == "tiny, m"
    grid = comparison(group)
    assert "x2.00" in grid.rows[1][4]
    assert any("The sides call their models tiny, m" in note for note in grid.notes)
    assert [name for name, _ in compared_groups([replace(in_turns, took_turns=False)])] == ["tiny", "m"]
    assert [name for name, _ in compared_groups([in_turns, in_turns])] == ["tiny", "m"]


def test_reasons_of_skipped_cells_are_whole_on_a_narrow_terminal() -> None:
    reason = "the server backend needs one of two options: command, with {port} where the port goes, or url"
    skipped = Skipped(model="a-model", backend="server", quantisation="auto", reason=reason)
    console = Console(width=80, file=StringIO())
    console.print(to_rich(grids_of(replace(report(record()), skipped=(skipped,)))[-1]))
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "a-model server auto" in text
    assert all(word in text for word in reason.split())


def test_short_runs_are_named_in_one_line() -> None:
    short = [
        record(of=subject(name), warnings=(f"no steady part: it is {i} s of {i} s",)) for i, name in enumerate("ab")
    ]
    assert "all: too short for a steady part." in comparison(short).notes
    assert "a, W2c8: too short for a steady part." in comparison([short[0], record(of=subject("b"))]).notes
