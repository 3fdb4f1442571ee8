from collections.abc import Callable
from pathlib import Path

import pytest

from mxn.bench.workloads import WORKLOADS, PromptMaker, parse_workloads
from mxn.errors import ConfigError, ModelError


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_have_exactly_the_asked_tokens(
    tmp_path: Path, name: str, with_bos: bool, write_word_tokenizer: Callable[..., Path]
) -> None:
    maker = PromptMaker(write_word_tokenizer(tmp_path, with_bos=with_bos), seed=0)
    workload = WORKLOADS[name]
    prompts = maker.make(workload)
    ids = [maker.encode(prompt) for prompt in prompts]
    assert [len(i) for i in ids] == [workload.prompt_tokens] * workload.num_requests
    assert all(i[: workload.shared_tokens] == ids[0][: workload.shared_tokens] for i in ids)
    assert len(set(prompts)) == len(prompts)


def test_each_repetition_gets_a_fresh_prefix_and_the_same_seed_the_same_prompts(
    tmp_path: Path, write_word_tokenizer: Callable[..., Path]
) -> None:
    folder = write_word_tokenizer(tmp_path)
    maker = PromptMaker(folder, seed=0)
    first, second = maker.make(WORKLOADS["W4"]), maker.make(WORKLOADS["W4"])
    assert first[0][:100] != second[0][:100]
    assert PromptMaker(folder, seed=0).make(WORKLOADS["W4"]) == first


def test_missing_tokenizer_says_which_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json in"):
        PromptMaker(tmp_path, seed=0)


def test_names_and_sets_of_workloads() -> None:
    assert [w.name for w in parse_workloads("W1, W2c8")] == ["W1", "W2c8"]
    assert [w.name for w in parse_workloads("quick")] == ["quick1", "quick8"]
    for text in ("W9", "", "W1,W9"):
        with pytest.raises(ConfigError, match=r"available: W1"):
            parse_workloads(text)
