"""Log lines of long-running commands: one line each on stderr, above progress bars rather than through them."""

from __future__ import annotations

import logging
import sys


class _Stderr:
    """Whatever sys.stderr is at the moment: progress bars replace it while they are drawn."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def set_up_logging() -> None:
    """Sends log lines from MXN_LOG_LEVEL on to stderr."""
    from mxn.config.environment import log_level

    handler = logging.StreamHandler(_Stderr())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=log_level().upper(), handlers=[handler])
    for library in ("uvicorn", "httpx"):  # their news are told by the command itself
        logging.getLogger(library).setLevel(logging.WARNING)
