"""The step's own checks: parts that do not fit and indices outside their tables. What it computes: tests/runner."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from mxn_kernels.cpu import Workspace
from mxn_kernels.cpu_cache import LayerCache
from mxn_kernels.cpu_decoder import Decoder, Layer, Norm, Rotation
from mxn_kernels.cpu_step import STAGES, DecoderStep
from mxn_kernels.group_linear import GroupWeight, pack_groups
from mxn_kernels.int8_linear import Int8Weight, int8_linear, pack_int8
from mxn_kernels.packed_linear import packed_linear
from mxn_kernels.paged_attention import PagedBatch, paged_attention
from mxn_kernels.rms_norm import rms_norm
from torch.nn import functional

pytestmark = pytest.mark.torch

HIDDEN, HEADS, DIM, INNER, VOCAB = 40, 4, 16, 48, 50


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def make_decoder(workspace: Workspace) -> Decoder:
    def weight(n: int, k: int) -> Int8Weight:
        return pack_int8(random(n, k), workspace=workspace)

    norm = Norm(weight=random(HIDDEN), eps=1e-6)
    layer = Layer(
        qkv=(weight(HEADS * DIM, HIDDEN), weight(2 * DIM, HIDDEN), weight(2 * DIM, HIDDEN)),
        out=weight(HIDDEN, HEADS * DIM),
        gate=weight(INNER, HIDDEN),
        up=weight(INNER, HIDDEN),
        down=weight(HIDDEN, INNER),
        cache=LayerCache.allocate(num_blocks=4, block_size=16, num_kv_heads=2, key_dim=DIM, value_dim=DIM),
        num_heads=HEADS,
        scaling=0.25,
        activation="silu",
        before_attention=norm,
        before_mlp=norm,
        rotation=Rotation(cos=random(30, DIM // 2), sin=random(30, DIM // 2)),
    )
    return Decoder(embedding=random(VOCAB, HIDDEN), layers=(layer,), final_norm=norm, head=weight(VOCAB, HIDDEN))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def one_sequence(count: int, start: int = 0) -> tuple[torch.Tensor, PagedBatch]:
    """Positions and batch of `count` tokens in blocks 0 and 1."""
    positions = torch.arange(start, start + count)
    return positions, PagedBatch(ints(0, count), ints(start + count), ints(0, 1)[None], positions.int())


def test_head_and_embedding_are_the_ops_of_their_own(workspace: Workspace) -> None:
    decoder = dataclasses.replace(make_decoder(workspace), embedding_scale=2.0)
    step = DecoderStep(decoder, workspace)
    positions, batch = one_sequence(5)
    ids = torch.tensor([3, 1, 4, 1, 49])
    hidden = step.embed(ids, positions, batch)
    assert torch.equal(hidden, decoder.embedding[ids] * 2)
    logits = step.project(hidden, positions, batch, torch.tensor([4, 0]))
    normed = rms_norm(hidden[[4, 0]], decoder.final_norm.weight, 1e-6, workspace=workspace)
    assert torch.equal(logits, int8_linear(normed, decoder.head, workspace=workspace))


@pytest.mark.parametrize("change", [{}, {"logit_factor": 0.3, "logit_softcap": 2.0}])
def test_greedy_is_the_argmax_of_the_logits(workspace: Workspace, change: dict[str, Any]) -> None:
    decoder = dataclasses.replace(make_decoder(workspace), **change)
    head = random(1000, HIDDEN)
    head[700] = head[13]  # of equals the first
    decoder = dataclasses.replace(decoder, head=pack_int8(head, workspace=workspace), embedding=random(1000, HIDDEN))
    step = DecoderStep(decoder, workspace)
    positions, batch = one_sequence(20)
    rows = torch.arange(19, -1, -1)
    for ids in (torch.arange(20) * 37, torch.arange(20) + 500):
        logits = step(ids, positions, batch, rows)
        found, best = step.greedy(ids, positions, batch, rows)
        assert torch.equal(found, torch.from_numpy(logits.numpy().argmax(-1)))
        assert torch.equal(best, logits.amax(-1))


def test_greedy_says_which_rows_are_broken(workspace: Workspace) -> None:
    decoder = make_decoder(workspace)
    step = DecoderStep(decoder, workspace)
    decoder.embedding[7] = torch.nan
    positions, batch = one_sequence(2)
    batch = PagedBatch(ints(0, 1, 2), ints(1, 1), ints(0, 1)[:, None], ints(0, 16))
    found, best = step.greedy(torch.tensor([7, 8]), positions * 0, batch, torch.tensor([0, 1]))
    assert best.isfinite().tolist() == [False, True]
    assert found[1] == step(torch.tensor([7, 8]), positions * 0, batch, torch.tensor([1])).argmax()


def test_profile_adds_up_to_the_time_of_the_steps(workspace: Workspace) -> None:
    step = DecoderStep(make_decoder(workspace), workspace)
    positions, batch = one_sequence(20)
    call = (torch.arange(20), positions, batch, torch.tensor([19]))
    expected = step(*call)
    assert step.profile() == {}
    step.start_profile()
    started = time.perf_counter()
    for _ in range(5):
        assert torch.equal(step(*call), expected)
    elapsed = time.perf_counter() - started
    seconds = step.profile()
    assert list(seconds) == [*STAGES, "waiting"]
    assert 0 < sum(seconds.values()) < elapsed
    assert all(seconds[stage] > 0 for stage in ("attention", "gate and up", "head", "q, k, v"))
    assert seconds["norm of results"] == 0
    step.start_profile()
    assert not any(step.profile().values())
    step.stop_profile()
    assert step.profile() == {}


def test_layers_of_any_format_and_cache_type(workspace: Workspace) -> None:
    """Weights of one layer in different formats, keys in 8 bits, sinks: equal to the ops of their own."""
    decoder = make_decoder(workspace)
    formats = iter(("q4_0", "q4_1", "q8_0", "q4_0", "q8_0"))

    def weight(n: int, k: int) -> GroupWeight:
        return pack_groups(random(n, k), format=next(formats), workspace=workspace)

    shape = {"num_blocks": 4, "block_size": 16, "num_kv_heads": 2, "key_dim": DIM, "value_dim": DIM}
    layer = dataclasses.replace(
        decoder.layers[0],
        qkv=(weight(2 * HEADS * DIM, HIDDEN),),
        out=weight(HIDDEN, HEADS * DIM),
        gate=weight(INNER, HIDDEN),
        up=weight(INNER, HIDDEN),
        down=weight(HIDDEN, INNER),
        cache=LayerCache.allocate(**shape, kv_dtype="int8"),
        rotation=None,
        sinks=random(HEADS),
    )
    step = DecoderStep(dataclasses.replace(decoder, layers=(layer,)), workspace)
    positions, batch = one_sequence(20)
    hidden = random(20, HIDDEN)
    found = step.run_layer(0, hidden, positions, batch)

    def linear(x: torch.Tensor, packed: GroupWeight) -> torch.Tensor:
        return packed_linear(x, packed, workspace=workspace)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, layer.before_mlp.weight, 1e-6, workspace=workspace)

    heads = linear(norm(hidden), layer.qkv[0]).view(20, -1, DIM).transpose(0, 1)
    query, key, value = heads.split([HEADS, 2, 2])
    cache = LayerCache.allocate(**shape, kv_dtype="int8")
    attended = paged_attention(
        query, key, value, cache, batch, scaling=layer.scaling, sinks=layer.sinks, workspace=workspace
    )
    assert torch.equal(cache.keys, layer.cache.keys)
    between = hidden + linear(attended.flatten(1), layer.out)
    gated = functional.silu(linear(norm(between), layer.gate)) * linear(norm(between), layer.up)
    expected = between + linear(gated, layer.down)
    # The same roundings on both sides, but silu is computed apart: its last bit may tip a rounding to 8 bits.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float((expected - between).abs().max()))


def test_threads_and_a_given_buffer_change_nothing(workspace: Workspace) -> None:
    decoder = make_decoder(workspace)
    positions, batch = one_sequence(20)
    call = (torch.arange(20), positions, batch, torch.tensor([19]))
    expected = DecoderStep(decoder, workspace)(*call)
    other = DecoderStep(decoder, Workspace(3, workspace.library.isa))
    out = torch.empty(1, VOCAB)
    assert other(*call, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([0, VOCAB])}, r"token_ids\[1\] is 50; tokens are 0 to 50"),
        ({"ids": torch.tensor([-1, 0])}, r"token_ids\[0\] is -1"),
        ({"ids": ints(1, 2)}, r"token_ids must be contiguous int64 \(2,\), found torch.int32"),
        ({"positions": torch.tensor([0, 30])}, r"positions\[1\] is 30; positions are 0 to 30"),
        ({"rows": torch.tensor([2])}, r"logit_rows\[0\] is 2; rows are 0 to 2"),
        ({"out": torch.empty(2, VOCAB)}, r"out must be contiguous float32 \(1, 50\)"),
        ({"batch": PagedBatch(ints(0, 2), ints(2), ints(9, 9)[None], ints(0, 1))}, "block_table row 0 names block 9"),
    ],
)
def test_index_outside_its_table_is_refused(workspace: Workspace, change: dict[str, Any], message: str) -> None:
    step = DecoderStep(make_decoder(workspace), workspace)
    positions, batch = one_sequence(2)
    given = {"ids": torch.tensor([1, 2]), "positions": positions, "batch": batch, "rows": torch.tensor([1])} | change
    with pytest.raises(ValueError, match=message):
        step(given["ids"], given["positions"], given["batch"], given["rows"], out=given.get("out"))
    assert (step.decoder.layers[0].cache.keys == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "layer 0: heads must be a multiple of 2 KV heads, found 3"),
        ({"num_heads": 6}, "qkv must be 96 x 40, found 64 x 40"),
        ({"qkv": ()}, "qkv must be one weight or 3, found 0"),
        (
            {"query_norm": Norm(weight=torch.ones(17), eps=1e-6)},
            r"query_norm.weight must be contiguous float32 \(64,\)",
        ),
        (
            {"before_mlp": Norm(weight=torch.ones(HIDDEN).half(), eps=1e-6)},
            "before_mlp.weight must be contiguous float32",
        ),
        ({"rotation": Rotation(cos=torch.ones(9, 9), sin=torch.ones(9, 9))}, "at most 8"),
        ({"rotation": Rotation(cos=torch.ones(9, 8), sin=torch.ones(8, 8))}, "rotation.sin must be"),
        ({"sinks": torch.ones(3)}, r"sinks must be contiguous float32 \(4,\)"),
        ({"down": None}, "gate, up and down must be there together, down is not"),
        ({"window": 0}, "window must be None or at least 1, found 0"),
        ({"softcap": -1.0}, "softcap must be None or positive"),
        ({"activation": "relu"}, "activation must be one of silu, gelu_tanh, found relu"),
    ],
)
def test_part_that_does_not_fit_is_named(workspace: Workspace, change: dict[str, Any], message: str) -> None:
    decoder = make_decoder(workspace)
    layer = dataclasses.replace(decoder.layers[0], **change)
    with pytest.raises(ValueError, match=message):
        DecoderStep(dataclasses.replace(decoder, layers=(layer,)), workspace)


def test_channels_share_memory_and_must_be_whole_panels(workspace: Workspace) -> None:
    weight = pack_int8(random(100, 40), workspace=workspace)
    x = random(3, 40)
    whole = int8_linear(x, weight, workspace=workspace)
    part = weight.channels(32, 64)
    assert part.panels.data_ptr() == weight.panels.data_ptr() + 32 * 64
    assert torch.equal(int8_linear(x, part, workspace=workspace), whole[:, 32:64])
    assert torch.equal(int8_linear(x, weight.channels(64, 100), workspace=workspace), whole[:, 64:])
    for first, last in ((16, 64), (0, 50), (64, 64), (96, 101)):
        with pytest.raises(ValueError, match="channels must"):
            weight.channels(first, last)
