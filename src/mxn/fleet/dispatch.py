"""Sequences of one deployment on their way to replicas: in line, by the router to one, to another when it dies."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from mxn.core.request import SequenceRequest
from mxn.engine.messages import ReplicaInfo
from mxn.errors import OverloadedError, ReplicaDiedError, UnavailableError
from mxn.fleet.keeper import Keeper
from mxn.fleet.line import Departures, WaitingLine
from mxn.fleet.meter import Meter
from mxn.fleet.prefixes import PrefixIndex, prompt_heads
from mxn.fleet.relay import RelayedStream
from mxn.fleet.replica import RunningReplica
from mxn.fleet.router import Candidate, Work, choose, first_tokens_s
from mxn.fleet.spec import DeploymentSpec

_AHEAD_SHARE = 8
"""A replica is given its `max_num_seqs` and one eighth more, so that its next sequences are there when others end."""

_OUTPUT_TOKENS = 128.0
"""Output tokens expected of a sequence while no replica has finished any."""

_TOKENS_PER_S = 1000.0
"""Capacity supposed while neither a measurement nor a plan tells: equal for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighed:
    """A replica as the router sees it for one request. first_token_s: when its first token is to be expected."""

    replica_id: str
    candidate: Candidate
    first_token_s: float
    has_room: bool
    is_chosen: bool


