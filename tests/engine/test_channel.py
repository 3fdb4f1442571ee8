"""Frames between gateway and replica: round trips and hostile bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from mxn.core.request import FinishReason, SamplingParams, SequenceOutput, SequenceRequest, TokenLogprob
from mxn.engine.channel import ChannelError, ReplicaChannel, messages_of, pack, receive_from_replica
from mxn.engine.messages import MAX_FRAME_BYTES, Abort, ResetPrefixCache, Start, StepDone, Stop
from mxn.engine.stats import EngineStats

Pair = tuple[socket.socket, ReplicaChannel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    channel = ReplicaChannel(theirs)
    yield ours, channel
    channel.close()
    ours.close()


def test_messages_to_a_replica_survive_the_wire(pair: Pair) -> None:
    ours, channel = pair
    sampling = SamplingParams(max_tokens=3, logit_bias=((5, -1.5),), stop_token_ids=(1, 2), seed=2**62)
    request = SequenceRequest(seq_id=7, prompt_token_ids=[1, 2, 3], sampling=sampling, cache_salt="s", priority=-1)
    for message in (Start(request), Abort([1, 2]), Stop()):
        ours.sendall(pack(message))
        assert channel.receive() == message
    ours.close()
    assert channel.receive() is None


async def test_messages_to_the_gateway_survive_the_wire(pair: Pair) -> None:
    ours, channel = pair
    output = SequenceOutput(
        seq_id=1,
        token_ids=[4],
        logprobs=[TokenLogprob(token_id=4, logprob=-0.25, top=((4, -0.25), (5, -2.0)))],
        prompt_logprobs=[None, TokenLogprob(token_id=2, logprob=-1.0)],
        finish_reason=FinishReason.STOP,
    )
    message = StepDone([output], EngineStats(num_steps=3, busy_s=0.5))
    channel.send(message)
    reader, writer = await asyncio.open_connection(sock=ours)
    assert await receive_from_replica(reader) == message
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "frame",
    [
        (MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
        b"\x03\x00\x00\x00\xff\xff\xff",
        b"\x01\x00\x00\x00\xc0",
        pack(StepDone([], EngineStats())),  # a message, but not one for a replica
    ],
)
def test_bytes_that_are_no_message_are_refused(pair: Pair, frame: bytes) -> None:
    ours, channel = pair
    ours.sendall(frame)
    with pytest.raises(ChannelError):
        channel.receive()


def test_half_a_frame_is_the_end_of_the_connection(pair: Pair) -> None:
    ours, channel = pair
    ours.sendall(b"\x10\x00\x00\x00abc")
    ours.close()
    assert channel.receive() is None


def test_frames_that_came_otherwise_than_over_a_socket_are_read_whole_or_refused() -> None:
    frames = pack(Abort([1])) + pack(ResetPrefixCache())
    assert messages_of(frames) == [Abort([1]), ResetPrefixCache()]
    assert messages_of(b"") == []
    with pytest.raises(ChannelError, match="after the last whole frame"):
        messages_of(frames[:-1])
