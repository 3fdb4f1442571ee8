"""The gateway's application: OpenAI's API over a fleet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mxn import __version__
from mxn.server.admin import AdminRoutes, DetokenizeEndpoint, TokenizeEndpoint
from mxn.server.control import ControlRoutes
from mxn.server.embeddings import EmbeddingsEndpoint
from mxn.server.errors import ErrorAnswer
from mxn.server.explain import ExplainEndpoint
from mxn.server.gate import Gate
from mxn.server.gateway import Gateway
from mxn.server.generation import ChatEndpoint, CompletionEndpoint
from mxn.server.schema import openapi_schema
from mxn.server.settings import ServerSettings

if TYPE_CHECKING:
    from mxn.fleet.fleet import Fleet


def build_app(fleet: Fleet, settings: ServerSettings) -> FastAPI:
    """An application that serves `fleet`, which the caller starts and stops; `app.state.gateway` is the Gateway."""
    gateway = Gateway(fleet, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.close()

    routes = _routes(gateway)
    app = FastAPI(
        title="mxn",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _answer_http_exception},
        routes=[*routes],
    )
    app.state.gateway = gateway
    app.add_middleware(Gate, gateway=gateway, templates={route.endpoint: route.path for route in routes})
    return app


def _routes(gateway: Gateway) -> list[Route]:
    """Plain routes: FastAPI's own would cost more than the whole way to the engine."""
    admin = AdminRoutes(gateway)
    control = ControlRoutes(gateway)
    schema = openapi_schema()

    async def openapi(request: Request) -> Response:
        return Response(schema, media_type="application/json")

    return [
        Route("/v1/chat/completions", ChatEndpoint(gateway), methods=["POST"]),
        Route("/v1/completions", CompletionEndpoint(gateway), methods=["POST"]),
        Route("/v1/embeddings", EmbeddingsEndpoint(gateway), methods=["POST"]),
        Route("/v1/models", admin.models),
        Route("/v1/models/{model:path}", admin.model),
        Route("/tokenize", TokenizeEndpoint(gateway), methods=["POST"]),
        Route("/detokenize", DetokenizeEndpoint(gateway), methods=["POST"]),
        Route("/livez", admin.livez),
        Route("/readyz", admin.readyz),
        Route("/metrics", admin.metrics),
        Route("/v1/mxn/status", admin.status),
        Route("/v1/mxn/apply", control.apply, methods=["POST"]),
        Route("/v1/mxn/drain", control.drain, methods=["POST"]),
        Route("/v1/mxn/cordon", control.cordon, methods=["POST"]),
        Route("/v1/mxn/uncordon", control.uncordon, methods=["POST"]),
        Route("/v1/mxn/explain", ExplainEndpoint(gateway), methods=["POST"]),
        Route("/openapi.json", openapi),
    ]


async def _answer_http_exception(request: Request, error: Any) -> Response:
    """404 and 405 of the router in OpenAI's shape."""
    texts = {
        404: "there is no such route; /openapi.json lists them",
        405: f"{request.method} is not allowed on this route",
    }
    answer = ErrorAnswer(status=error.status_code, message=texts.get(error.status_code, str(error.detail)))
    headers = dict(getattr(error, "headers", None) or {})
    return Response(answer.body(), error.status_code, headers, "application/json")
