"""The gate against the fake engine's own server, and against servers whose answers are known to differ."""

import json
from collections.abc import Callable

import pytest

from mxn.bench.quality import (
    MAX_LOGLIK_LOSS,
    TEXTS,
    Asker,
    Reference,
    Scored,
    judge,
    take_reference,
)

from .canned import canned_server


def server_answer(loglik: float, *, top: Callable[[int], str] = lambda i: f"t{i}", echoes: bool = True):
    """Scores every text with the same log-likelihood per token and given most likely tokens."""

    def answer(request: bytes) -> list[bytes]:
        body = json.loads(request.split(b"\r\n\r\n", 1)[1])
        choice: dict[str, object] = {"text": " more words of the same kind"}
        if body.get("echo") and echoes:
            count = len(body["prompt"].split()) + 1
            choice = {
                "text": body["prompt"] + " x",
                "logprobs": {
                    "token_logprobs": [None, *[loglik] * (count - 1)],
                    "top_logprobs": [None, *[{top(i): -0.1, "other": -3.0} for i in range(count - 1)]],
                },
            }
        payload = json.dumps({"choices": [choice]}).encode()
        return [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(payload), payload)]

    return answer


async def reference() -> Reference:
    async with canned_server(server_answer(-2.0)) as url:
        asker = Asker(url, model="m")
        found = await take_reference(asker, "fp32")
        asker.close()
    return found


async def verdict(answer: Callable[[bytes], list[bytes]]):
    found = await reference()
    async with canned_server(answer) as url:
        asker = Asker(url, model="m")
        quality = await judge(asker, found)
        asker.close()
    return quality


async def test_reference_passes_its_own_gate_in_full() -> None:
    quality = await verdict(server_answer(-2.0))
    assert quality.is_passed
    assert quality.agreement == 1
    assert quality.mean_loglik == quality.reference_loglik == pytest.approx(-2)
    assert quality.num_positions > 5 * len(TEXTS)


async def test_less_likely_texts_fail_even_when_the_top_tokens_agree() -> None:
    quality = await verdict(server_answer(-2.0 - 1.1 * MAX_LOGLIK_LOSS))
    assert quality.agreement == 1
    assert not quality.is_passed


async def test_other_top_tokens_fail_even_when_likelihood_holds() -> None:
    quality = await verdict(server_answer(-2.0, top=lambda i: f"t{i}" if i % 5 else "wrong"))
    assert 0.75 < (quality.agreement or 0) < 0.85
    assert not quality.is_passed


async def test_server_that_cannot_score_is_compared_by_its_own_words() -> None:
    quality = await verdict(server_answer(-2.0, echoes=False))
    assert quality.is_passed
    assert quality.agreement is None
    assert "100%" in quality.note


async def test_server_that_is_gone_does_not_pass() -> None:
    asker = Asker("http://127.0.0.1:9/v1", model="m")
    quality = await judge(asker, Reference(name="r", texts=TEXTS, scores=(Scored(logliks=(-1.0,), tops=("a",)),) * 12))
    assert not quality.is_passed
    assert "could not be compared" in quality.note
