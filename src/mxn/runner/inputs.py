"""Turns a step batch into the tensors of one flat ragged batch. On the path of every step, so numpy throughout."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from mxn.attention.base import AttentionMetadata
from mxn.core.batch import SequenceStep, StepBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """One step as tensors. T tokens, R logit rows.

    token_ids, positions: int64, (1, T).
    logit_rows: int64, (R,): flat indices of the tokens whose logits are needed, in batch order.
    row_ranges: per sequence, first and last + 1 of its logit rows; empty ranges for those that need none.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    logit_rows: torch.Tensor
    row_ranges: tuple[tuple[int, int], ...]
    attention: AttentionMetadata


def build_inputs(batch: StepBatch, block_size: int, device: torch.device) -> StepInputs:
    """The tensors of a step. Costs 30 us for 1 and 120 us for 64 sequences of 1,024 tokens that decode."""
    sequences = batch.sequences
    num_seqs = len(sequences)
    lengths = np.fromiter((len(s.token_ids) for s in sequences), np.int32, num_seqs)
    starts = np.fromiter((s.start for s in sequences), np.int32, num_seqs)
    query_starts = np.zeros(num_seqs + 1, np.int32)
    np.cumsum(lengths, out=query_starts[1:])
    num_tokens = int(query_starts[-1])
    max_query_len = int(lengths.max())

    token_ids = np.fromiter(chain.from_iterable(s.token_ids for s in sequences), np.int64, num_tokens)
    block_table = _block_table(sequences)
    if max_query_len == 1:
        owners, positions = np.arange(num_seqs), starts
    else:
        owners = np.repeat(np.arange(num_seqs), lengths)
        positions = np.arange(num_tokens, dtype=np.int32) - np.repeat(query_starts[:-1] - starts, lengths)
    slots = block_table[owners, positions // block_size] * np.int32(block_size) + positions % block_size

    logit_rows, row_ranges = _logit_rows(sequences, query_starts)
    attention = AttentionMetadata(
        query_starts=torch.from_numpy(query_starts).to(device),
        context_lens=torch.from_numpy(starts + lengths).to(device),
        block_table=torch.from_numpy(block_table).to(device),
        slot_mapping=torch.from_numpy(slots).to(device),
        max_query_len=max_query_len,
    )
    return StepInputs(
        token_ids=torch.from_numpy(token_ids).to(device).unsqueeze(0),
        positions=torch.from_numpy(positions.astype(np.int64)).to(device).unsqueeze(0),
        logit_rows=torch.from_numpy(logit_rows).to(device),
        row_ranges=row_ranges,
        attention=attention,
    )


def _block_table(sequences: Sequence[SequenceStep]) -> np.ndarray:
    counts = [len(s.block_ids) for s in sequences]
    widest = max(counts)
    tables = [s.block_ids for s in sequences]
    if all(type(table) is array and table.typecode == "i" for table in tables):  # 64 x 512 blocks: 60 us, not 1.2 ms
        flat = np.frombuffer(b"".join(tables), np.int32)
    else:
        flat = np.fromiter(chain.from_iterable(tables), np.int32, sum(counts))
    if min(counts) == widest:
        return flat.reshape(len(counts), widest).copy() if not flat.flags.writeable else flat.reshape(-1, widest)
    table = np.zeros((len(counts), widest), np.int32)
    table[np.arange(widest) < np.asarray(counts)[:, None]] = flat
    return table


def _logit_rows(
    sequences: Sequence[SequenceStep], query_starts: np.ndarray
) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """The last token of sequences that are sampled; every token of those that want prompt logprobs."""
    rows: list[int] = []
    ranges: list[tuple[int, int]] = []
    for sequence, start, end in zip(sequences, query_starts[:-1].tolist(), query_starts[1:].tolist(), strict=True):
        first = len(rows)
        if sequence.sampling.num_prompt_logprobs is not None and sequence.start < sequence.num_prompt_tokens:
            rows.extend(range(start, end))
        elif sequence.is_sampled:
            rows.append(end - 1)
        ranges.append((first, len(rows)))
    return np.array(rows, np.int64), tuple(ranges)
