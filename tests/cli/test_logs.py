"""How log lines are written."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from mxn.cli.logs import JsonLines, TextLines
from mxn.server.request_id import begin_request

from .conftest import Mxn, Serving


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("mxn.test", logging.WARNING, "test.py", 1, message, args, None)
    made.__dict__.update(extra)
    return made


def test_json_line_holds_time_level_logger_message_and_fields() -> None:
    line = json.loads(JsonLines().format(record("%s is late", "smollm2/0", fields={"replica": "smollm2/0"})))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "mxn.test",
        "message": "smollm2/0 is late",
        "replica": "smollm2/0",
    }


def test_json_line_stays_one_line_and_keeps_the_exception() -> None:
    made = record("two\nlines")
    try:
        raise ValueError("broken")
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    text = JsonLines().format(made)
    assert "\n" not in text
    assert "ValueError: broken" in json.loads(text)["exception"]


async def test_text_line_shows_the_request_it_belongs_to() -> None:
    assert TextLines().format(record("hello")).endswith("WARNING hello")
    begin_request([(b"x-request-id", b"trace-7")])
    assert TextLines().format(record("hello")).endswith("WARNING [trace-7] hello")
    assert json.loads(JsonLines().format(record("hello")))["request_id"] == "trace-7"


def test_serve_writes_json_lines_when_told(serve: Callable[..., Serving], model_folder: str, mxn: Mxn) -> None:
    serving = serve(model_folder, "--backend", "fake", "--log-format", "json", MXN_LOG_LEVEL="info")
    assert mxn("status", "--url", serving.url).code == 0
    serving.process.terminate()
    _, err = serving.process.communicate(timeout=30)
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    [access] = [line for line in lines if line.get("route") == "/v1/mxn/status"]
    assert access["request_id"].startswith("req-")
    assert access["status"] == 200


@pytest.mark.parametrize("args", [("--log-format", "xml"), ()])
def test_unknown_log_format_is_refused(mxn: Mxn, model_folder: str, args: tuple[str, ...], tmp_path: Path) -> None:
    ran = mxn("serve", model_folder, "--backend", "fake", *args, **({} if args else {"MXN_LOG_FORMAT": "xml"}))
    assert ran.code == 2
    assert "'xml'; expected one of text, json" in ran.err
