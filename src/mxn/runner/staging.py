"""Arrays that are filled on the host and sent to the chip in one copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mxn.runner.accelerator import Accelerator

_ALIGNMENT = 16  # bytes: the widest load of a thread


class Staging:
    """Named arrays side by side in host memory, and tensors of the same names on the chip.

    device: the chip's tensors, whose contents change with `send`; their addresses never do.
    """

    def __init__(self, accelerator: Accelerator, parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Args: parts: name to dtype and shape. The last one is sent as far as it is filled, the others whole."""
        self._ends: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, shape) in parts.items():
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + dtype.itemsize * int(np.prod(shape))
            self._ends[name] = (start, end)
        self._hosts = [accelerator.host_tensor(end) for _ in range(2)]
        self._device = torch.zeros(end, dtype=torch.uint8, device=accelerator.device)

        def views(memory: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: memory[start:stop].view(parts[name][0]).view(parts[name][1])
                for name, (start, stop) in self._ends.items()
            }

        self._arrays = [{name: tensor.numpy() for name, tensor in views(host).items()} for host in self._hosts]
        self.device = views(self._device)
        self._last = list(parts)[-1]
        self._num_sent = 0

    @property
    def host(self) -> Mapping[str, np.ndarray]:
        """Arrays to fill for the next `send`. They hold anything; those of the one before may still be on their way."""
        return self._arrays[self._num_sent % 2]

    def send(self, rows: int) -> None:
        """One copy: all parts, of the last one its first `rows` rows. Done before the second send after it."""
        start, _ = self._ends[self._last]
        end = start + rows * self.host[self._last].strides[0]
        self._device[:end].copy_(self._hosts[self._num_sent % 2][:end], non_blocking=True)
        self._num_sent += 1
