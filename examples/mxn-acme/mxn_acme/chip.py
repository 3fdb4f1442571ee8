"""The simulated chip: memory, time and energy. Each process that holds it keeps a ledger file that others can read."""

import os
import tempfile
import time
from pathlib import Path

import numpy as np

from mxn.energy.reader import NullReader, ReaderKind, Reading
from mxn.errors import OutOfMemoryError

MEMORY_BYTES, STEP_S, TOKEN_S, IDLE_W, BUSY_W = 2**30, 0.5e-3, 10e-6, 2.0, 15.0
LEDGERS = Path(tempfile.gettempdir()) / f"acme-x1-0-{os.getuid()}"


class X1:
    def __init__(self):
        LEDGERS.mkdir(mode=0o700, exist_ok=True)
        path = LEDGERS / f"{os.getpid()}.{time.monotonic_ns()}"
        self.ledger = np.memmap(path, np.float64, "w+", shape=(2,))  # bytes held, seconds busy

    def allocate(self, *shape):
        array = np.zeros(shape, np.float32)
        if (free := MEMORY_BYTES - self.ledger[0]) < array.nbytes:
            raise OutOfMemoryError(f"the X1 has {free / 2**20:.0f} MiB free, {array.nbytes / 2**20:.0f} MiB are needed")
        self.ledger[0] += array.nbytes
        return array

    def work(self, start_s, num_tokens):
        """Lets a step that began at `start_s` take the time that it takes on this chip."""
        time.sleep(max(0.0, start_s + STEP_S + num_tokens * TOKEN_S - time.monotonic()))
        self.ledger[1] += time.monotonic() - start_s

    def free(self):
        self.ledger[0] = 0


class X1PowerReader(NullReader):
    name, kind = "acme-x1", ReaderKind.REPLAY

    def read(self):
        now_s, busy_s = time.monotonic(), sum(np.fromfile(path)[1:].sum() for path in LEDGERS.iterdir())
        return Reading(energy_j=float(IDLE_W * now_s + (BUSY_W - IDLE_W) * busy_s), time_s=now_s)


def memory_used(pid):
    return float(sum(np.fromfile(path)[:1].sum() for path in LEDGERS.glob(f"{pid}.*")))
