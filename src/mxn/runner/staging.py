"""Arrays that are filled on the host and sent to the chip in one copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mxn.runner.accelerator import Accelerator

_ALIGNMENT = 16  # bytes: the widest load of a thread


class Staging:
    """Named arrays side by side in host memory, and tensors of the same names on the chip.

    host: numpy arrays to fill. device: the chip's tensors, whose contents change with `send`; their addresses never do.
    """

    def __init__(self, accelerator: Accelerator, parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Args: parts: name to dtype and shape. The last one is sent as far as it is filled, the others whole."""
        self._ends: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, shape) in parts.items():
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + dtype.itemsize * int(np.prod(shape))
            self._ends[name] = (start, end)
        self._host = accelerator.host_tensor(end)
        self._device = torch.zeros(end, dtype=torch.uint8, device=accelerator.device)

        def views(memory: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: memory[start:stop].view(parts[name][0]).view(parts[name][1])
                for name, (start, stop) in self._ends.items()
            }

        self.host = {name: tensor.numpy() for name, tensor in views(self._host).items()}
        self.device = views(self._device)
        self._last = list(parts)[-1]

    def send(self, rows: int) -> None:
        """One copy: all parts, of the last one its first `rows` rows. The host's must not change until it is done."""
        start, _ = self._ends[self._last]
        end = start + rows * self.host[self._last].strides[0]
        self._device[:end].copy_(self._host[:end], non_blocking=True)
