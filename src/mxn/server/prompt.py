"""Texts and conversations to prompt token ids, without letting a user's text pass for the template's control tokens.

A conversation's prompt is the rendered template, in which control tokens such as `<|im_start|>` are tokens, and the
messages' texts, in which the same characters are only characters. Wherever a text spells such a token, a mark that
nobody can guess is put inside it before rendering; afterwards the prompt is cut at the marks and the pieces are encoded
one by one, so that no piece holds the whole spelling. A conversation without such text (nearly all) is encoded in one
piece, exactly as transformers does. A template that trims or splits its texts meets the mark inside the spelling only.
Prompts of /v1/completions are the client's own template: there control tokens are parsed.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mxn.errors import RequestError
from mxn.server.openai import ChatMessage, message_text
from mxn.server.sampling import too_long
from mxn.server.settings import ServerSettings
from mxn.server.template import TemplateRenderer

if TYPE_CHECKING:
    from mxn.fleet.deployment import Deployment

_IN_THREAD_CHARS = 16 * 1024
"""Longer texts are encoded in a thread: 3 ms of work at 5 MB/s, measured with a 49,000-token vocabulary."""

_HEAD_CHARS_PER_TOKEN = 8
"""English has 4 to 5 characters per token. Of a text beyond this per token of context, only the head is encoded at
first; when the head alone overfills the context the rest need not be looked at."""

_MAX_CHARS_PER_TOKEN = 512
"""No vocabulary in use has longer tokens (the longest are runs of spaces), so longer texts cannot fit."""


class _AddedToken(msgspec.Struct):
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_AddedToken] = []


class PromptEncoder:
    """Encodes prompts for one deployment. `close` ends the process that renders its template."""

    def __init__(self, deployment: Deployment, settings: ServerSettings) -> None:
        self.deployment = deployment
        self._tokenizer = deployment.tokenizer
        self._renderer: TemplateRenderer | None = None
        self._mark = f"\ue000{secrets.token_hex(8)}\ue001"
        template = self._tokenizer.chat_template
        if template is not None:
            self._renderer = TemplateRenderer(template, self._tokenizer.special_tokens, settings)
        tokens = _added_tokens(deployment.model.folder)
        special = {t.content for t in tokens if t.special} | set(self._tokenizer.special_tokens.values())
        # Some models mark turns with added tokens that are not declared special; their templates spell them out.
        spelled = {t.content for t in tokens if template and t.content in template and t.content.strip()}
        self._control = _pattern(special | spelled)
        self._special = _pattern(special)
        self._control_ids = self._tokenizer.special_token_ids

    async def start(self) -> None:
        """Starts the template's process ahead of the first conversation."""
        if self._renderer is not None:
            await self._renderer.start()

    async def close(self) -> None:
        """Ends the template's process."""
        if self._renderer is not None:
            await self._renderer.close()

    async def encode_text(self, text: str, *, add_special_tokens: bool, param: str = "prompt") -> list[int]:
        """Token ids of a client's prompt, control tokens parsed.

        Raises: RequestError for a text that cannot fit the context, without encoding all of it.
        """
        return await self._encode(text, add_special_tokens=add_special_tokens, param=param)

    async def encode_chat(
        self, messages: Sequence[ChatMessage], variables: dict[str, Any], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation in the model's own chat format."""
        if self._renderer is None:
            raise RequestError(
                f"{self.deployment.name} has no chat template; use /v1/completions with a prompt", param="messages"
            )
        turns = []
        num_chars = 0
        for i, message in enumerate(messages):
            text = message_text(message, i)
            num_chars += len(text)
            role = "system" if message.role == "developer" else message.role
            turns.append({"role": role, "content": self._marked(text, role)})
        self._check_length(num_chars, "messages")
        text = await self._renderer.render(turns, {"add_generation_prompt": add_generation_prompt, **variables})
        if self._mark not in text:
            return self._checked(await self._encode(text, add_special_tokens=False, param="messages"), text)
        ids: list[int] = []
        for piece in text.split(self._mark):
            if piece:
                ids += await self._encode(piece, add_special_tokens=False, param="messages")
        return self._checked(ids, text)

    def _marked(self, text: str, role: str) -> str:
        """`text` with a mark inside everything that would be read as a control token.

        An assistant's turn may hold tokens that models write themselves and templates look for, such as `<think>`.
        """
        if self._mark in text:
            raise RequestError("a message holds the server's private mark", param="messages")
        pattern = self._special if role == "assistant" else self._control
        if pattern is None:
            return text
        return pattern.sub(lambda found: found[0][0] + self._mark + found[0][1:], text)

    def _checked(self, ids: list[int], text: str) -> list[int]:
        """`ids` of the rendered `text`, provided that no control token came from anything but its plain spelling.

        A tokenizer that normalises text first (width, case) could make one from characters that only look alike.
        """
        num_control = sum(map(self._control_ids.__contains__, ids)) if self._control_ids else 0
        if num_control and self._special is not None and num_control > len(self._special.findall(text)):
            raise RequestError(
                "a message holds text that this model's tokenizer reads as a control token", param="messages"
            )
        return ids

    def _check_length(self, num_chars: int, param: str) -> None:
        if num_chars > self.deployment.max_context * _MAX_CHARS_PER_TOKEN:
            raise too_long(f"{num_chars} characters", self.deployment, param)

    async def _encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        if len(text) <= _IN_THREAD_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        self._check_length(len(text), param)
        context = self.deployment.max_context
        head_chars = _HEAD_CHARS_PER_TOKEN * context
        if len(text) > 2 * head_chars:
            head = await asyncio.to_thread(self._tokenizer.encode, text[:head_chars], add_special_tokens=False)
            if len(head) > context:
                raise too_long(f"more than {len(head)} tokens", self.deployment, param)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)


def _added_tokens(folder: str) -> list[_AddedToken]:
    path = Path(folder) / "tokenizer.json"
    return msgspec.json.decode(path.read_bytes(), type=_TokenizerFile).added_tokens


def _pattern(texts: set[str]) -> re.Pattern[str] | None:
    """A pattern of any of the texts of two characters or more, longest first; shorter ones cannot be cut."""
    found = sorted((t for t in texts if len(t) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None
