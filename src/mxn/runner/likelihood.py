"""How likely a model finds a text that ships with mxn: what says whether 4-bit weights are good enough."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from mxn.attention.reference import ReferenceAttention
from mxn.core.batch import SequenceStep, StepBatch
from mxn.core.request import SamplingParams
from mxn.errors import ModelError
from mxn.runner.attention_hook import discover_layers
from mxn.runner.forward import ModuleForward
from mxn.runner.inputs import build_inputs
from mxn.store.spec import layer_windows

SAMPLE = Path(__file__).parent / "sample.txt"
"""Prose, facts, code and a question, written for this: about 500 tokens."""

_MAX_TOKENS = 512
_CHUNK = 128
_BLOCK_SIZE = 16


def sample_ids(folder: str, max_context: int) -> list[int]:
    """The sample in a model's own tokens, as many as its context holds. Raises: ModelError without a tokenizer."""
    file = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"{file}: the sample text cannot be turned into tokens: {error}") from error
    return list(tokenizer.encode(SAMPLE.read_text(encoding="utf-8")).ids[: min(max_context, _MAX_TOKENS)])


@torch.inference_mode()
def mean_nll(model: PreTrainedModel, ids: list[int]) -> float:
    """Mean negative log-likelihood of each token but the first, by the model's modules over reference attention."""
    windows = layer_windows(model.config.to_dict())
    num_blocks = -(-len(ids) // _BLOCK_SIZE)
    attention = ReferenceAttention(discover_layers(model, windows), num_blocks, _BLOCK_SIZE)
    forward, total = ModuleForward(model, attention, windows), 0.0
    for start in range(0, len(ids) - 1, _CHUNK):
        chunk = ids[start : min(start + _CHUNK, len(ids) - 1)]
        step = SequenceStep(
            seq_id=0,
            token_ids=chunk,
            start=start,
            block_ids=range(num_blocks),
            is_sampled=True,
            sampling=SamplingParams(num_prompt_logprobs=0),
            seed=0,
            num_prompt_tokens=start + len(chunk),
            num_output_tokens=0,
        )
        inputs = build_inputs(StepBatch(step_id=0, sequences=(step,)), _BLOCK_SIZE, torch.device("cpu"))
        wanted = torch.tensor(ids[start + 1 : start + 1 + len(chunk)])
        total -= float(forward(inputs).float().log_softmax(-1).gather(1, wanted[:, None]).double().sum())
    return total / (len(ids) - 1)
