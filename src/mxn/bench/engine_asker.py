"""The quality gate's questions to an engine in this process, as `quality.Asker` puts them to a server."""

from __future__ import annotations

from mxn.bench.quality import CONTINUED_TOKENS, Scored, ScoringError
from mxn.core.request import FinishReason, SamplingParams, SequenceOutput, SequenceRequest
from mxn.engine.engine import Engine
from mxn.engine.tokenizer import Tokenizer


class EngineAsker:
    """Asks one thing after another; nothing else may run on the engine meanwhile, nor on the event loop."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    async def continue_text(self, text: str) -> str:
        """What the engine says next, greedily. Raises: ScoringError."""
        outputs = self._ask(text, SamplingParams(max_tokens=CONTINUED_TOKENS, temperature=0.0))
        return self._tokenizer.decode([token_id for output in outputs for token_id in output.token_ids])

    async def score(self, text: str) -> Scored:
        """Log-likelihoods of a text's tokens. Raises: ScoringError."""
        outputs = self._ask(text, SamplingParams(max_tokens=1, temperature=0.0, num_prompt_logprobs=1))
        found = next((output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None), None) or []
        scored = [entry for entry in found[1:] if entry is not None and entry.top]
        if not scored or len(scored) != len(found) - 1:
            raise ScoringError("the engine leaves out log-likelihoods of prompt tokens")
        return Scored(
            logliks=tuple(entry.logprob for entry in scored),
            tops=tuple(self._tokenizer.token_text(entry.top[0][0]) for entry in scored),
        )

    def _ask(self, text: str, sampling: SamplingParams) -> list[SequenceOutput]:
        ids = self._tokenizer.encode(text, add_special_tokens=True)
        self._engine.add(SequenceRequest(seq_id=1, prompt_token_ids=ids, sampling=sampling))
        outputs: list[SequenceOutput] = []
        while self._engine.has_work:
            outputs += self._engine.step()
        if outputs[-1].finish_reason is FinishReason.ERROR:
            raise ScoringError(f"the engine failed: {outputs[-1].error}")
        return outputs

    def close(self) -> None:
        """Nothing to give back: the engine is the arm's."""
