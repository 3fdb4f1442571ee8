"""The gateway's picture of a replica's prefix cache."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.backends.base import PagedKV
from mxn.core.request import SamplingParams, SequenceRequest
from mxn.engine.paged import BlockPlacement
from mxn.engine.prefix_cache import HEAD_BYTES
from mxn.engine.sequence import Sequence
from mxn.fleet.prefixes import BLOCK_TOKENS, PrefixIndex, prompt_heads

SIZE = 4


def sequence(placement: BlockPlacement, seq_id: int, prompt: list[int], salt: str = "") -> Sequence:
    request = SequenceRequest(seq_id=seq_id, prompt_token_ids=prompt, sampling=SamplingParams(), cache_salt=salt)
    return Sequence(request, arrival=seq_id, seed=0, root=placement.root(salt))


def compute(placement: BlockPlacement, found: Sequence) -> None:
    """Runs a prompt through the placement and gives its rooms back."""
    placement.queue(found)
    placement.start(found, 0)
    assert placement.reserve(found, len(found.token_ids) - found.num_computed_tokens)
    found.num_computed_tokens = len(found.token_ids)
    placement.commit(found)
    placement.release(found)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.sampled_from(["a", "b"])),
        min_size=1,
        max_size=20,
    ),
    st.integers(8, 20),
    st.booleans(),
)
def test_reports_foretell_just_what_the_replica_finds(
    prompts: list[tuple[list[int], str]], num_blocks: int, clears: bool
) -> None:
    placement = BlockPlacement(PagedKV(num_blocks=num_blocks, block_size=SIZE), "kind", prefix_cache=True)
    index = PrefixIndex(fingerprint="kind", block_size=SIZE, num_blocks=num_blocks)
    compute(placement, sequence(placement, 0, [1, 1, 1, 1, 1]))
    placement.report_changes()
    for i, (prompt, salt) in enumerate(prompts, 1):
        if (changes := placement.take_changes()) is not None:
            index.report(*changes)
        found = sequence(placement, i, prompt, salt)
        placement.queue(found)
        hits = placement.cache.match(found.block_chain, (len(prompt) - 1) // SIZE)
        heads = prompt_heads("kind", SIZE, salt, prompt)
        assert index.num_cached_tokens(heads) == len(hits) * SIZE
        compute(placement, sequence(placement, i, prompt, salt))
        if clears and i == len(prompts) // 2:
            placement.clear()
    if (changes := placement.take_changes()) is not None:
        index.report(*changes)
    assert len(index) <= num_blocks


def test_tenants_and_kinds_of_kv_share_nothing() -> None:
    prompt = list(range(40))
    index = PrefixIndex(fingerprint="kind", block_size=SIZE, num_blocks=100)
    index.expect(prompt_heads("kind", SIZE, "tenant", prompt))
    assert index.num_cached_tokens(prompt_heads("kind", SIZE, "tenant", prompt)) == 36
    assert index.num_cached_tokens(prompt_heads("kind", SIZE, "other", prompt)) == 0
    assert index.num_cached_tokens(prompt_heads("else", SIZE, "tenant", prompt)) == 0


def test_memory_is_bounded_and_what_was_sent_last_stays() -> None:
    index = PrefixIndex(fingerprint="", block_size=0, num_blocks=0)
    for i in range(500):
        index.expect(prompt_heads("", BLOCK_TOKENS, "", [i] * 1025))
    assert len(index) == 4096
    assert index.num_cached_tokens(prompt_heads("", BLOCK_TOKENS, "", [499] * 1025)) == 1024
    assert index.num_cached_tokens(prompt_heads("", BLOCK_TOKENS, "", [0] * 1025)) == 0


def test_an_evicted_root_makes_the_rest_worthless() -> None:
    heads = prompt_heads("kind", SIZE, "", list(range(17)))
    index = PrefixIndex(fingerprint="kind", block_size=SIZE, num_blocks=100)
    index.report(b"".join(heads), b"")
    assert all(len(head) == HEAD_BYTES for head in heads)
    index.report(b"", heads[1])
    assert index.num_cached_tokens(heads) == SIZE