class _Post:
    """A replica that has become ready, and what the router knows of it."""

    def __init__(self, keeper: Keeper, replica: RunningReplica, info: ReplicaInfo) -> None:
        self.keeper = keeper
        self.replica = replica
        self.info = info
        self.meter = Meter()
        self.ready_since_s = time.monotonic()
        self.work_tokens = 0.0
        max_num_seqs = keeper.placement.settings.max_num_seqs
        self.max_streams = max_num_seqs + max(1, max_num_seqs // _AHEAD_SHARE)
        self.prefixes = PrefixIndex(
            fingerprint=info.prefix_fingerprint, block_size=info.block_size, num_blocks=info.num_blocks
        )
        self.is_watched = False

    @property
    def has_room(self) -> bool:
        return self.keeper.is_ready and self.replica.num_streams < self.max_streams

    def watch(self) -> None:
        """Has the replica report its prefix blocks from now on."""
        if not self.is_watched:
            self.is_watched = True
            if self.info.prefix_fingerprint:
                self.replica.watch_blocks(self.prefixes.report)


class Dispatch:
    """Gives sequences to replicas that have room; the others wait, in order of priority and arrival.

    Few sequences more than a replica runs at once are sent to it, so that those who wait can still go to whichever
    replica is free first, and are told when the wait is too long.
    keepers: those of the deployment as they are now. accepts: whether a sequence may wait though nothing is ready.
    num_moves: sequences that went back into line because their replica ended, so far.
    """

    def __init__(
        self, spec: DeploymentSpec, keepers: Callable[[], Iterable[Keeper]], accepts: Callable[[], bool]
    ) -> None:
        self.spec = spec
        self.num_moves = 0
        self._keepers = keepers
        self._accepts = accepts
        self._posts: dict[str, _Post] = {}
        self._line: WaitingLine[tuple[RelayedStream, float]] = WaitingLine()
        self._returning: list[RelayedStream] = []
        self._departures = Departures()
        self._seq_ids = itertools.count(1)

    @property
    def num_waiting(self) -> int:
        """Sequences that no replica has yet, or any more."""
        return len(self._line) + len(self._returning)

    def new_seq_id(self) -> int:
        """An id that no sequence of this deployment had."""
        return next(self._seq_ids)

    def check(self, tier: int) -> None:
        """Raises OverloadedError or UnavailableError unless a sequence of this tier would be taken now."""
        if not self._can_place_at_once:
            self._check_wait(tier)

    def submit(self, request: SequenceRequest) -> RelayedStream:
        """Gives the sequence to a replica or lets it wait.

        Raises: OverloadedError when the line is full or too slow; UnavailableError when nothing is ready or to be.
        """
        relay = RelayedStream(request, self, self._line.arrive())
        if not self.num_waiting and self._place(relay):
            return relay
        if self._check_wait(request.priority):
            self._displace_last()
        self._wait(relay)
        self._line.push(request.priority, relay.arrival, (relay, time.monotonic()))
        return relay

    def refresh(self) -> None:
        """A keeper has changed, come or gone."""
        keepers = {keeper.id: keeper for keeper in self._keepers()}
        for gone in self._posts.keys() - keepers.keys():
            del self._posts[gone]
        for keeper in keepers.values():
            replica = keeper.replica
            post = self._posts.get(keeper.id)
            if replica is not None and replica.info is not None and (post is None or post.replica is not replica):
                self._posts[keeper.id] = _Post(keeper, replica, replica.info)
        if len(self._posts) > 1:
            for post in self._posts.values():
                post.watch()
        self._pump()
        if self.num_waiting and not self._has_hope():
            self.refuse_all(f'model "{self.spec.name}" cannot serve any more')

    def refuse_all(self, why: str) -> None:
        """Ends the wait of all who are in line."""
        for relay in [*self._returning, *(relay for relay, _ in self._line)]:
            self.leave(relay)
            relay.refuse(relay.loss or UnavailableError(why))

    def weigh(self, request: SequenceRequest) -> list[Weighed]:
        """How the router sees every ready replica for this request at the moment. Sends nothing anywhere."""
        posts = [post for post in self._posts.values() if post.keeper.is_ready]
        if not posts:
            return []
        work = self._work_of(request)
        candidates, _ = self._candidates(posts, request)
        open_ones = [index for index, post in enumerate(posts) if post.has_room]
        first_s = first_tokens_s(candidates, work)
        best = open_ones[choose([candidates[i] for i in open_ones], work)] if open_ones else None
        return [
            Weighed(
                replica_id=post.keeper.id,
                candidate=candidate,
                first_token_s=first_s[index],
                has_room=post.has_room,
                is_chosen=index == best,
            )
            for index, (post, candidate) in enumerate(zip(posts, candidates, strict=True))
        ]

    # ------------------------------------------------------------------ for relayed streams

    def take_back(self, relay: RelayedStream) -> bool:
        """Finds a sequence another replica, before all who have none yet."""
        self.num_moves += 1
        if self._place(relay):
            return True
        if not self._has_hope():
            return False
        self._wait(relay)
        self._returning.append(relay)
        return True

    def leave(self, relay: RelayedStream) -> None:
        """Takes a sequence out of the line, if it is there."""
        if relay in self._returning:
            self._returning.remove(relay)
        elif relay.deadline is not None:
            self._line.remove(relay.request.priority, relay.arrival)
        if relay.deadline is not None:
            relay.deadline.cancel()
            relay.deadline = None

    # ------------------------------------------------------------------ the line

    @property
    def _can_place_at_once(self) -> bool:
        return not self.num_waiting and any(post.has_room for post in self._posts.values())

    def _check_wait(self, tier: int) -> bool:
        """True when the last one of a lower tier must go to make room in line.

        Raises: OverloadedError or UnavailableError unless one more of this tier may wait.
        """
        spec = self.spec
        ready = [post for post in self._posts.values() if post.keeper.is_ready]
        if not ready and not self._accepts():
            reasons = [keeper.reason for keeper in self._keepers() if keeper.reason]
            why = reasons[0] if reasons else "none of its replicas is ready"
            raise UnavailableError(f'model "{spec.name}" cannot serve now: {why}')
        num_open = self.num_waiting + sum(post.replica.num_streams for post in ready)
        limit = spec.max_queue + sum(post.keeper.placement.settings.max_num_seqs for post in ready)
        now_s = time.monotonic()
        if num_open >= limit and self._line.last_tier() <= tier:
            raise OverloadedError(
                f'model "{spec.name}" has {num_open} sequences in line, the limit is {limit}; retry later',
                retry_after_s=self._retry_after_s(now_s),
            )
        wait_s = self._departures.wait_s(len(self._line), now_s)
        if wait_s is not None and wait_s > spec.max_wait_s and self._line.last_tier() <= tier:
            raise OverloadedError(
                f'model "{spec.name}" would begin in about {wait_s:.0f} s, the limit is {spec.max_wait_s:g} s; '
                "retry later",
                retry_after_s=self._retry_after_s(now_s),
            )
        return num_open >= limit

    def _displace_last(self) -> None:
        relay, _ = self._line.last()
        self.leave(relay)
        relay.refuse(
            OverloadedError(
                f'model "{self.spec.name}" is asked for more than it can serve, and requests of higher priority came; '
                "retry later",
                retry_after_s=self._retry_after_s(time.monotonic()),
            )
        )

    def _wait(self, relay: RelayedStream) -> None:
        loop = asyncio.get_running_loop()
        relay.deadline = loop.call_later(self.spec.max_wait_s, self._expire, relay)

    def _expire(self, relay: RelayedStream) -> None:
        self.leave(relay)
        name, waited = self.spec.name, f"waited {self.spec.max_wait_s:g} s for a replica, the limit"
        if relay.loss is not None:
            relay.refuse(relay.loss)
        elif any(post.keeper.is_ready for post in self._posts.values()):
            relay.refuse(
                OverloadedError(
                    f'the request {waited}; model "{name}" is overloaded, retry later',
                    retry_after_s=self._retry_after_s(time.monotonic()),
                )
            )
        else:
            relay.refuse(
                UnavailableError(f'the request {waited}; model "{name}" has none that is ready{self._progress()}')
            )

    def _progress(self) -> str:
        """How far a replica that is loading is."""
        loading = [keeper for keeper in self._keepers() if keeper.state == "loading" and keeper.load_phase]
        return f" yet ({loading[0].load_phase}, {loading[0].load_fraction:.0%})" if loading else ""

    def _retry_after_s(self, now_s: float) -> float:
        """Seconds until about half of the line has been served."""
        wait_s = self._departures.wait_s(len(self._line), now_s)
        return 1.0 if wait_s is None else min(60.0, max(1.0, math.ceil(0.5 * wait_s)))

    def _has_hope(self) -> bool:
        """True while a replica serves or is on the way to."""
        return any(keeper.state in ("ready", "loading", "starting") for keeper in self._keepers()) or self._accepts()

    def _pump(self) -> None:
        """Sends off those who wait, as far as there is room."""
        if self._returning:
            returning, self._returning = self._returning, []
            self._returning = [relay for relay in returning if not self._place(relay)]
        while (entry := self._line.first()) is not None:
            relay, since_s = entry
            if not self._place(relay, since_s):
                break
            self._line.pop()
        if not self._line:
            self._departures.clear()

    # ------------------------------------------------------------------ to a replica

    def _place(self, relay: RelayedStream, since_s: float | None = None) -> bool:
        """Gives a sequence to the best replica that has room; False when none has. since_s: it waited since then."""
        while posts := [post for post in self._posts.values() if post.has_room and relay.suits(post.info)]:
            request = relay.request
            work = self._work_of(request)
            post = posts[0] if len(self._posts) == 1 else self._choose(posts, request, work)
            if since_s is not None:
                request = replace(request, waited_s=time.monotonic() - since_s)
            try:
                stream = post.replica.submit(request)
            except ReplicaDiedError:
                continue
            tokens = work.prompt_tokens + work.output_tokens
            post.work_tokens += tokens
            stream.on_end = partial(self._ended, post, tokens)
            relay.begin(stream, post.info)
            return True
        return False

    def _work_of(self, request: SequenceRequest) -> Work:
        means = [p.meter.mean_output_tokens for p in self._posts.values() if p.meter.mean_output_tokens is not None]
        mean = sum(means) / len(means) if means else _OUTPUT_TOKENS
        return Work(
            prompt_tokens=len(request.prompt_token_ids) + len(request.output_token_ids),
            output_tokens=min(request.sampling.max_tokens, mean),
            ttft_slo_s=self.spec.ttft_slo_s,
        )

    def _choose(self, posts: list[_Post], request: SequenceRequest, work: Work) -> _Post:
        candidates, heads = self._candidates(posts, request)
        post = posts[choose(candidates, work)]
        post.prefixes.expect(heads[post.prefixes.fingerprint, post.prefixes.block_size])
        return post

    def _candidates(
        self, posts: Iterable[_Post], request: SequenceRequest
    ) -> tuple[list[Candidate], dict[tuple[str, int], list[bytes]]]:
        """What is known of each replica for this request, and hashes of its prompt by kind of prefix cache."""
        now_s = time.monotonic()
        heads: dict[tuple[str, int], list[bytes]] = {}
        candidates = []
        for post in posts:
            index = post.prefixes
            key = (index.fingerprint, index.block_size)
            if key not in heads:
                heads[key] = prompt_heads(*key, request.cache_salt, request.prompt_token_ids)
            post.meter.note(post.replica.stats)
            candidates.append(self._candidate(post, index.num_cached_tokens(heads[key]), now_s))
        return candidates, heads

    def _candidate(self, post: _Post, cached_tokens: int, now_s: float) -> Candidate:
        meter, placement = post.meter, post.keeper.placement
        peers = [p.meter.tokens_per_s for p in self._posts.values() if p.meter.tokens_per_s is not None]
        rate = meter.tokens_per_s or placement.output_tokens_per_s or (sum(peers) / len(peers) if peers else None)
        rate = rate or _TOKENS_PER_S
        prices = [p.meter.prompt_token_s for p in self._posts.values() if p.meter.prompt_token_s is not None]
        price_s = meter.prompt_token_s or (sum(prices) / len(prices) if prices else 1 / rate)
        joules = meter.joules_per_token if meter.joules_per_token is not None else placement.joules_per_token
        return Candidate(
            work_tokens=post.work_tokens,
            tokens_per_s=rate,
            prompt_token_s=price_s,
            cached_tokens=cached_tokens,
            joules_per_token=joules,
            ready_s=now_s - post.ready_since_s,
        )

    def _ended(self, post: _Post, tokens: float) -> None:
        """A sequence has left a replica, so another may go there."""
        post.work_tokens = max(0.0, post.work_tokens - tokens)
        if self._line or self._returning:
            self._departures.note(time.monotonic())
            self._pump()
