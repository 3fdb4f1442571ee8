"""What a server is found to serve."""

import pytest

from mxn.bench.arms import describe
from mxn.errors import ConfigError

from .canned import canned_server


@pytest.mark.parametrize(
    ("status", "words"),
    [(503, r"\(HTTP 503\); the server is not ready"), (404, r"\(HTTP 404\); does the URL end in /v1")],
)
async def test_a_server_that_lists_no_models_is_told_by_its_status(status: int, words: str) -> None:
    def answer(request: bytes) -> list[bytes]:
        return [b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % status]

    async with canned_server(answer) as url:
        with pytest.raises(ConfigError, match=words):
            await describe(url, "peer")
