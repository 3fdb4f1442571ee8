import hashlib
from pathlib import Path

import pytest

from mxn.config.datasets import load_dataset
from mxn.errors import ConfigError


def test_azure_trace_gives_lengths_and_seconds_from_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:51.0,0,5\n"
    )
    data = load_dataset(path)
    assert [(a.prompt_tokens, a.output_tokens) for a in data.asks] == [(374, 44), (396, 109)]
    assert data.asks[1].at_s == pytest.approx(4.314579, abs=1e-6)
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.losses == ("1 entries of the dataset have no prompt or no output tokens and were left out",)
    assert len(load_dataset(path, limit=1).asks) == 1


def test_mooncake_trace_keeps_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n')
    (ask,) = load_dataset(path).asks
    assert (ask.prompt_tokens, ask.output_tokens, ask.block_ids) == (6955, 52, (46, 47))
    assert ask.at_s == pytest.approx(27.482)


def test_empty_prompts_are_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hello", "max_tokens": 4}\n{"prompt": "  "}\n\n{"prompt": ""}\n')
    data = load_dataset(path)
    assert [a.text for a in data.asks] == ["Hello"]
    assert data.losses[0].startswith("2 entries")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"prompt": ""}\n', "nothing to ask"),
        ("a.jsonl", "not json\n", "line 1"),
        ("a.jsonl", '{"question": "x"}\n', "expected a"),
        ("a.jsonl", '{"input_length": "many"}\n', "line 1"),
        ("a.csv", "time,tokens\n1,2\n", "Azure LLM trace"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
    ],
)
def test_file_that_is_no_dataset_is_refused_with_its_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_dataset(tmp_path / name)


def test_absent_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_dataset(Path("/nowhere/trace.csv"))
