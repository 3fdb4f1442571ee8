"""KV in blocks of a few tokens: a block table for each sequence, blocks with equal content shared."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from mxn.backends.base import KVCopy, PagedKV
from mxn.engine.block_pool import BlockPool
from mxn.engine.placement import Changes, Start
from mxn.engine.prefix_cache import HEAD_BYTES, PrefixCache
from mxn.engine.sequence import Sequence


class BlockPlacement:
    """Placement over a block pool and a prefix cache; see `mxn.engine.placement.Placement`."""

    def __init__(self, kv: PagedKV, fingerprint: str, *, prefix_cache: bool) -> None:
        self.num_rooms = kv.num_blocks
        self.room_tokens = kv.block_size
        self.max_tokens = kv.num_blocks * kv.block_size
        self.pool = BlockPool(kv.num_blocks)
        self.cache = PrefixCache(self.pool, kv.block_size, fingerprint, enabled=prefix_cache)

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    def root(self, cache_salt: str) -> bytes:
        return self.cache.root(cache_salt)

    def queue(self, sequence: Sequence) -> None:
        self.cache.extend(sequence.block_chain, sequence.root, sequence.token_ids)

    def start(self, sequence: Sequence, num_promised: int) -> Start:
        # At least one token is computed anew: its logits are needed.
        reusable = (len(sequence.token_ids) - 1) // self.room_tokens if sequence.may_reuse_prefix else 0
        reusable = min(reusable, len(sequence.block_chain))
        hits = self.cache.match(sequence.block_chain, reusable)
        if len(hits) < reusable and self.cache.is_in_flight(sequence.block_chain[len(hits)]):
            return Start.WAITS
        needed = self._num_blocks(len(sequence.token_ids)) - len(hits)
        taken_from_free = sum(self.pool.is_free(block_id) for block_id in hits)
        if needed + taken_from_free + num_promised > self.pool.num_free:
            return Start.FULL
        for block_id in hits:
            self.pool.share(block_id)
        sequence.block_ids = array("i", hits)
        sequence.num_published_blocks = len(hits)
        sequence.num_computed_tokens = len(hits) * self.room_tokens
        self.cache.announce(sequence.seq_id, sequence.block_chain[len(hits) : reusable])
        return Start.STARTED

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        return self._num_blocks(sequence.num_computed_tokens + num_tokens) - len(sequence.block_ids)

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = self.num_missing(sequence, num_tokens)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            sequence.block_ids.extend(self.pool.allocate(missing))
        return True

    def commit(self, sequence: Sequence) -> None:
        """Announces the blocks that became full."""
        self.cache.extend(sequence.block_chain, sequence.root, sequence.token_ids)
        num_full = min(sequence.num_computed_tokens // self.room_tokens, len(sequence.block_chain))
        for i in range(sequence.num_published_blocks, num_full):
            self.cache.publish(sequence.seq_id, sequence.block_chain[i], sequence.block_ids[i])
        sequence.num_published_blocks = max(sequence.num_published_blocks, num_full)

    def release(self, sequence: Sequence) -> None:
        self.cache.withdraw(sequence.seq_id, sequence.block_chain[sequence.num_published_blocks :])
        self.pool.release(sequence.block_ids)
        sequence.block_ids = array("i")
        sequence.num_published_blocks = 0

    def take_copies(self) -> list[KVCopy]:
        return []

    def clear(self) -> None:
        self.cache.clear()

    def report_changes(self) -> None:
        self.pool.keep_journal()

    def take_changes(self) -> Changes | None:
        journal = self.pool.journal
        if not journal:
            return None
        self.pool.journal = {}
        heads = {True: bytearray(), False: bytearray()}
        for content, is_stored in journal.items():
            heads[is_stored] += content[:HEAD_BYTES]
        return bytes(heads[True]), bytes(heads[False])

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        self.pool.check_integrity(sequence.block_ids for sequence in sequences)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.room_tokens)
