"""The block pool under random use, against a plain model of who holds what."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mxn.engine.block_pool import BlockPool

NUM_BLOCKS = 8


class BlockPoolMachine(RuleBasedStateMachine):
    """Random allocation, sharing, publishing and giving back; the books must always balance."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.contents = 0

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            with pytest.raises(ValueError, match="are free"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & {b for table in self.tables for b in table}
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        if table:
            content = data.draw(st.sampled_from([b"a", b"b", b"c", str(self.contents).encode()]))
            block = data.draw(st.sampled_from(table))
            if self.pool._hashes[block] is None:  # a block is published once
                self.contents += 1
                self.pool.publish(block, content)
                assert self.pool.find(content) is not None

    @rule(content=st.sampled_from([b"a", b"b", b"c"]))
    def share(self, content: bytes) -> None:
        block = self.pool.find(content)
        if block is not None:
            self.pool.share(block)
            self.tables.append([block])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    @rule()
    def clear(self) -> None:
        self.pool.clear_cached()
        assert self.pool.num_cached == 0

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity(self.tables)
        held = {b for table in self.tables for b in table}
        assert self.pool.num_free == NUM_BLOCKS - len(held)


BlockPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockPool = BlockPoolMachine.TestCase


def test_giving_back_twice_is_an_error() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="more often"):
        pool.release(blocks)


def test_leaves_are_evicted_before_their_roots() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block, content in zip(blocks, (b"root", b"middle", b"leaf"), strict=True):
        pool.publish(block, content)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.find(b"leaf") is None
    assert pool.find(b"root") == blocks[0]
    assert pool.num_evictions == 1


def test_blank_blocks_are_used_before_reusable_ones() -> None:
    pool = BlockPool(2)
    first = pool.allocate(1)
    pool.publish(first[0], b"kept")
    pool.release(first)
    pool.allocate(1)
    assert pool.find(b"kept") == first[0]


def test_a_block_in_use_twice_is_noticed() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="held by 2"):
        pool.check_integrity([blocks, blocks])
