"""Routes around generation: models, tokenizing, probes, metrics and status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mxn.errors import RequestError
from mxn.server.body import read_json
from mxn.server.errors import send_json
from mxn.server.gateway import Gateway
from mxn.server.metrics import CONTENT_TYPE
from mxn.server.openai import DetokenizeRequest, TokenizeRequest, check
from mxn.server.sampling import check_prompt_ids
from mxn.server.status import fleet_status, readiness, worst_state

if TYPE_CHECKING:
    from mxn.fleet.deployment import Deployment


class AdminRoutes:
    """Handlers of all routes that do not generate."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def livez(self, request: Request) -> Response:
        """200 while the event loop turns."""
        return _json({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        """200 when a deployment (or the one of `?model=`) is loaded and idle or making progress."""
        wanted = request.query_params.get("model")
        deployments = self._gateway.fleet.deployments
        if wanted is not None:
            deployments = [self._gateway.deployment(wanted)]
        shows_reason = bool(request.scope.get("mxn.is_trusted"))
        is_ready = not self._gateway.is_draining and any(deployment.is_ready for deployment in deployments)
        status = "ready" if is_ready else "draining" if self._gateway.is_draining else worst_state(deployments)
        body = {"status": status, "deployments": [readiness(d, shows_reason=shows_reason) for d in deployments]}
        return _json(body, 200 if is_ready else 503, {} if is_ready else {"retry-after": "1"})

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        self._gateway.metrics.active.set(self._gateway.num_active)
        return Response(self._gateway.metrics.text(), headers={"content-type": CONTENT_TYPE.decode()})

    async def status(self, request: Request) -> Response:
        """What runs, where and how."""
        return _json(fleet_status(self._gateway))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [_model(d) for d in self._gateway.fleet.deployments]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}."""
        return _json(_model(self._gateway.deployment(request.path_params["model"])))


class TokenizeEndpoint:
    """POST /tokenize: an ASGI endpoint in vLLM's shape."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        gateway = self._gateway
        request = check(TokenizeRequest, await read_json(scope["headers"], receive, gateway.settings))
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("send either prompt or messages", param="prompt")
        deployment = gateway.deployment(request.model)
        encoder = gateway.served(deployment).encoder
        if request.messages is not None:
            if request.add_special_tokens:
                raise RequestError(
                    "add_special_tokens goes with prompt only; a template writes its own", param="add_special_tokens"
                )
            ids = await encoder.encode_chat(
                request.messages,
                request.chat_template_kwargs,
                add_generation_prompt=request.add_generation_prompt is not False,
            )
        else:
            ids = await encoder.encode_text(
                request.prompt or "", add_special_tokens=request.add_special_tokens is not False
            )
        tokenizer = deployment.tokenizer
        texts = [tokenizer.token_text(i) for i in ids] if request.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": deployment.max_context, "tokens": ids, "token_strs": texts}
        await send_json(send, msgspec.json.encode(answer))


class DetokenizeEndpoint:
    """POST /detokenize: an ASGI endpoint in vLLM's shape."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        gateway = self._gateway
        request = check(DetokenizeRequest, await read_json(scope["headers"], receive, gateway.settings))
        deployment = gateway.deployment(request.model)
        ids = request.tokens
        if ids:
            check_prompt_ids(ids, deployment, "tokens")
        text = deployment.tokenizer.decode(ids, skip_special_tokens=False)
        await send_json(send, msgspec.json.encode({"prompt": text}))


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def _model(deployment: Deployment) -> dict[str, object]:
    return {
        "id": deployment.name,
        "object": "model",
        "created": deployment.created_s,
        "owned_by": "mxn",
        "max_model_len": deployment.max_context,
    }
