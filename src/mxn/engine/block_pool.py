"""KV blocks: who holds them, which hold reusable content, which may be given out next."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out KV blocks and remembers, by content hash, what finished blocks hold.

    | state of a block | ref count | hash | where |
    |---|---|---|---|
    | in use | >= 1 | set once full and computed | nowhere else |
    | free, nothing worth keeping | 0 | none | `_blank`, given out first |
    | free, reusable | 0 | set | `_cached`, least recently freed is evicted first |

    journal: when it is a dict, what became findable (True) or was forgotten (False) is noted there; its reader empties
      it.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least 1 block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self.journal: dict[bytes, bool] | None = None
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, reusable content included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be reused."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Gives `count` blocks with one reference each, evicting reusable content when blank ones run out.

        Raises: ValueError when fewer are free; check `num_free` first.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} are free")
        block_ids = []
        for _ in range(count):
            if self._blank:
                block_id = self._blank.pop()
            else:
                block_id, _ = self._cached.popitem(last=False)
                self._forget(block_id)
                self.num_evictions += 1
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def find(self, content: bytes) -> int | None:
        """The block that holds this content, or None. Takes no reference."""
        return self._block_of.get(content)

    def is_free(self, block_id: int) -> bool:
        """True when nobody holds the block."""
        return self._ref_counts[block_id] == 0

    def share(self, block_id: int) -> None:
        """Takes one more reference to a block that is in use or still holds reusable content."""
        if self._ref_counts[block_id] == 0:
            del self._cached[block_id]
        self._ref_counts[block_id] += 1

    def publish(self, block_id: int, content: bytes) -> None:
        """Says what a full, computed block holds. The first block with a content stays the one that is found."""
        if content not in self._block_of:
            self._block_of[content] = block_id
            self._hashes[block_id] = content
            if self.journal is not None:
                self.journal[content] = True

    def release(self, block_ids: Sequence[int]) -> None:
        """Gives one reference of each block back, last block first, so that leaves are evicted before their roots."""
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id]
            if count < 1:
                raise ValueError(f"block {block_id} is given back more often than it was taken")
            self._ref_counts[block_id] = count - 1
            if count == 1:
                if self._hashes[block_id] is None:
                    self._blank.append(block_id)
                else:
                    self._cached[block_id] = None

    def clear_cached(self) -> None:
        """Forgets all reusable content; blocks in use lose their hash and are blank when given back."""
        if self.journal is not None:
            self.journal.update(dict.fromkeys(self._block_of, False))
        self._blank.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hashes = [None] * self.num_blocks

    def keep_journal(self) -> None:
        """Begins the journal with all that is findable now."""
        self.journal = dict.fromkeys(self._block_of, True)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compares the books with the block tables of all living sequences.

        Raises: AssertionError naming the first block whose state is impossible.
        """
        held = Counter(block_id for table in tables for block_id in table)
        free = Counter([*self._blank, *self._cached])
        for block_id in range(self.num_blocks):
            refs, content = self._ref_counts[block_id], self._hashes[block_id]
            problem = None
            if refs != held[block_id]:
                problem = f"has {refs} references but is held by {held[block_id]} sequences"
            elif free[block_id] != (refs == 0):
                problem = f"has {refs} references and stands {free[block_id]} times in the free lists"
            elif content is not None and self._block_of.get(content) != block_id:
                problem = "has a hash under which another block is found"
            elif refs == 0 and (content is not None) != (block_id in self._cached):
                problem = "is free in the wrong list"
            if problem:
                raise AssertionError(f"block {block_id} {problem}")
        if len(self._block_of) != sum(h is not None for h in self._hashes):
            raise AssertionError("a hash points to a block that does not carry it")

    def _forget(self, block_id: int) -> None:
        content = self._hashes[block_id]
        if content is not None:
            del self._block_of[content]
            self._hashes[block_id] = None
            if self.journal is not None:
                self.journal[content] = False
