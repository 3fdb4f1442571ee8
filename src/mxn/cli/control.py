"""What the commands that change a running server share."""

from __future__ import annotations

from typing import Any

from mxn.errors import BackendError, UnavailableError

_TIMEOUT_S = 600.0
"""A plan may bring models that are fetched first."""


def post(url: str, api_key: str | None, action: str, body: dict[str, str]) -> dict[str, Any]:
    """Asks a server to do something. Raises: BackendError with its words when it refuses."""
    import httpx

    from mxn.cli.converse import error_text, http_client

    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/mxn/{action}"
    with http_client(api_key) as client:
        try:
            response = client.post(address, json=body, timeout=_TIMEOUT_S)
            if response.status_code >= 400:
                raise BackendError(error_text(response.status_code, response.content))
            found: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise UnavailableError(f"{address} cannot be reached: {error or type(error).__name__}") from error
    return found


def show(answer: dict[str, Any], *, json_output: bool) -> None:
    """Prints what a server said that it does now."""
    from mxn.cli.console import out, show_json

    if json_output:
        show_json(answer)
        return
    console = out()
    if answer["changed"]:
        console.print(f"ending: {', '.join(answer['changed'])}", markup=False)
    for deployment in answer["deployments"]:
        replicas = ", ".join(deployment["replicas"]) or "no replica"
        trouble = f": {deployment['trouble']}" if deployment["trouble"] else ""
        console.print(
            f"{deployment['model']}: {deployment['state']}, {replicas}{trouble}", markup=False, soft_wrap=True
        )
    for chip, reason in answer["cordoned"].items():
        console.print(f"{chip} is not used: {reason}", markup=False, soft_wrap=True)
    console.print("`mxn status` shows how far it is.", markup=False)
