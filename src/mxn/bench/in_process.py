"""An engine in this process as the subject of a benchmark: the same workloads without HTTP or a second process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from mxn.backends.base import Backend, Embedder, LoadProgress
from mxn.bench.client import RequestResult
from mxn.bench.engine_asker import EngineAsker
from mxn.bench.queue import QueueTotals
from mxn.bench.records import Subject, config_of
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.core.request import FinishReason, SamplingParams, SequenceRequest
from mxn.energy.reader import PowerReader
from mxn.engine.engine import Engine, EngineSettings
from mxn.engine.tokenizer import Tokenizer
from mxn.errors import ConfigError


@dataclass(slots=True)
class _Running:
    index: int
    start_s: float
    num_prompt_tokens: int
    times_s: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    num_cached_tokens: int = 0


class InProcessArm:
    """Drives an `Engine` step by step with a closed loop of sequences."""

    def __init__(
        self,
        engine: Engine,
        subject: Subject,
        *,
        tokenizer: Tokenizer,
        readers: tuple[PowerReader, ...],
    ) -> None:
        self.subject = subject
        self.readers = readers
        self._engine = engine
        self._tokenizer = tokenizer
        self._next_id = 1

    @classmethod
    def load(
        cls,
        backend: Backend,
        chip: Chip,
        model: Model,
        settings: LoadSettings,
        *,
        label: str,
        progress: LoadProgress = lambda phase, fraction: None,
    ) -> InProcessArm:
        """Loads the model through the backend in this process (which then holds whatever the backend imports)."""
        executor = backend.load(model, settings, [chip], progress)
        if isinstance(executor, Embedder):
            raise ConfigError(f"{model.name} makes vectors; the workloads are for models that generate")
        executor.warm_up()
        engine = Engine(
            executor,
            EngineSettings(
                max_num_seqs=settings.max_num_seqs,
                max_step_tokens=settings.max_step_tokens,
                prefix_cache=settings.prefix_cache,
                fingerprint=model.revision,
                has_mixed_steps=backend.capabilities(chip).has_mixed_steps,
            ),
        )
        info = executor.info
        subject = Subject(
            label=label,
            model=model.name,
            interface="in process",
            backend=backend.name,
            attention=info.attention,
            quantisation=info.quantisation,
            program=info.program,
            threads=info.threads,
            notes=info.notes,
            config=config_of(asdict(settings)),
        )
        return cls(engine, subject, tokenizer=Tokenizer.load(model.folder), readers=(backend.power(chip),))

    async def run(self, prompts: Sequence[str | list[int]], max_tokens: int, concurrency: int) -> list[RequestResult]:
        """All prompts, as text or token ids, `concurrency` sequences at a time.

        Blocks the event loop: nothing else runs in this process.
        """
        waiting = list(enumerate(prompts))[::-1]
        running: dict[int, _Running] = {}
        results: dict[int, RequestResult] = {}
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        while waiting or running:
            while waiting and len(running) < concurrency:
                index, prompt = waiting.pop()
                start_s = time.monotonic()
                ids = self._tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
                running[self._next_id] = _Running(index, start_s, len(ids))
                self._engine.add(SequenceRequest(seq_id=self._next_id, prompt_token_ids=ids, sampling=sampling))
                self._next_id += 1
            outputs = self._engine.step()
            now_s = time.monotonic()
            for output in outputs:
                sequence = running[output.seq_id]
                if output.token_ids:
                    sequence.times_s.append(now_s)
                    sequence.num_output_tokens += len(output.token_ids)
                    sequence.num_cached_tokens = output.num_cached_tokens
                if output.finish_reason is not None:
                    del running[output.seq_id]
                    is_good = output.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
                    results[sequence.index] = RequestResult(
                        start_s=sequence.start_s,
                        end_s=now_s,
                        chunk_times_s=tuple(sequence.times_s),
                        num_output_tokens=sequence.num_output_tokens,
                        num_prompt_tokens=sequence.num_prompt_tokens,
                        num_cached_tokens=sequence.num_cached_tokens,
                        error=None if is_good else output.error or str(output.finish_reason),
                    )
        return [results[i] for i in range(len(prompts))]

    async def queue(self) -> QueueTotals:
        return QueueTotals(num_started=self._engine.stats.num_started, seconds=self._engine.stats.queue_s)

    def asker(self) -> EngineAsker:
        return EngineAsker(self._engine, self._tokenizer)

    def close(self) -> None:
        """Gives the model's memory back."""
        self._engine.executor.close()
        for reader in self.readers:
            reader.close()
