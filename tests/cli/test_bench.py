"""`mxn bench` and `mxn report` as a user runs them, on the fake backend behind real HTTP."""

import json
from pathlib import Path

import pytest

from .conftest import Mxn, Serving

LOAD = ("--requests", "6", "--input", "12", "--output", "4", "-r", "2", "--idle-s", "0.2")


def test_sweep_writes_a_valid_record_and_a_page(mxn: Mxn, server: Serving, model_folder: str, tmp_path: Path) -> None:
    path, html = tmp_path / "r.json", tmp_path / "r.html"
    ran = mxn(
        *("bench", "--url", f"a={server.url}", "--tokenizer", model_folder, "--concurrency", "1,3", *LOAD),
        *("--slo", "ttft=5000", "--price", "2", "--json", str(path), "--html", str(html)),
    )
    assert ran.code == 0, ran.err
    one, three = json.loads(path.read_text())["records"]
    assert [one["workload"]["name"], three["workload"]["name"]] == ["c1", "c3"]
    assert three["metrics"]["goodput_per_s"]["median"] > 0
    assert len(one["runs"]) == 2
    assert one["price_per_hour"] == 2
    assert html.read_text().startswith("<!doctype html>")
    checked = mxn("bench", "validate", str(path))
    assert checked.code == 0, checked.err
    assert "2 records" in checked.out
    compared = mxn("bench", "compare", str(path), str(path))
    assert compared.code == 0, compared.err
    assert "no difference shown" in " ".join(compared.out.split())


