"""Which prefixes a replica probably has in its cache, as far as the gateway knows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from mxn.engine.prefix_cache import HEAD_BYTES, extend_chain, root_of

BLOCK_TOKENS = 32
"""Tokens per block where a replica has no blocks of its own to report (servers, whole-sequence slots)."""

_MAX_UNREPORTED = 4096
"""Blocks remembered of such a replica, those that were sent last."""


class PrefixIndex:
    """Heads of the hashes of blocks that one replica holds, or soon will because they were sent there.

    A replica that reports is believed: what it stored is there, what it evicted is not. Never holds more heads than
    the replica has blocks, the ones touched last.
    """

    def __init__(self, *, fingerprint: str, block_size: int, num_blocks: int) -> None:
        """fingerprint: the replica's own; empty when it reports nothing."""
        self.fingerprint = fingerprint
        self.block_size = block_size if fingerprint else BLOCK_TOKENS
        self._capacity = num_blocks if fingerprint else _MAX_UNREPORTED
        self._heads: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._heads)

    def report(self, stored: bytes, evicted: bytes) -> None:
        """Takes a replica's report: heads, joined."""
        for i in range(0, len(stored), HEAD_BYTES):
            self._add(stored[i : i + HEAD_BYTES])
        for i in range(0, len(evicted), HEAD_BYTES):
            self._heads.pop(evicted[i : i + HEAD_BYTES], None)

    def expect(self, heads: Sequence[bytes]) -> None:
        """Notes a prompt that was sent there; others that begin alike will find it."""
        for head in reversed(heads):  # roots are touched last: without them their leaves are worth nothing
            self._add(head)

    def num_cached_tokens(self, heads: Sequence[bytes]) -> int:
        """How many of a prompt's first tokens are there."""
        for count, head in enumerate(heads):
            if head not in self._heads:
                return count * self.block_size
        return len(heads) * self.block_size

    def _add(self, head: bytes) -> None:
        self._heads[head] = None
        self._heads.move_to_end(head)
        if len(self._heads) > self._capacity:
            self._heads.popitem(last=False)


def prompt_heads(fingerprint: str, block_size: int, cache_salt: str, token_ids: Sequence[int]) -> list[bytes]:
    """Heads of the hashes of a prompt's full blocks, without its last token, which is always computed anew."""
    chain: list[bytes] = []
    extend_chain(chain, root_of(fingerprint, cache_salt), token_ids[:-1], block_size)
    return [content[:HEAD_BYTES] for content in chain]
