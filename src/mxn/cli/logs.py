"""Log lines of long-running commands: one line each on stderr, above progress bars rather than through them."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


def set_up_logging(log_format: str | None = None) -> None:
    """Sends log lines from MXN_LOG_LEVEL on to stderr, as text or JSON (MXN_LOG_FORMAT when not given)."""
    from mxn.config import environment

    handler = logging.StreamHandler(_Stderr())
    handler.setFormatter(JsonLines() if environment.log_format(log_format) == "json" else TextLines())
    logging.basicConfig(level=environment.log_level().upper(), handlers=[handler])
    for library in ("uvicorn", "httpx"):  # their news are told by the command itself
        logging.getLogger(library).setLevel(logging.WARNING)


class TextLines(logging.Formatter):
    """For people: time, level, the id of the request if the line belongs to one, text."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(request)s%(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        request_id = _request_id()
        record.request = f"[{request_id}] " if request_id else ""
        return super().format(record)


class JsonLines(logging.Formatter):
    """For collectors: one object per line with time (UTC), level, logger, message, request_id and what a line adds.

    A line adds fields with `extra={"fields": {...}}`.
    """

    def format(self, record: logging.LogRecord) -> str:
        time_utc = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time_utc.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := _request_id():
            line["request_id"] = request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _Stderr:
    """Whatever sys.stderr is at the moment: progress bars replace it while they are drawn."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _request_id() -> str:
    from mxn.server.request_id import current_request_id

    return current_request_id()
