"""Which leading blocks of a prompt are in the KV cache already, or are being computed right now.

A block's identity is sha256(identity of the block before it || its token ids as packed int32); the chain starts from a
root that covers the model, its number formats and the tenant, so tenants never meet. Source: vLLM's hash-chained
prefix cache; waiting for blocks in flight is ours.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from mxn.engine.block_pool import BlockPool

HEAD_BYTES = 8
"""As much of a block's identity as replicas report of it: the router may be wrong once in 2^64, the cache never."""


def root_of(fingerprint: str, cache_salt: str) -> bytes:
    """Start of the chain of one tenant, among KV made in one way."""
    parts = (fingerprint.encode(), cache_salt.encode())
    return hashlib.sha256(b"".join(len(p).to_bytes(8, "little") + p for p in parts)).digest()


def extend_chain(chain: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int) -> None:
    """Appends to `chain` the identity of every full block of `token_ids` that it does not have yet."""
    for start in range(len(chain) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = chain[-1] if chain else root
        chain.append(hashlib.sha256(parent + array("i", token_ids[start : start + block_size]).tobytes()).digest())


class PrefixCache:
    """Finds and announces reusable prompt blocks in a block pool.

    fingerprint: whatever makes KV content differ for the same tokens (model revision, quantisation, KV format).
    """

    def __init__(self, pool: BlockPool, block_size: int, fingerprint: str, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._pool = pool
        self._block_size = block_size
        self._fingerprint = fingerprint
        self._in_flight: dict[bytes, int] = {}

    def root(self, cache_salt: str) -> bytes:
        """Start of the chain for one tenant."""
        return root_of(self._fingerprint, cache_salt)

    def extend(self, chain: list[bytes], root: bytes, token_ids: Sequence[int]) -> None:
        """Appends to `chain` the identity of every full block of `token_ids` that it does not have yet."""
        if self.enabled:
            extend_chain(chain, root, token_ids, self._block_size)

    def match(self, chain: Sequence[bytes], max_blocks: int) -> list[int]:
        """Blocks that hold the longest cached start of `chain`, at most `max_blocks`. Takes no references."""
        found: list[int] = []
        for content in chain[:max_blocks]:
            block_id = self._pool.find(content)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def announce(self, seq_id: int, chain: Sequence[bytes]) -> None:
        """Says that a running sequence is going to compute these blocks; the first to say so owns them."""
        for content in chain:
            self._in_flight.setdefault(content, seq_id)

    def is_in_flight(self, content: bytes) -> bool:
        """True when a running sequence is computing this block, so that waiting for it beats computing it again."""
        return content in self._in_flight

    def publish(self, seq_id: int, content: bytes, block_id: int) -> None:
        """Makes a computed block findable."""
        self._pool.publish(block_id, content)
        if self._in_flight.get(content) == seq_id:
            del self._in_flight[content]

    def withdraw(self, seq_id: int, chain: Sequence[bytes]) -> None:
        """Takes back what a sequence announced and did not compute (finished, preempted, aborted)."""
        for content in chain:
            if self._in_flight.get(content) == seq_id:
                del self._in_flight[content]

    @property
    def num_in_flight(self) -> int:
        """Blocks announced and not yet computed."""
        return len(self._in_flight)

    def clear(self) -> None:
        """Forgets everything reusable, for example after weights or KV scales changed."""
        self._pool.clear_cached()
