"""Stands in for OpenVINO GenAI where it is not installed: a pipeline of the same shape whose tokens are made up.

Token i of a prompt is (sum of the prompt + i) % 250. Copied under the name `openvino_genai` by the tests.
"""

from __future__ import annotations

import enum
import time
from typing import Any


class GenerationFinishReason(enum.Enum):
    NONE = 0
    STOP = 1
    LENGTH = 2


class GenerationStatus(enum.Enum):
    RUNNING = 0
    FINISHED = 1
    IGNORED = 2
    CANCEL = 3


class SchedulerConfig:
    pass


class GenerationConfig:
    def __init__(self) -> None:
        self.stop_token_ids: set[int] = set()
        self.max_new_tokens = 16
        self.temperature = 1.0

    def validate(self) -> None:
        if self.temperature > 5:
            raise RuntimeError("temperature is out of range")


class Output:
    def __init__(self, token_id: int, reason: GenerationFinishReason) -> None:
        self.generated_ids = [token_id]
        self.finish_reason = reason


class Handle:
    def __init__(self, prompt: list[int], config: GenerationConfig) -> None:
        self.prompt, self.config = prompt, config
        self.count = 0
        self.outputs: list[Output] = []
        self.status = GenerationStatus.IGNORED if len(prompt) > 500 else GenerationStatus.RUNNING

    def step(self) -> None:
        token_id = (sum(self.prompt) + self.count) % 250
        self.count += 1
        reason = GenerationFinishReason.NONE
        if token_id in self.config.stop_token_ids:
            reason = GenerationFinishReason.STOP
        elif self.count == self.config.max_new_tokens:
            reason = GenerationFinishReason.LENGTH
        self.outputs.append(Output(token_id, reason))
        if reason is not GenerationFinishReason.NONE:
            self.status = GenerationStatus.FINISHED

    def can_read(self) -> bool:
        return bool(self.outputs)

    def read(self) -> dict[int, Output]:
        return {0: self.outputs.pop(0)}

    def get_status(self) -> GenerationStatus:
        return self.status

    def cancel(self) -> None:
        self.status = GenerationStatus.CANCEL


class ContinuousBatchingPipeline:
    def __init__(self, folder: str, scheduler: SchedulerConfig, chip: str, properties: dict[str, Any]) -> None:
        self.handles: list[Handle] = []

    def add_request(self, number: int, prompt: Any, config: GenerationConfig) -> Handle:
        self.handles.append(Handle(prompt, config))
        return self.handles[-1]

    def step(self) -> None:
        time.sleep(0.005)
        for handle in self.handles:
            if handle.get_status() is GenerationStatus.RUNNING:
                handle.step()
                if handle.prompt[0] == 249:
                    raise RuntimeError("the scripted pipeline breaks")
