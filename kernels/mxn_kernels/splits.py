"""How many programs share one sequence's tokens in decode: pure arithmetic, the same for a launch and for its plan."""

from __future__ import annotations

MAX_SPLITS = 128
WAVES = 4  # programs per multiprocessor to aim for: enough to even out, few enough that partial results stay small
MIN_TILES = 2  # per split: below, starting and merging cost more than the tokens


def decode_splits(
    num_seqs: int, num_kv_heads: int, max_context: int, window: int | None, tile_tokens: int, num_multiprocessors: int
) -> int:
    """A power of two from 1 to 128.

    One where the batch fills the chip twice by itself; else towards four programs per multiprocessor, two tiles at
    least
    for each. Source: TensorRT-LLM's Triton paged attention.
    """
    programs = num_seqs * num_kv_heads
    tokens = max_context if window is None else min(window, max_context)
    if programs == 0 or programs >= 2 * num_multiprocessors:
        return 1
    wanted = -(-WAVES * num_multiprocessors // programs)
    affordable = tokens // (MIN_TILES * tile_tokens)
    return _power_of_two_at_most(max(1, min(wanted, affordable, MAX_SPLITS)))


def prefix_splits(
    num_tiles: int, num_kv_heads: int, prefix_tokens: int, tile_tokens: int, num_multiprocessors: int
) -> int:
    """The same for the pass over a shared prefix, whose programs are tiles of query rows. One wave: they are long."""
    wanted = -(-num_multiprocessors // max(1, num_tiles * num_kv_heads))
    affordable = prefix_tokens // (2 * MIN_TILES * tile_tokens)
    return _power_of_two_at_most(max(1, min(wanted, affordable, MAX_SPLITS)))


def _power_of_two_at_most(number: int) -> int:
    return 1 << (number.bit_length() - 1)
