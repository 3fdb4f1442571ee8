"""The supervisor with scripted replicas: whatever happens, what runs becomes what should run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.request import SamplingParams
from mxn.engine.tokenizer import Tokenizer
from mxn.errors import ConfigError, OverloadedError, ReplicaDiedError, UnavailableError
from mxn.fleet.deployment import Deployment
from mxn.fleet.spec import DeploymentSpec, FleetSpec, PlacementSpec
from mxn.fleet.state import RuntimeFolder
from mxn.fleet.supervisor import Supervisor

from .scripted import ScriptedLauncher

CHIPS = {uid: 10 for uid in ("a", "b", "c")}
NAMES = ("red", "green", "blue")
NO_TOKENIZER = cast(Tokenizer, object())


def model_of(name: str, revision: str = "r1") -> Model:
    spec = ModelSpec(
        architecture="fake",
        num_layers=1,
        hidden_size=1,
        vocab_size=259,
        num_heads=1,
        num_kv_heads=1,
        key_dim=1,
        value_dim=1,
        max_context=2048,
        num_parameters=None,
    )
    return Model(name=name, folder=name, revision=revision, spec=spec)


def placement_of(name: str, chip: str, size: int, variant: int = 1) -> PlacementSpec:
    """A replica of so many bytes; another variant is another replica."""
    there = Chip(uid=chip, kind=None, name=chip, vendor="mxn", memory_bytes=CHIPS.get(chip, 0), cores=1)
    settings = LoadSettings(kv_bytes=size, max_num_seqs=variant)
    return PlacementSpec(id=f"{name}/x", backend="fake", chips=[there], settings=settings, memory_bytes=size)


def deployment_of(name: str, *placements: PlacementSpec, revision: str = "r1", **fields: Any) -> DeploymentSpec:
    delays = (0.0,) * 100
    return DeploymentSpec(
        name=name, model=model_of(name, revision), placements=placements, restart_delays_s=delays, **fields
    )


def fleet_of(*deployments: DeploymentSpec) -> FleetSpec:
    return FleetSpec(deployments=deployments, memory_bytes=CHIPS)


TOKENIZERS = dict.fromkeys(NAMES, NO_TOKENIZER)


@dataclass
class Stand:
    """A supervisor over scripted replicas."""

    launcher: ScriptedLauncher
    supervisor: Supervisor

    async def go(self, spec: FleetSpec) -> None:
        self.supervisor.want(spec, TOKENIZERS)
        await self.settle()

    async def settle(self) -> None:
        async with asyncio.timeout(10):
            await self.supervisor.wait_until_settled()

    def deployment(self, name: str) -> Deployment:
        found = self.supervisor.get(name)
        assert found is not None
        return found

    @property
    def running(self) -> Counter[tuple[str, str, int]]:
        """(model, chip, variant) of what is alive."""
        return Counter(
            (one.load.model.name, one.load.chips[0].uid, one.load.settings.max_num_seqs) for one in self.launcher.alive
        )


@pytest.fixture(autouse=True)
def no_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "load", lambda folder: NO_TOKENIZER)


@pytest.fixture
async def stand() -> Any:
    launcher = ScriptedLauncher(memory_bytes=CHIPS)
    made = Stand(launcher, Supervisor(launcher, drain_s=5.0))
    made.supervisor.start()
    yield made
    await made.supervisor.stop(0.0)
    assert made.launcher.alive == []


async def test_a_replacement_is_ready_before_what_it_replaces_leaves(stand: Stand) -> None:
    await stand.go(fleet_of(deployment_of("red", placement_of("red", "a", 4))))
    [old] = stand.launcher.alive
    stream = stand.deployment("red").submit([1], SamplingParams())
    stand.launcher.load_s = 0.05
    stand.supervisor.want(fleet_of(deployment_of("red", placement_of("red", "b", 4))))
    while stand.running["red", "b", 1] == 0:
        await asyncio.sleep(0.005)
        assert stand.deployment("red").is_ready
    while not old.stopping.is_set():
        await asyncio.sleep(0.005)
    assert not old.ended.is_set()  # it lets its stream finish
    assert stand.deployment("red").is_ready
    old.finish()
    assert [output.finish_reason async for output in stream]
    await stand.settle()
    assert stand.running == Counter({("red", "b", 1): 1})


async def test_without_room_for_both_the_old_one_leaves_first(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    await stand.go(fleet_of(deployment_of("red", placement_of("red", "a", 8))))
    await stand.go(fleet_of(deployment_of("red", placement_of("red", "a", 9, variant=2))))
    assert stand.running == Counter({("red", "a", 2): 1})
    assert "red/0 ends before its successor is ready: there is no room for both" in caplog.text


async def test_two_full_chips_swap_their_models(stand: Stand) -> None:
    def plan(red: str, green: str) -> FleetSpec:
        return fleet_of(
            deployment_of("red", placement_of("red", red, 9)), deployment_of("green", placement_of("green", green, 9))
        )

    await stand.go(plan("a", "b"))
    await stand.go(plan("b", "a"))
    assert stand.running == Counter({("red", "b", 1): 1, ("green", "a", 1): 1})


async def test_what_both_plans_want_runs_on_untouched(stand: Stand) -> None:
    await stand.go(fleet_of(deployment_of("red", placement_of("red", "a", 4))))
    [first] = stand.launcher.alive
    again = replace(placement_of("red", "a", 4), chip_share=0.5, id="other")
    await stand.go(fleet_of(deployment_of("red", again), deployment_of("green", placement_of("green", "a", 4))))
    assert first in stand.launcher.alive
    assert len(stand.launcher.started) == 2
    [keeper] = stand.deployment("red").keepers
    assert keeper.placement.chip_share == 0.5  # told to answer for less of the chip's energy


async def test_a_successor_that_cannot_be_loaded_does_not_take_the_old_one_away(stand: Stand) -> None:
    await stand.go(fleet_of(deployment_of("red", placement_of("red", "a", 4))))
    stand.launcher.failing.add("red")
    await stand.go(fleet_of(deployment_of("red", placement_of("red", "b", 4))))
    assert stand.running == Counter({("red", "a", 1): 1})
    assert stand.deployment("red").is_ready
    stand.launcher.failing.clear()
    await stand.go(fleet_of(deployment_of("red", placement_of("red", "b", 4))))
    assert stand.running == Counter({("red", "b", 1): 1})


async def test_another_model_of_the_same_name_takes_over_when_it_is_ready(stand: Stand) -> None:
    await stand.go(fleet_of(deployment_of("red", placement_of("red", "a", 4))))
    stand.launcher.load_s = 0.05
    stand.supervisor.want(fleet_of(deployment_of("red", placement_of("red", "a", 4), revision="r2")))
    await asyncio.sleep(0.02)
    assert stand.deployment("red").model.revision == "r1"
    assert stand.deployment("red").is_ready
    await stand.settle()
    assert stand.deployment("red").model.revision == "r2"
    assert len(stand.launcher.alive) == 1


async def test_a_deployment_that_is_not_wanted_any_more_is_gone(stand: Stand) -> None:
    await stand.go(fleet_of(deployment_of("red", placement_of("red", "a", 4))))
    await stand.go(fleet_of(deployment_of("green", placement_of("green", "a", 9))))
    assert stand.supervisor.get("red") is None
    assert [d.name for d in stand.supervisor.deployments] == ["green"]


async def test_a_lost_chip_is_fenced_and_the_plan_solved_again(stand: Stand) -> None:
    def resolve(unusable: Collection[str]) -> FleetSpec:
        chip = next(chip for chip in CHIPS if chip not in unusable)
        return fleet_of(deployment_of("red", placement_of("red", chip, 4)))

    await stand.supervisor.apply(resolve)
    await stand.settle()
    stand.launcher.alive[0].end("chip a is lost: it stopped answering", chip_lost=True)
    await asyncio.sleep(0)
    await stand.settle()
    assert stand.running == Counter({("red", "b", 1): 1})
    assert stand.supervisor.cordoned == {"a": "chip a is lost: it stopped answering"}
    await stand.supervisor.uncordon("a")
    await stand.settle()
    assert stand.running == Counter({("red", "a", 1): 1})


async def test_requests_of_a_lost_chip_wait_for_its_replacement(stand: Stand) -> None:
    def resolve(unusable: Collection[str]) -> FleetSpec:
        if len(unusable) == 2:
            raise ConfigError("red fits on no other chip")
        chip = next(chip for chip in CHIPS if chip not in unusable)
        return fleet_of(deployment_of("red", placement_of("red", chip, 4)))

    await stand.supervisor.apply(resolve)
    await stand.settle()
    red = stand.deployment("red")
    begun = asyncio.create_task(ask(red, stand.launcher))
    await asyncio.sleep(0)
    stand.launcher.load_s = 0.05
    stand.launcher.alive[0].end("chip a is lost", chip_lost=True)
    while red.is_ready or "a" not in stand.supervisor.cordoned:
        await asyncio.sleep(0.001)
    come_meanwhile = asyncio.create_task(ask(red, stand.launcher))
    await asyncio.gather(begun, come_meanwhile)
    assert stand.running == Counter({("red", "b", 1): 1})
    await stand.settle()
    in_vain = asyncio.create_task(ask(red, stand.launcher))
    await asyncio.sleep(0)
    stand.launcher.alive[0].end("chip b is lost", chip_lost=True)
    with pytest.raises((ReplicaDiedError, UnavailableError)):
        await in_vain
    assert not red.accepts


async def test_where_no_other_chip_will_do_the_deployment_is_degraded_and_says_why(stand: Stand) -> None:
    def resolve(unusable: Collection[str]) -> FleetSpec:
        if unusable:
            raise ConfigError("red: 2 replicas do not fit on b")
        return fleet_of(deployment_of("red", placement_of("red", "a", 4), placement_of("red", "b", 4)))

    await stand.supervisor.apply(resolve)
    await stand.settle()
    next(one for one in stand.launcher.alive if one.load.chips[0].uid == "a").end("chip a is lost", chip_lost=True)
    await asyncio.sleep(0)
    await stand.settle()
    assert stand.running == Counter({("red", "b", 1): 1})
    assert stand.deployment("red").is_ready
    assert stand.deployment("red").trouble == "red: 2 replicas do not fit on b"


async def test_a_plan_that_cannot_be_made_leaves_everything_as_it_was(stand: Stand) -> None:
    await stand.supervisor.apply(lambda unusable: fleet_of(deployment_of("red", placement_of("red", "a", 4))))
    await stand.settle()

    def bad(unusable: Collection[str]) -> FleetSpec:
        raise ConfigError("mxn.yaml:3:1: no")

    with pytest.raises(ConfigError, match=r"mxn\.yaml:3:1"):
        await stand.supervisor.apply(bad)
    await stand.settle()
    assert stand.running == Counter({("red", "a", 1): 1})
    assert len(stand.launcher.started) == 1


async def test_nothing_starts_on_a_cordoned_chip_and_what_runs_there_goes_on(stand: Stand) -> None:
    await stand.go(fleet_of(deployment_of("red", placement_of("red", "a", 4))))
    await stand.supervisor.cordon("a")
    more = fleet_of(
        deployment_of("red", placement_of("red", "a", 4)), deployment_of("green", placement_of("green", "a", 4))
    )
    await stand.go(more)
    assert stand.running == Counter({("red", "a", 1): 1})
    assert stand.deployment("green").trouble == "a is not used: cordoned by hand"
    await stand.supervisor.uncordon("a")
    await stand.settle()
    assert stand.running == Counter({("red", "a", 1): 1, ("green", "a", 1): 1})
    with pytest.raises(ConfigError, match="not cordoned; cordoned are: none"):
        await stand.supervisor.uncordon("a")


async def test_a_drained_replica_stays_away_until_the_next_plan(stand: Stand) -> None:
    def resolve(unusable: Collection[str]) -> FleetSpec:
        return fleet_of(deployment_of("red", placement_of("red", "a", 4), placement_of("red", "b", 4)))

    await stand.supervisor.apply(resolve)
    await stand.settle()
    [name] = await stand.supervisor.drain("red/0")
    await stand.settle()
    assert name == "red/0"
    assert sum(stand.running.values()) == 1
    assert "drained by hand" in stand.deployment("red").trouble
    await stand.supervisor.drain("red")
    await stand.settle()
    assert not stand.running
    await stand.supervisor.apply(resolve)
    await stand.settle()
    assert sum(stand.running.values()) == 2
    with pytest.raises(ConfigError, match='nothing is called "pink"; there are: a, b, red'):
        await stand.supervisor.drain("pink")


async def test_a_drained_chip_hands_its_replicas_on_first(stand: Stand) -> None:
    def resolve(unusable: Collection[str]) -> FleetSpec:
        chip = next(chip for chip in CHIPS if chip not in unusable)
        return fleet_of(deployment_of("red", placement_of("red", chip, 4)))

    await stand.supervisor.apply(resolve)
    await stand.settle()
    assert await stand.supervisor.drain("a") == ["red/0"]
    await stand.settle()
    assert stand.running == Counter({("red", "b", 1): 1})


async def test_cordons_outlive_the_gateway(tmp_path: Path) -> None:
    folder = RuntimeFolder(tmp_path / "run")
    await Supervisor(ScriptedLauncher(), folder=folder).cordon("a", "its fan is loud")
    folder.close()
    assert Supervisor(ScriptedLauncher(), folder=RuntimeFolder(tmp_path / "run")).cordoned == {"a": "its fan is loud"}


# ---------------------------------------------------------------- models on demand


def cold(name: str, size: int, **fields: Any) -> DeploymentSpec:
    return deployment_of(name, placement_of(name, "a", size), keep_loaded=False, **fields)


async def ask(deployment: Deployment, launcher: ScriptedLauncher) -> None:
    """One request, from its arrival to its end."""

    async def answer() -> None:
        while True:
            await asyncio.sleep(0.005)
            for replica in launcher.alive:
                if replica.load.model == deployment.model:
                    replica.finish()

    answering = asyncio.create_task(answer())
    try:
        async with asyncio.timeout(10):
            assert [output.finish_reason async for output in deployment.submit([1], SamplingParams())]
    finally:
        answering.cancel()


async def test_a_cold_model_is_loaded_when_it_is_asked_for(stand: Stand) -> None:
    await stand.go(fleet_of(cold("red", 4)))
    red = stand.deployment("red")
    assert (red.state, stand.launcher.started) == ("unloaded", [])
    stand.launcher.load_s = 0.05
    await asyncio.gather(*(ask(red, stand.launcher) for _ in range(3)))
    assert red.is_ready
    assert len(stand.launcher.started) == 1


async def test_the_line_for_a_cold_model_has_an_end(stand: Stand) -> None:
    await stand.go(fleet_of(cold("red", 4, max_queue=2)))
    stand.launcher.load_s = 0.2
    red = stand.deployment("red")
    waiting = [asyncio.create_task(ask(red, stand.launcher)) for _ in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(OverloadedError, match="2 sequences in line, the limit is 2"):
        red.submit([1], SamplingParams())
    await asyncio.gather(*waiting)


async def test_a_cold_model_that_cannot_be_loaded_turns_its_line_away(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxn.fleet.on_demand.TRY_AGAIN_S", 0.3)
    await stand.go(fleet_of(cold("red", 4)))
    red = stand.deployment("red")
    stand.launcher.failing.add("red")
    with pytest.raises(UnavailableError):
        await ask(red, stand.launcher)
    assert not red.accepts
    assert "no such weights" in red.reason
    stand.launcher.failing.clear()
    async with asyncio.timeout(5):
        while not red.accepts:
            await asyncio.sleep(0.05)
    await ask(red, stand.launcher)


async def test_a_request_that_waited_too_long_is_told_how_far_loading_is(stand: Stand) -> None:
    await stand.go(fleet_of(cold("red", 4, max_wait_s=0.1)))
    stand.launcher.load_s = 0.5
    with pytest.raises(UnavailableError, match=r'"red" has none that is ready yet \(weights, 50%\)'):
        await ask(stand.deployment("red"), stand.launcher)


async def test_the_longest_unused_model_makes_room(stand: Stand) -> None:
    await stand.go(fleet_of(cold("red", 4), cold("green", 4), cold("blue", 4)))
    for name in ("red", "green", "red"):
        await ask(stand.deployment(name), stand.launcher)
        await asyncio.sleep(0.3)  # use is looked at now and then
    await ask(stand.deployment("blue"), stand.launcher)
    await stand.settle()
    assert set(stand.running) == {("red", "a", 1), ("blue", "a", 1)}


async def test_a_model_at_work_is_not_unloaded_for_another(stand: Stand) -> None:
    await stand.go(fleet_of(cold("red", 8), cold("green", 8, max_wait_s=0.3)))
    await ask(stand.deployment("red"), stand.launcher)
    stream = stand.deployment("red").submit([1], SamplingParams())
    with pytest.raises(UnavailableError, match="green"):
        await ask(stand.deployment("green"), stand.launcher)
    assert set(stand.running) == {("red", "a", 1)}
    stand.launcher.alive[0].finish()
    assert [output.finish_reason async for output in stream]
    async with asyncio.timeout(5):
        while set(stand.running) != {("green", "a", 1)}:
            await asyncio.sleep(0.05)


async def test_an_idle_model_is_unloaded_after_its_time(stand: Stand) -> None:
    spec = deployment_of("red", placement_of("red", "a", 4), idle_unload_s=0.1)
    await stand.go(fleet_of(spec))
    assert stand.deployment("red").is_ready  # kept loaded from the start
    async with asyncio.timeout(5):
        while stand.launcher.alive:
            await asyncio.sleep(0.05)
    await stand.settle()
    assert stand.deployment("red").state == "unloaded"
    await ask(stand.deployment("red"), stand.launcher)


# ---------------------------------------------------------------- whatever happens


@dataclass(frozen=True)
class Wish:
    """So many replicas of a size and variant of one name."""

    name: str
    count: int
    size: int
    variant: int


def place(wishes: Sequence[Wish], unusable: Collection[str]) -> FleetSpec:
    """First-fit on the chips that may be used. Raises: ConfigError when it does not fit."""
    free = {chip: size for chip, size in CHIPS.items() if chip not in unusable}
    deployments = []
    for wish in wishes:
        placements = []
        for _ in range(wish.count):
            chip = next((chip for chip in free if free[chip] >= wish.size), None)
            if chip is None:
                raise ConfigError(f"{wish.name} does not fit")
            free[chip] -= wish.size
            placements.append(placement_of(wish.name, chip, wish.size, wish.variant))
        deployments.append(deployment_of(wish.name, *placements))
    return fleet_of(*deployments)


WISHES = st.lists(
    st.builds(
        Wish,
        name=st.sampled_from(NAMES),
        count=st.integers(1, 3),
        size=st.integers(2, 9),
        variant=st.integers(1, 2),
    ),
    max_size=3,
    unique_by=lambda wish: wish.name,
)


class Life(RuleBasedStateMachine):
    """Plans, deaths, cordons and lost chips in any order; after each, what runs is what should run."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.launcher = ScriptedLauncher(memory_bytes=CHIPS)
        self.supervisor = self.run(self._make())
        self.plan = fleet_of()
        self.wishes: Sequence[Wish] = ()
        self.gone: set[str] = set()
        self.drained: set[str] = set()

    async def _make(self) -> Supervisor:
        supervisor = Supervisor(self.launcher, drain_s=1.0)
        supervisor.start()
        return supervisor

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 20))

    @initialize(wishes=WISHES)
    def begin(self, wishes: list[Wish]) -> None:
        self.apply(wishes)

    @rule(wishes=WISHES)
    def apply(self, wishes: list[Wish]) -> None:
        def resolve(unusable: Collection[str]) -> FleetSpec:
            plan = place(wishes, unusable)
            self.plan, self.wishes = plan, wishes
            return plan

        try:
            self.run(self.supervisor.apply(resolve))
            self.drained.clear()
        except ConfigError:
            return
        finally:
            self.settle()

    @precondition(lambda self: self.launcher.alive)
    @rule(index=st.integers(0, 8))
    def kill(self, index: int) -> None:
        alive = self.launcher.alive
        self.run(self._end(alive[index % len(alive)], "it crashed", False))

    @precondition(lambda self: self.launcher.alive)
    @rule(index=st.integers(0, 8))
    def lose_chip(self, index: int) -> None:
        alive = self.launcher.alive
        replica = alive[index % len(alive)]
        self.gone.add(replica.load.chips[0].uid)
        self.run(self._end(replica, "its chip is lost", True))
        self.expect_a_new_plan()

    async def _end(self, replica: Any, reason: str, chip_lost: bool) -> None:
        replica.end(reason, chip_lost=chip_lost)
        await asyncio.sleep(0.001)
        await self.supervisor.wait_until_settled()

    @rule(chip=st.sampled_from(sorted(CHIPS)))
    def cordon(self, chip: str) -> None:
        self.run(self.supervisor.cordon(chip))
        self.settle()

    @rule(chip=st.sampled_from(sorted(CHIPS)))
    def uncordon(self, chip: str) -> None:
        if chip in self.supervisor.cordoned:
            self.run(self.supervisor.uncordon(chip))
            self.gone.discard(chip)
            self.settle()
            self.expect_a_new_plan()

    @rule(name=st.sampled_from([*NAMES, *CHIPS]))
    def drain(self, name: str) -> None:
        try:
            self.run(self.supervisor.drain(name))
        except ConfigError:
            return
        (self.gone if name in CHIPS else self.drained).add(name)
        self.settle()
        if name in CHIPS:
            self.expect_a_new_plan()

    def expect_a_new_plan(self) -> None:
        """The plan is the one for the chips that may be used now, if there is one."""
        try:
            fresh = place(self.wishes, self.supervisor.cordoned)
        except ConfigError:
            return
        assert self.plan == fresh

    def settle(self) -> None:
        self.run(self.supervisor.wait_until_settled())

    @invariant()
    def what_runs_is_what_should_run(self) -> None:
        wanted: Counter[tuple[str, str, int]] = Counter()
        may_be_missing: Counter[tuple[str, str, int]] = Counter()
        for spec in self.plan.deployments:
            for placement in spec.placements:
                chip = placement.chips[0].uid
                if chip in self.gone or spec.name in self.drained:
                    continue
                replica = (spec.name, chip, placement.settings.max_num_seqs)
                wanted[replica] += 1
                if chip in self.supervisor.cordoned:
                    may_be_missing[replica] += 1
        running = Stand(self.launcher, self.supervisor).running
        assert not running - wanted, "replicas run that should not"
        assert not wanted - running - may_be_missing, "replicas are missing"

    @invariant()
    def no_replica_is_leaked(self) -> None:
        known = [member.keeper.replica for member in self.supervisor.members]
        assert all(replica in known for replica in self.launcher.alive)
        for chip, size in CHIPS.items():
            free = self.supervisor.free_bytes(chip)
            assert free == float("inf") or 0 <= free <= size  # infinite until there is a plan

    def teardown(self) -> None:
        self.run(self.supervisor.stop(0.0))
        assert self.launcher.alive == []
        self.loop.close()


Life.TestCase.settings = settings(
    max_examples=100, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLife = Life.TestCase
