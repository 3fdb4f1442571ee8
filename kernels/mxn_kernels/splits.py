"""How many programs share one sequence's tokens in decode: pure arithmetic, the same for a launch and for its plan."""

from __future__ import annotations

MAX_SPLITS = 128
# Programs per multiprocessor. To fill: a few run side by side, and all must have one. To balance: several rounds of
# them,
# so that the last round, or a long sequence among short ones, costs little.
FILL, FILL_TILES = 4, 2
BALANCE, BALANCE_TILES = 16, 8  # a split of 8 tiles writes and reads back about 2 % of the bytes that it attends over


def decode_splits(
    num_seqs: int, num_kv_heads: int, max_context: int, window: int | None, tile_tokens: int, num_multiprocessors: int
) -> int:
    """A power of two from 1 to 128.

    Towards four programs per multiprocessor while each has two tiles, and on towards sixteen while each has eight.
    Source: TensorRT-LLM's Triton paged attention for the first; the second is ours.
    """
    programs = num_seqs * num_kv_heads
    tokens = max_context if window is None else min(window, max_context)
    if programs == 0:
        return 1
    fill = min(FILL * num_multiprocessors // programs, tokens // (FILL_TILES * tile_tokens))
    balance = min(BALANCE * num_multiprocessors // programs, tokens // (BALANCE_TILES * tile_tokens))
    return _power_of_two_at_most(max(1, min(MAX_SPLITS, max(fill, balance))))


def prefix_splits(
    num_tiles: int, num_kv_heads: int, prefix_tokens: int, tile_tokens: int, num_multiprocessors: int
) -> int:
    """The same for the pass over a shared prefix: towards two programs, tiles of query rows, per multiprocessor."""
    wanted = -(-2 * num_multiprocessors // max(1, num_tiles * num_kv_heads))
    affordable = prefix_tokens // (2 * FILL_TILES * tile_tokens)
    return _power_of_two_at_most(max(1, min(wanted, affordable, MAX_SPLITS)))


def _power_of_two_at_most(number: int) -> int:
    return 1 << (number.bit_length() - 1)
