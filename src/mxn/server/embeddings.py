"""POST /v1/embeddings: texts in, one vector each out."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from mxn.errors import RequestError
from mxn.server.body import read_json
from mxn.server.disconnect import ClientGoneError, StopWhenGone
from mxn.server.errors import send_json
from mxn.server.gateway import MODEL, Gateway, Served, require_ready
from mxn.server.openai import EmbeddingRequest, check
from mxn.server.sampling import check_prompt_ids

if TYPE_CHECKING:
    from mxn.core.request import SequenceOutput
    from mxn.fleet.deployment import Deployment


class EmbeddingsEndpoint:
    """An ASGI endpoint in OpenAI's shape. A request is answered whole or with one error."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        gateway, started_s = self._gateway, time.perf_counter()
        request = check(EmbeddingRequest, await read_json(scope["headers"], receive, gateway.settings))
        served = gateway.served(gateway.deployment_for("embed", request.model))
        scope[MODEL] = served.deployment.name
        outcome = "failed"
        try:
            async with StopWhenGone(receive):
                require_ready(served.deployment)
                _check_dimensions(request, served.deployment)
                texts = await _token_ids(request, served)
                deployment = served.deployment
                outputs = await deployment.embed(texts, max_open=deployment.max_num_seqs)
                num_tokens = sum(map(len, texts))
                answer = {
                    "object": "list",
                    "data": _data(outputs, is_base64=request.encoding_format == "base64"),
                    "model": request.model,
                    "usage": _usage(num_tokens, outputs, served if request.include_energy else None),
                }
                await send_json(send, msgspec.json.encode(answer))
            outcome = "stop"
            _observe(served, num_tokens, outputs, time.perf_counter() - started_s)
        except ClientGoneError:
            outcome = "client_gone"
            raise
        except RequestError as error:
            outcome = "refused" if error.status < 500 else "failed"
            raise
        finally:
            served.metrics.count(outcome)


async def _token_ids(request: EmbeddingRequest, served: Served) -> list[list[int]]:
    """Token ids of each text, with the model's special tokens; ids that a client sends are taken as they are."""
    texts: list[list[int]] = []
    for index, given in enumerate(request.input):
        param = f"input[{index}]" if len(request.input) > 1 else "input"
        ids = given
        if isinstance(given, str):
            ids = await served.encoder.encode_text(given, add_special_tokens=True, param=param)
        check_prompt_ids(ids, served.deployment, param)
        texts.append(ids)
        await asyncio.sleep(0)  # many texts must not hold up other requests
    return texts


def _check_dimensions(request: EmbeddingRequest, deployment: Deployment) -> None:
    own = deployment.info.dimensions if deployment.info is not None else None
    if request.dimensions is not None and request.dimensions != own:
        raise RequestError(
            f"dimensions is {request.dimensions}; vectors of {deployment.name} have {own} numbers and were not made to "
            "be shortened",
            param="dimensions",
            code="unsupported_parameter",
        )


def _data(outputs: Sequence[SequenceOutput], *, is_base64: bool) -> list[dict[str, Any]]:
    data = []
    for index, output in enumerate(outputs):
        vector = output.vector or b""
        shown = base64.b64encode(vector).decode() if is_base64 else np.frombuffer(vector, dtype="<f4").tolist()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    return data


def _usage(num_tokens: int, outputs: Sequence[SequenceOutput], metered: Served | None) -> dict[str, Any]:
    usage: dict[str, Any] = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    if metered is not None:
        usage["mxn"] = {"energy_j": _energy_j(outputs), "source": metered.power_source}
    return usage


def _energy_j(outputs: Sequence[SequenceOutput]) -> float | None:
    """Joules of all texts; None when those of one are not known."""
    known = [output.energy_j for output in outputs if output.energy_j is not None]
    return sum(known) if len(known) == len(outputs) else None


def _observe(served: Served, num_tokens: int, outputs: Sequence[SequenceOutput], seconds: float) -> None:
    metrics = served.metrics
    metrics.e2e_s.observe(seconds)
    metrics.prompt_tokens.inc(num_tokens)
    metrics.prompt_length.observe(num_tokens)
    if (energy_j := _energy_j(outputs)) is not None:
        metrics.energy_j.observe(energy_j)
