"""The OpenAPI document of the gateway, made from the same models that check requests."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from mxn import __version__
from mxn.server.control import ApplyRequest, CordonRequest, DrainRequest
from mxn.server.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ExplainRequest,
    TokenizeRequest,
)

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "request_id": {"type": "string"},
            },
        }
    },
}
_POSTS = (
    ("/v1/chat/completions", ChatRequest, "Answer a conversation", True),
    ("/v1/completions", CompletionRequest, "Continue a text", True),
    ("/v1/embeddings", EmbeddingRequest, "A vector for each text", False),
    ("/tokenize", TokenizeRequest, "Token ids of a text or conversation", False),
    ("/detokenize", DetokenizeRequest, "Text of token ids", False),
    ("/v1/mxn/apply", ApplyRequest, "Go over to what a file on the server's disk says", False),
    ("/v1/mxn/drain", DrainRequest, "Empty a chip, a deployment or a replica", False),
    ("/v1/mxn/cordon", CordonRequest, "Start nothing on a chip any more", False),
    ("/v1/mxn/uncordon", CordonRequest, "Use a chip again", False),
    ("/v1/mxn/explain", ExplainRequest, "Why a deployment runs as it does, and where a prompt would go", False),
)
_GETS = (
    ("/v1/models", "Models that are served", "application/json"),
    ("/v1/models/{model}", "One model", "application/json"),
    ("/v1/mxn/status", "What runs and how", "application/json"),
    ("/livez", "200 while the process works", "application/json"),
    ("/readyz", "200 when requests are served, 503 before and while draining", "application/json"),
    ("/metrics", "Prometheus metrics", "text/plain"),
    ("/openapi.json", "This document", "application/json"),
)
_POST_ERRORS = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
_OPEN = ("/livez", "/readyz")


def openapi_schema() -> bytes:
    """The document as JSON."""
    kinds = [(kind, "validation") for kind in dict.fromkeys(kind for _, kind, _, _ in _POSTS)]
    refs, definitions = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for path, kind, summary, streams in _POSTS:
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        schema = refs[(kind, "validation")]
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": {"description": "the answer", "content": content}, **_errors(_POST_ERRORS)},
            }
        }
    for path, summary, media_type in _GETS:
        statuses = (503,) if path == "/readyz" else () if path in _OPEN else (401, 403)
        get: dict[str, Any] = {
            "summary": summary,
            "responses": {
                "200": {"description": "the answer", "content": {media_type: {}}},
                **_errors((*statuses, 404)),
            },
        }
        if path in _OPEN:
            get["security"] = []
        if "{model}" in path:
            get["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        if path == "/readyz":
            get["parameters"] = [{"name": "model", "in": "query", "required": False, "schema": {"type": "string"}}]
            get["responses"]["503"] = {"description": "not ready; the same body", "content": {media_type: {}}}
        paths[path] = {"get": get}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "mxn", "version": __version__, "description": "OpenAI's text API over mxn's deployments."},
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
    return msgspec.json.encode(document)


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": "an error", "content": content} for status in statuses}
