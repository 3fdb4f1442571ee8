"""Token ids to text as they come: never half a character, never past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mxn.engine.tokenizer import Tokenizer

_CONTEXT_TOKENS = 6
"""Prompt tokens decoded along with the first output, because some tokenizers join a token to the one before."""

_MAX_PENDING_TOKENS = 5
"""A character has at most 4 bytes, so 5 tokens that still end in half a character will never complete it."""

_HALF = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns the tokens of one sequence into text that may be sent.

    stop: strings that end the text; found across token borders. A possible start of one is held back.
    include_stop: whether the stop string itself is part of the text.
    min_tokens: stop strings count only when they are completed by a token after so many.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self.stopped = False
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._min_tokens = min_tokens
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._shown = len(self._ids)  # ids before this are in the text already
        self._base = 0  # decoding starts here, a little before `_shown`
        self._held = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds tokens and returns the text that may be sent now; empty after a stop string."""
        sent = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            self._ids.append(token_id)
            sent.append(self._release(self._decode(force=False), is_last=False))
        return "".join(sent)

    def push_text(self, text: str, num_tokens: int) -> str:
        """Adds text that a server made of its tokens itself and returns what may be sent now."""
        self.num_tokens += num_tokens
        return "" if self.stopped else self._release(text, is_last=False)

    def flush(self) -> str:
        """Returns what was held back; call once when the sequence has ended."""
        if self.stopped:
            return ""
        return self._release(self._decode(force=True), is_last=True)

    def _decode(self, *, force: bool) -> str:
        """Text of the tokens that are not shown yet, or nothing while they end inside a character."""
        before = self._text(self._ids[self._base : self._shown])
        after = self._text(self._ids[self._base :])
        is_half = after.endswith(_HALF) and len(self._ids) - self._shown < _MAX_PENDING_TOKENS
        if is_half and not force:
            return ""
        self._base, self._shown = self._shown, len(self._ids)
        if self._base > 64:
            del self._ids[: self._base]
            self._shown -= self._base
            self._base = 0
        return after[len(before) :]

    def _release(self, text: str, *, is_last: bool) -> str:
        if not self._stop:
            return text
        text = self._held + text
        if self.num_tokens > self._min_tokens:
            hits = [(text.find(s), s) for s in self._stop if s in text]
            if hits:
                at, stop = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
                self.stopped = True
                self._held = ""
                return text[: at + len(stop)] if self._include_stop else text[:at]
        keep = 0 if is_last else self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that could grow into a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special) if token_ids else ""
