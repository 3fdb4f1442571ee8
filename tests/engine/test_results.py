"""A result that breaks the contract ends the sequence it is about, and no other."""

from __future__ import annotations

import pytest

from mxn.core.batch import SampledToken, StepResult
from mxn.engine.results import faults_of


def token(seq_id: int, token_id: int = 1) -> SampledToken:
    return SampledToken(seq_id=seq_id, token_id=token_id)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (StepResult(tokens=(token(1), token(2))), {}),
        (StepResult(tokens=(token(2),), failed=((1, "NaN"),)), {1: "NaN"}),
        (StepResult(tokens=(token(1), token(2), token(1))), {1: "2 results"}),
        (StepResult(tokens=(token(1), token(2)), failed=((2, "NaN"),)), {2: "2 results"}),
        (StepResult(tokens=(token(1, 10), token(2, -1))), {1: "token 10 of a vocabulary of 10", 2: "token -1"}),
    ],
)
def test_wrong_answers_are_named_by_sequence(result: StepResult, expected: dict[int, str]) -> None:
    found = faults_of(result, [1, 2], vocab_size=10)
    assert found.keys() == expected.keys()
    assert all(words in found[seq_id] for seq_id, words in expected.items())