def test_chats_are_measured_and_the_record_says_how_the_server_was_set(
    mxn: Mxn, server: Serving, model_folder: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    common = ("bench", "--url", f"a={server.url}", "--tokenizer", model_folder, *LOAD, "--json", str(path))
    ran = mxn(*common, "--api", "chat", "--concurrency", "2", "--turns", "2")
    assert ran.code == 0, ran.err
    report = json.loads(path.read_text())
    (record,) = report["records"]
    assert (record["workload"]["name"], record["workload"]["api"]) == ("c2-chat", "chat")
    assert record["num_output_tokens"] == 2 * 6 * 2 * 4
    assert record["num_prompt_tokens"] > 2 * 6 * 2 * 12  # the template's tokens and the history come on top
    assert record["metrics"]["queue_mean_ms"]["median"] >= 0
    assert "prefix_cache=True" in record["subject"]["config"]
    assert "kernel" in report["manifest"]["drivers"]


def test_open_loop_and_conversations_run(mxn: Mxn, server: Serving, model_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    common = ("bench", "--url", f"a={server.url}", "--tokenizer", model_folder, *LOAD, "--json", str(path))
    assert mxn(*common, "--rate", "40", "--arrival", "gamma", "--burstiness", "0.5", "--spread", "0.5").code == 0
    (record,) = json.loads(path.read_text())["records"]
    assert record["workload"]["arrival"] == "gamma"
    assert "lateness_p99_ms" in record["metrics"]
    assert mxn(*common, "--concurrency", "2", "--turns", "3").code == 0
    (record,) = json.loads(path.read_text())["records"]
    assert record["num_output_tokens"] == 2 * 6 * 3 * 4


def test_trace_is_replayed_and_what_was_left_out_is_in_the_record(
    mxn: Mxn, server: Serving, model_folder: str, tmp_path: Path
) -> None:
    path, trace = tmp_path / "r.json", tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:15:4{i}.6805900,{10 + i},{1 + i}\n" for i in range(3))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows + "2023-11-16 18:15:50.0000000,0,0\n")
    ran = mxn(
        *("bench", "--url", f"a={server.url}", "--tokenizer", model_folder, "-r", "1", "--idle-s", "0"),
        *("--dataset", str(trace), "--arrival", "trace", "--rate", "20", "--json", str(path)),
    )
    assert ran.code == 0, ran.err
    (record,) = json.loads(path.read_text())["records"]
    assert record["num_prompt_tokens"] == 33
    assert record["num_output_tokens"] == 6
    assert "1 entries of the dataset" in record["warnings"][0]
    assert len(record["workload"]["dataset_sha256"]) == 64


def test_matrix_skips_with_reasons_resumes_and_ends_in_a_page(mxn: Mxn, model_folder: str, tmp_path: Path) -> None:
    html = tmp_path / "m.html"
    args = (
        *("bench", "--matrix", "--models", f"{model_folder},no-such-model", "--backend", "fake"),
        *("--concurrency", "2", *LOAD, "--out", str(tmp_path / "cells"), "--html", str(html)),
    )
    first = mxn(*args)
    assert first.code == 0, first.err
    assert "1 of 1" in first.err
    assert "taken from" not in first.err
    assert "no-such-model" in first.out
    (cell,) = (tmp_path / "cells").glob("*.json")
    second = mxn(*args)
    assert second.code == 0, second.err
    assert "taken from" in second.err
    assert "simulated" in html.read_text()
    earlier = json.loads(cell.read_text())
    earlier["manifest"]["commit"] = "0123456789ab"
    cell.write_text(json.dumps(earlier))
    mixed = tmp_path / "mixed.json"
    mxn(*args, "--json", str(mixed))
    assert "at commit 0123456789ab" in mixed.read_text()
    third = mxn(*args, "--seed", "5")
    assert "taken from" not in third.err, "a cell of other settings is not the same cell"
    assert cell.exists()


def test_matrix_whose_cells_cannot_be_written_still_tells_what_it_measured(
    mxn: Mxn, model_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "cells").write_text("a file where the folder should be")
    ran = mxn(
        *("bench", "--matrix", "--models", model_folder, "--backend", "fake", "--concurrency", "2", *LOAD),
        *("--out", str(tmp_path / "cells")),
    )
    assert ran.code == 0, ran.err
    assert "not kept for a second run" in ran.err
    assert "cannot be written" in ran.err
    assert "simulated" in ran.out


def test_outside_meter_is_read_and_its_scope_kept(mxn: Mxn, server: Serving, model_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    ran = mxn(
        *("bench", "--url", f"a={server.url}", "--tokenizer", model_folder, "--rate", "4", "--requests", "24"),
        *("--input", "8", "--output", "2", "-r", "1", "--idle-s", "0", "--json", str(path)),
        *("--meter", "command:echo 250", "--meter-scope", "wall"),
    )
    assert ran.code == 0, ran.err
    (record,) = json.loads(path.read_text())["records"]
    assert record["scope"] == "wall"
    assert record["mean_watts"]["value"] == pytest.approx(250)
    assert record["mean_watts"]["provenance"] == "measured"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--concurrency", "2", "--rate", "2"), "give one of them"),
        (("--rate", "fast"), "expected numbers"),
        (("--arrival", "trace", "--rate", "1"), "--dataset"),
        (("--arrival", "tidal", "--rate", "1"), "available: poisson"),
        (("--dataset", "/nowhere.csv"), "cannot be read"),
        (("--slo", "speed=1"), "expected ttft=MS"),
        (("--api", "responses"), "available: completions, chat"),
        (("--meter", "pdu"), "not a meter"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_started(mxn: Mxn, args: tuple[str, ...], words: str) -> None:
    ran = mxn("bench", "--url", "http://127.0.0.1:1/v1", *args)
    assert ran.code == 2
    assert words in ran.err


def test_damaged_and_edited_records_are_refused(mxn: Mxn, server: Serving, model_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    mxn(
        *("bench", "--url", f"a={server.url}", "--tokenizer", model_folder, "--concurrency", "1", *LOAD),
        *("--meter", "command:echo 250", "--json", str(path)),
    )
    report = json.loads(path.read_text())
    report["records"][0]["values"] = [1.0]
    path.write_text(json.dumps(report))
    edited = mxn("bench", "validate", str(path))
    assert edited.code == 1
    assert "2 repetitions, 1 values" in edited.err
    path.write_text('{"records": []}')
    assert mxn("bench", "validate", str(path)).code == 2
    assert mxn("report", str(path)).code == 2


@pytest.mark.torch
@pytest.mark.slow
def test_all_backends_that_are_here_stand_in_one_matrix(mxn: Mxn, model_folder: str, tmp_path: Path) -> None:
    saved = tmp_path / "all.json"
    ran = mxn("bench", "--model", model_folder, "--backend", "all", *LOAD, "--json", str(saved), timeout=200)
    skipped = {one["backend"]: one["reason"] for one in json.loads(saved.read_text())["skipped"]}
    assert "absent: no llama-server on PATH" in skipped["llama.cpp"]
    assert "MXN_VLLM_PYTHON" in skipped["vllm"]
    assert "needs one of two options: command" in ran.err, "the reason of a skipped cell is told where it happened"
    assert "server" in skipped
    assert "fake" not in ran.out
