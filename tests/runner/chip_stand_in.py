"""A CPU in an accelerator's place, at the very edge: what would be captured is called again instead."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mxn.runner.accelerator import Captured


class HostAccelerator:
    """Counts captures and waits. gate: called before each capture; it may block or raise."""

    def __init__(self, memory_bytes: int = 2**30) -> None:
        self.device = torch.device("cpu")
        self.memory_bytes = memory_bytes
        self.num_captures = 0
        self.num_waits = 0
        self.gate: Callable[[], None] = lambda: None

    def select(self) -> None: ...

    def free_bytes(self) -> int:
        return self.memory_bytes

    def total_bytes(self) -> int:
        return self.memory_bytes

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()
        return 2**20

    def host_tensor(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def capture(self, run: Callable[[], torch.Tensor], warm_up: Callable[[], torch.Tensor]) -> Captured:
        self.gate()
        with torch.inference_mode():
            output = warm_up().clone()
        self.num_captures += 1

        def replay() -> None:
            with torch.inference_mode():
                output.copy_(run())

        return Captured(replay, output)

    def mark(self) -> Callable[[], None]:
        return self._wait

    def _wait(self) -> None:
        self.num_waits += 1

    def release(self) -> None: ...
