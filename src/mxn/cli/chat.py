"""`mxn chat`: one question, or a conversation, with a model served here or elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import httpx

HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help='A question; without one a conversation begins. "-" reads stdin.')
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to serve for this, or to ask for at --url.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, as http://127.0.0.1:8000/v1.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy; 1, the API's default, makes small models ramble.", min=0)
    ] = 0.2,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show TTFT and tokens/s after each answer.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="MXN_API_KEY", help="Key that the server asks for.")] = None,
    backend: Annotated[str, typer.Option(help="Backend to serve with, when no --url is given.")] = "auto",
    quantisation: Annotated[str, typer.Option(help="Quantisation to serve with, when no --url is given.")] = "auto",
) -> None:
    """Chat with a model, served here or at --url."""
    from mxn.cli.converse import get_json, http_client
    from mxn.cli.own_server import own_server
    from mxn.cli.prepare import DEFAULT_MODEL

    if prompt == "-":
        prompt = sys.stdin.read()
    with ExitStack() as stack:
        client = stack.enter_context(http_client(api_key))
        if url is None:
            options = ["--backend", backend, "--quantisation", quantisation]
            server = stack.enter_context(own_server(model or DEFAULT_MODEL, options))
            url, name = server.url, server.name
        else:
            url = url.rstrip("/")
            name = model or get_json(client, f"{url}/models")["data"][0]["id"]
        fields = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        messages = [{"role": "system", "content": system}] if system else []
        if prompt is not None:
            _ask(client, url, name, [*messages, {"role": "user", "content": prompt}], fields, stats)
            return
        print(f"{name}. {HELP}.", file=sys.stderr)
        _converse(client, url, name, messages, fields, stats)


def _converse(
    client: httpx.Client, url: str, name: str, opening: list[dict[str, str]], fields: Mapping[str, object], stats: bool
) -> None:
    """Reads lines until the user leaves."""
    from mxn.errors import MxnError

    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    messages = list(opening)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            messages = list(opening)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                answer = _ask(client, url, name, asked, fields, stats)
            except MxnError as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            messages = [*asked, {"role": "assistant", "content": answer}]


def _ask(
    client: httpx.Client, url: str, name: str, messages: list[dict[str, str]], fields: Mapping[str, object], stats: bool
) -> str:
    """Prints the answer as it comes. Returns: its text; what there is of it when Ctrl-C stopped it."""
    from mxn.cli.converse import Turn, converse

    turn, pieces = Turn(), []
    try:
        for piece in converse(client, url, name, messages, turn, **fields):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr)
    print(flush=True)
    if turn.finish_reason == "length":
        print(f"[cut off at {fields['max_tokens']} tokens; --max-tokens allows more]", file=sys.stderr)
    if stats:
        print(f"[{turn.stats_text()}]", file=sys.stderr)
    return "".join(pieces)
