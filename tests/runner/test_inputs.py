"""Tensors of a step: positions, slots, block tables and the rows whose logits are needed."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.core.batch import SequenceStep, StepBatch  # noqa: E402
from mxn.core.request import SamplingParams  # noqa: E402
from mxn.runner.inputs import build_inputs  # noqa: E402

pytestmark = pytest.mark.torch


def make_step(token_ids: Sequence[int], start: int, blocks: Sequence[int], **changes: Any) -> SequenceStep:
    facts: dict[str, Any] = {
        "seq_id": 0,
        "token_ids": token_ids,
        "start": start,
        "block_ids": blocks,
        "is_sampled": True,
        "sampling": SamplingParams(),
        "seed": 0,
        "num_prompt_tokens": start + len(token_ids),
        "num_output_tokens": 0,
    }
    return SequenceStep(**(facts | changes))


def build(*steps: SequenceStep) -> Any:
    return build_inputs(StepBatch(step_id=0, sequences=steps), 4, torch.device("cpu"))


def test_mixed_batch_is_laid_out_flat() -> None:
    inputs = build(
        make_step([11, 12, 13], 3, [7, 2]),
        make_step([21], 8, [1, 0, 5]),
        make_step([31, 32], 0, [9], is_sampled=False),
    )
    assert inputs.token_ids.tolist() == [[11, 12, 13, 21, 31, 32]]
    assert inputs.positions.tolist() == [[3, 4, 5, 8, 0, 1]]
    meta = inputs.attention
    assert meta.query_starts.tolist() == [0, 3, 4, 6]
    assert meta.context_lens.tolist() == [6, 9, 2]
    assert meta.block_table.tolist() == [[7, 2, 0], [1, 0, 5], [9, 0, 0]]
    assert meta.slot_mapping.tolist() == [7 * 4 + 3, 2 * 4, 2 * 4 + 1, 5 * 4, 9 * 4, 9 * 4 + 1]
    assert meta.max_query_len == 3
    assert inputs.logit_rows.tolist() == [2, 3]
    assert inputs.row_ranges == ((0, 1), (1, 2), (2, 2))
    for tensor in (meta.query_starts, meta.context_lens, meta.block_table, meta.slot_mapping):
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()


def test_decode_batch_has_one_row_each() -> None:
    inputs = build(make_step([1], 4, [3, 6]), make_step([2], 0, [5]))
    assert inputs.positions.tolist() == [[4, 0]]
    assert inputs.attention.slot_mapping.tolist() == [24, 20]
    assert inputs.attention.max_query_len == 1
    assert inputs.logit_rows.tolist() == [0, 1]


def test_prompt_logprobs_need_every_row_of_the_prompt() -> None:
    wants = SamplingParams(num_prompt_logprobs=2)
    inputs = build(make_step([1], 4, [3, 6]), make_step([1, 2, 3], 0, [5], sampling=wants, is_sampled=False))
    assert inputs.logit_rows.tolist() == [0, 1, 2, 3]
    assert inputs.row_ranges == ((0, 1), (1, 4))


@pytest.mark.parametrize("kind", [list, tuple, lambda ids: array("i", ids)])
def test_block_tables_of_any_kind_give_the_same_writable_tensor(kind: Any) -> None:
    even = build(make_step([1], 4, kind([3, 6])), make_step([1], 5, kind([2, 1])))
    assert even.attention.block_table.tolist() == [[3, 6], [2, 1]]
    uneven = build(make_step([1], 4, kind([3, 6])), make_step([1], 1, kind([2])))
    assert uneven.attention.block_table.tolist() == [[3, 6], [2, 0]]
    even.attention.block_table[0, 0] = 1
