"""Keys, hosts, ids and error shapes on every route."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from mxn.cli.logs import JsonLines
from mxn.errors import ConfigError
from mxn.fleet.fleet import Fleet
from mxn.server.app import build_app
from mxn.server.gate import OPEN_PATHS
from mxn.server.gateway import PRINCIPAL, Gateway
from mxn.server.settings import ServerSettings

from .conftest import Running

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
KEY = "correct-horse-battery"


def paths_of(app: Any) -> list[str]:
    """Every path of the application, parameters filled in."""
    return [route.path.replace("{model:path}", "some/model") for route in app.routes]


def asgi_client(app: Any, **kwargs: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **kwargs)


def app_of(**settings: Any) -> Any:
    return build_app(Fleet([]), ServerSettings(**settings))


def assert_is_error(response: httpx.Response) -> None:
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code", "request_id"}


async def test_without_the_key_every_route_but_the_probes_is_closed() -> None:
    app = app_of(api_keys=(KEY,))
    paths = [*paths_of(app), "/", "/docs", "/redoc", "/nothing", "/livez/", "/livez/x", "//livez"]
    assert len(paths) > 15
    async with asgi_client(app) as client:
        for path in paths:
            for method in METHODS:
                response = await client.request(method, path)
                if path in OPEN_PATHS:
                    assert response.status_code in (200, 405, 503), (method, path)
                else:
                    assert response.status_code == 401, (method, path)
                    assert response.headers["www-authenticate"] == "Bearer"
                    if method != "HEAD":
                        assert_is_error(response)


@pytest.mark.parametrize(
    "value",
    [
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
        KEY,
        "Bearer ' OR 1=1 --",
        "Bearer \x00\xff",
        f"Bearer {KEY},{KEY}",
        "Bearer " + "x" * 10_000,
    ],
)
async def test_a_wrong_key_is_refused(value: str) -> None:
    async with asgi_client(app_of(api_keys=(KEY,))) as client:
        response = await client.get("/v1/models", headers={"authorization": value.encode("latin-1")})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in response.text


async def test_any_of_the_keys_opens_and_two_headers_do_not() -> None:
    async with asgi_client(app_of(api_keys=("first-key", KEY))) as client:
        for value in ("Bearer first-key", f"bearer {KEY}", f"Bearer  {KEY}"):
            assert (await client.get("/v1/models", headers={"authorization": value})).status_code == 200
        doubled = [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")]
        assert (await client.get("/v1/models", headers=doubled)).status_code == 401


@pytest.mark.parametrize("host", ["evil.example/livez?", "x/?", "x#", "a@b", "\\", "localhost/livez", "localhost:80?"])
async def test_the_host_header_opens_nothing(host: str) -> None:
    async with asgi_client(app_of(api_keys=(KEY,))) as client:
        for path in ("/v1/models", "/metrics", "/v1/chat/completions"):
            assert (await client.get(path, headers={"host": host})).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "169.254.169.254"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
async def test_without_keys_only_local_hosts_and_origins_are_served(headers: dict[str, str], status: int) -> None:
    async with asgi_client(app_of()) as client:
        response = await client.get("/v1/models", headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


def test_every_route_and_method_answers_with_a_body_or_openais_error(server: Running) -> None:
    paths = [*paths_of_server(server), "/", "/nothing", "/v1/", "/v1/models/", "/livez/"]
    for path in paths:
        for method in METHODS:
            response = server.http.request(method, path)
            assert response.status_code in (200, 400, 404, 405, 415), (method, path)
            if method != "BREW":  # which some parsers refuse before there is a request
                assert response.headers["x-request-id"]
            if response.status_code != 200 and method != "HEAD":
                server.get_error(response)
            if response.status_code == 405:
                assert response.headers["allow"]


def paths_of_server(server: Running) -> list[str]:
    return [path.replace("{model}", "fake-model") for path in server.http.get("/openapi.json").json()["paths"]]


async def test_the_schema_names_every_route() -> None:
    app = app_of()
    async with asgi_client(app) as client:
        document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) == {route.path.replace(":path", "") for route in app.routes}
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "stop", "logit_bias"} <= fields.keys()


def test_a_clients_request_id_is_echoed_and_two_equal_ones_do_not_meet(server: Running) -> None:
    headers = {"x-request-id": "same-id"}
    bodies = [{"model": "hash-model", "prompt": p, "max_tokens": 8, "temperature": 0} for p in ("aaa", "bbb")]
    tagged = [server.post("/v1/completions", body, headers=headers) for body in bodies]
    plain = [server.post("/v1/completions", body) for body in bodies]
    assert [r.headers["x-request-id"] for r in tagged] == ["same-id"] * 2
    texts = [[r.json()["choices"][0]["text"] for r in answers] for answers in (tagged, plain)]
    assert texts[0] == texts[1]
    assert plain[0].headers["x-request-id"] != plain[1].headers["x-request-id"]
    assert len({r.json()["id"] for r in (*tagged, *plain)}) == 4
    hostile = server.http.get("/livez", headers={"x-request-id": "a b;c"})
    assert hostile.headers["x-request-id"].startswith("req-")


def test_every_log_line_and_error_of_a_request_carries_its_id(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("as the test wants it")

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonLines().format(record)))

    lines: list[dict[str, Any]] = []
    collector = Collector(logging.INFO)
    logger = logging.getLogger("mxn.server")
    logger.addHandler(collector)
    try:
        with caplog.at_level(logging.INFO, "mxn.server"):
            monkeypatch.setattr(server.deployment("hash-model"), "submit", broken)
            body = {"model": "hash-model", "prompt": "x"}
            answer = server.post("/v1/completions", body, headers={"x-request-id": "trace-7"})
            server.wait_for(lambda: any("duration_ms" in line for line in lines))
    finally:
        logger.removeHandler(collector)
    assert answer.json()["error"]["request_id"] == "trace-7"
    mine = [line for line in lines if line.get("request_id") == "trace-7"]
    assert [line["level"] for line in mine] == ["error", "info"]
    assert "as the test wants it" in mine[0]["exception"]
    access = {key: mine[1][key] for key in ("logger", "method", "route", "status", "model")}
    assert access == {
        "logger": "mxn.server.access",
        "method": "POST",
        "route": "/v1/completions",
        "status": 500,
        "model": "hash-model",
    }


def test_an_unexpected_error_is_told_without_details(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret at /etc/passwd")

    monkeypatch.setattr(server.deployment("hash-model"), "submit", broken)
    response = server.post("/v1/completions", {"model": "hash-model", "prompt": "x"})
    assert response.status_code == 500
    error = server.get_error(response)
    assert error["type"] == "server_error"
    assert "secret" not in response.text


async def test_cache_salts_follow_the_key_and_the_start() -> None:
    gateways: list[Gateway] = [app_of(api_keys=(KEY,)).state.gateway for _ in range(2)]
    alice, bob = {PRINCIPAL: b"a" * 32}, {PRINCIPAL: b"b" * 32}
    assert gateways[0].cache_salt(alice) == gateways[0].cache_salt(dict(alice))
    assert len({gateways[0].cache_salt(alice), gateways[0].cache_salt(bob), gateways[1].cache_salt(alice)}) == 3


def test_different_keys_do_not_share_prefixes(
    start_server: Callable[..., Running], fake_deployment: Callable[..., Any]
) -> None:
    server = start_server(fake_deployment(), settings=ServerSettings(api_keys=("alice-key", "bob-key")))
    body = {"model": "fake-model", "prompt": list(range(128)), "max_tokens": 1}

    def num_cached(key: str) -> int:
        answer = server.post("/v1/completions", body, headers={"authorization": f"Bearer {key}"}).json()
        cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    assert num_cached("alice-key") == 0
    assert num_cached("alice-key") > 0
    assert num_cached("bob-key") == 0
    assert num_cached("bob-key") > 0
    with socket.create_connection(server.address) as raw:
        raw.sendall(b"GET /readyz HTTP/1.1\r\nHost: anything\r\nConnection: close\r\n\r\n")
        assert raw.makefile("rb").readline().startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("key", ["", " ", "a b", "é", "a\n"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        ServerSettings(api_keys=(key,))


def test_settings_do_not_print_keys() -> None:
    assert KEY not in repr(ServerSettings(api_keys=(KEY,)))
