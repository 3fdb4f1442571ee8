"""Which chips of its node a replica takes: Ray counts chips of a kind, these locks say which ones.

Every chip is eight files in a folder of the node; a replica holds a lock on all of them, or on as many as its part of
the chip. The locks end with the process, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from mxn.errors import BackendError

_PARTS = 8
_WAIT_S = 30.0
"""For the chips of a replica that is just ending."""


class ChipLease:
    """Chips that are held. uids: those of the node's chips that were free."""

    def __init__(self, uids: tuple[str, ...], locks: list[int]) -> None:
        self.uids = uids
        self._locks = locks

    @classmethod
    def take(cls, node: str, uids: Sequence[str], chips: float) -> Self:
        """Takes `chips` of the node's chips, or a part of one. Raises: BackendError when they stay in use."""
        number, parts = (round(chips), _PARTS) if chips >= 1 else (1, max(1, round(chips * _PARTS)))
        folder = Path(tempfile.gettempdir()) / f"mxn-chips-{os.getuid()}" / node
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        give_up_s = time.monotonic() + _WAIT_S
        while True:
            held: dict[str, list[int]] = {}
            for uid in uids:
                if len(held) < number and (locks := _lock(folder, uid, parts)):
                    held[uid] = locks
            locks = [lock for of_chip in held.values() for lock in of_chip]
            if len(held) == number:
                return cls(tuple(held), locks)
            _release(locks)
            if time.monotonic() > give_up_s:
                raise BackendError(
                    f"needs {chips:g} of this node's chips ({', '.join(uids) or 'none of that kind'}), "
                    f"and only {len(held)} are free; its Ray resources promise more than it has"
                )
            time.sleep(0.1)

    def release(self) -> None:
        """Gives the chips back."""
        _release(self._locks)
        self._locks = []


def _lock(folder: Path, uid: str, parts: int) -> list[int]:
    """Locks on so many parts of a chip; none when fewer are free."""
    held: list[int] = []
    for part in range(_PARTS):
        lock = os.open(folder / f"{uid}.{part}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        held.append(lock)
        if len(held) == parts:
            return held
    _release(held)
    return []


def _release(locks: list[int]) -> None:
    for lock in locks:
        os.close(lock)
