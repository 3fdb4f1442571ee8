"""Tokens as steps draw them on the chip: kept there for the step that follows, and brought to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mxn.core.batch import PENDING, SequenceStep
from mxn.runner.accelerator import Accelerator

_IN_FLIGHT = 2
"""Steps that are submitted and not answered, at most: what one of them reads or fills on the host is its own."""


class DrawnTokens:
    """ids: (rows) int64 on the chip, one row for each sequence that the newest step drew for; -1 where it could not."""

    def __init__(self, accelerator: Accelerator, num_rows: int) -> None:
        self.ids = torch.zeros(num_rows, dtype=torch.int64, device=accelerator.device)
        self._accelerator = accelerator
        self._on_host = [accelerator.host_tensor(8 * num_rows).view(torch.int64) for _ in range(_IN_FLIGHT)]
        self._num_brought = 0
        self._rows: dict[int, int] = {}

    def sources(
        self, token_ids: np.ndarray, query_starts: np.ndarray, steps: Sequence[SequenceStep], width: int
    ) -> np.ndarray | None:
        """Where a step's tokens come from, for `chosen`; None when the host knows them all.

        Args: token_ids (T), query_starts (S + 1) of the step's sequences. width: rows that `chosen` will be given.
        Returns: (width) int64: a token's own row, or `width` more than its row in `ids`.
        """
        places = np.nonzero(token_ids == PENDING)[0]
        if not len(places):
            return None
        sources = np.arange(width)
        owners = np.searchsorted(query_starts, places, side="right") - 1
        sources[places] = [width + self._rows[steps[owner].seq_id] for owner in owners.tolist()]
        return sources

    def chosen(self, token_ids: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """Token ids (width) on the chip, those of the step before put in. What that could not draw becomes token 0."""
        return torch.cat((token_ids, self.ids)).index_select(0, sources).clamp(min=0)

    def bring(self, steps: Sequence[SequenceStep]) -> Callable[[], np.ndarray]:
        """Starts the copy of the first rows of `ids`, drawn for these sequences, to the host.

        Returns: waits for the step and gives the tokens (sequences); they hold until the second step after it.
        """
        count = len(steps)
        on_host = self._on_host[self._num_brought % _IN_FLIGHT]
        self._num_brought += 1
        on_host[:count].copy_(self.ids[:count], non_blocking=True)
        wait = self._accelerator.mark()
        self._rows = {step.seq_id: row for row, step in enumerate(steps)}

        def taken() -> np.ndarray:
            wait()
            return on_host[:count].numpy()

        return taken
