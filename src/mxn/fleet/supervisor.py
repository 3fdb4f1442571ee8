"""Makes the replicas that run those that should run, and keeps it so whatever happens to either side.

Every event, be it a new plan, a replica's end, a cordon or a request for a model that is not loaded, only wakes one
loop, which compares what should run with what runs and takes the next steps. Nothing depends on the order of events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mxn.engine.tokenizer import Tokenizer
from mxn.errors import ConfigError, MxnError
from mxn.fleet.deployment import Deployment
from mxn.fleet.launchers.base import Launcher
from mxn.fleet.launchers.in_turn import InTurn
from mxn.fleet.member import Member, key_of
from mxn.fleet.on_demand import OnDemand
from mxn.fleet.room import spared_for
from mxn.fleet.spec import DeploymentSpec, FleetSpec, PlacementSpec
from mxn.fleet.state import RuntimeFolder

log = logging.getLogger(__name__)

_LOOK_S = 0.25
"""How often it is looked whether a model is idle, where that matters to another or to itself."""

_GIB = 1 << 30

Resolve = Callable[[Collection[str]], FleetSpec]
"""What should run when the chips of these uids may not be used. Raises: MxnError when that cannot be."""


class Supervisor:
    """Desired against actual.

    cordoned: chips on which nothing is started, each with the reason.
    resolve: makes the plan again when chips come or go; without it what can still run does.
    """

    def __init__(self, launcher: Launcher, *, folder: RuntimeFolder | None = None, drain_s: float = 30.0) -> None:
        """folder: keeps the cordons for the next gateway. drain_s: how long a replica that leaves may finish."""
        self.cordoned: dict[str, str] = dict(folder.state.cordoned) if folder is not None else {}
        self._launcher = InTurn(launcher)
        self._folder = folder
        self._drain_s = drain_s
        self._spec = FleetSpec(deployments=())
        self.resolve: Resolve | None = None
        self._deployments: dict[str, list[Deployment]] = {}
        self._members: dict[str, Member] = {}
        self._waiting: dict[str, str] = {}
        self._cramped: set[str] = set()
        self._drained: set[tuple[str, str]] = set()
        self._on_demand = OnDemand()
        self._lost: set[str] = set()
        self._emptied: set[str] = set()
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._planning = asyncio.Lock()
        self._num_planning = 0

    # ------------------------------------------------------------------ what there is

    @property
    def deployments(self) -> list[Deployment]:
        """One of each name, in the order of the plan; those that are leaving come last."""
        order = {spec.name: index for index, spec in enumerate(self._spec.deployments)}
        names = sorted(self._deployments, key=lambda name: order.get(name, len(order)))
        return [found for name in names if (found := self.get(name)) is not None]

    def get(self, name: str) -> Deployment | None:
        """The deployment that serves this model name: the newest, or one before it until that is ready."""
        line = self._deployments.get(name)
        if not line:
            return None
        return next((deployment for deployment in reversed(line) if deployment.is_ready), line[-1])

    @property
    def lost(self) -> frozenset[str]:
        """Chips that were lost; they are cordoned too."""
        return frozenset(self._lost)

    @property
    def members(self) -> list[Member]:
        """All replicas that are there, on their way in or out."""
        return list(self._members.values())

    def free_bytes(self, chip: str) -> float:
        """Memory of a chip that is promised to nobody."""
        promised = sum(m.placement.memory_bytes for m in self._members.values() if m.holds_memory and m.is_on(chip))
        return self._spec.memory_bytes.get(chip, float("inf")) - promised

    # ------------------------------------------------------------------ what should be

    def want(self, spec: FleetSpec, tokenizers: Mapping[str, Tokenizer] | None = None) -> None:
        """Takes a new goal. Replicas that both goals want run on untouched.

        tokenizers: by folder, of models that are new.
        """
        names = [one.name for one in spec.deployments]
        if len(set(names)) != len(names):
            doubled = sorted({name for name in names if names.count(name) > 1})
            raise ConfigError(f"deployment names must differ; given more than once: {', '.join(doubled)}")
        self._spec = spec
        for one in spec.deployments:
            line = self._deployments.setdefault(one.name, [])
            known = next((deployment for deployment in line if deployment.model == one.model), None)
            if known is None:
                folder = one.model.folder
                known = Deployment(
                    one,
                    (tokenizers or {}).get(folder) or Tokenizer.load(folder),
                    self._launcher,
                    on_change=self._poke,
                    on_chip_lost=self._on_chip_lost,
                )
            else:
                line.remove(known)
            known.change_to(one, self._loader(one))
            line.append(known)
        for name in self._deployments:
            self._try_failed_again(name)
        self._poke()

    def keep_loaded(self, name: str) -> None:
        """Has a deployment that is loaded on demand begin loaded, because it is so already."""
        self._on_demand.ask_for(name)

    async def apply(self, resolve: Resolve) -> FleetSpec:
        """Makes a new plan and goes over to it. Raises: MxnError when it cannot be; what was wanted stays so then."""
        async with self._planned():
            spec, tokenizers = await asyncio.to_thread(self._prepare, resolve)
            self.resolve = resolve
            self._drained.clear()
            self.want(spec, tokenizers)
        await self._next_step()
        return spec

    async def cordon(self, chip: str, reason: str = "cordoned by hand") -> None:
        """Nothing is started on the chip any more; what runs there goes on until the next plan."""
        self.cordoned[chip] = reason
        self._save()
        await self._next_step()

    async def uncordon(self, chip: str) -> None:
        """The chip may be used again. Raises: ConfigError when it was not cordoned."""
        if chip not in self.cordoned:
            cordoned = ", ".join(sorted(self.cordoned)) or "none"
            raise ConfigError(f'chip "{chip}" is not cordoned; cordoned are: {cordoned}')
        del self.cordoned[chip]
        self._lost.discard(chip)
        self._emptied.discard(chip)
        self._save()
        await self._plan_again()

    async def drain(self, name: str) -> list[str]:
        """Empties a chip, a deployment, or one replica of it ("name/0"); returns the replicas that end.

        A chip is cordoned and what runs there moves, where there is room. A deployment or replica stays away until the
        next `apply`. Raises: ConfigError when nothing is called so.
        """
        on_chip = [m for m in self._members.values() if m.is_on(name)]
        if on_chip or name in self.cordoned:
            await self.cordon(name, "drained by hand")
            self._emptied.add(name)
            await self._plan_again()
            return [m.keeper.id for m in on_chip]
        found = [m for m in self._members.values() if name in (m.keeper.id, m.deployment.name)]
        if not found and name not in self._deployments:
            known = sorted({*self._deployments, *self._members, *self._chips()})
            raise ConfigError(f'nothing is called "{name}"; there are: {", ".join(known)}')
        self._drained |= {(name, "")} if name in self._deployments else {(m.deployment.name, m.key) for m in found}
        await self._next_step()
        return [m.keeper.id for m in found]

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Begins to make what is what should be."""
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())

    async def wait_until_settled(self) -> None:
        """Returns when nothing is on the way any more: every replica is ready or failed, or waits for room."""
        while not self.is_settled:
            await self._changed.wait()

    @property
    def is_settled(self) -> bool:
        """True when nothing is on the way."""
        is_moving = any(member.is_moving for member in self.members)
        return not (is_moving or self._tasks or self._num_planning or self._wake.is_set())

    async def stop(self, drain_s: float) -> None:
        """Drains for at most `drain_s` seconds and ends all replicas."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
            self._loop = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        everything = [deployment for line in self._deployments.values() for deployment in line]
        await asyncio.gather(*(deployment.stop(drain_s) for deployment in everything))
        self._members.clear()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            self._look_at_use()
            self._step()
            self._end_recoveries()
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            with contextlib.suppress(TimeoutError):
                looks = any(one.is_on_demand for one in self._spec.deployments)
                await asyncio.wait_for(self._wake.wait(), _LOOK_S if looks else None)

    def _step(self) -> None:
        """Starts what is missing and may start, ends what is not wanted and has been replaced."""
        goals = list(self._goals())
        kept, missing = self._match(goals)
        self._waiting.clear()
        self._cramped.clear()
        for deployment, placement in missing:
            self._start_or_wait(deployment, placement, kept)
        for member in list(self._members.values()):
            if member.ending is None and member.keeper.id not in kept and self._may_go(member, kept, missing):
                self._end(member)
        self._tell_trouble(goals, kept)
        self._drop_empty()

    def _goals(self) -> Iterator[tuple[Deployment, PlacementSpec]]:
        """Placements that should be there now."""
        for spec in self._spec.deployments:
            if (spec.name, "") in self._drained or (spec.is_on_demand and not self._on_demand.is_wanted(spec)):
                continue
            deployment = self._deployments[spec.name][-1]
            drained = [key for name, key in self._drained if name == spec.name]
            for placement in spec.placements:
                key = key_of(spec, placement)
                if key in drained:
                    drained.remove(key)
                elif not any(chip.uid in self._lost | self._emptied for chip in placement.chips):
                    yield deployment, placement

    def _match(
        self, goals: Sequence[tuple[Deployment, PlacementSpec]]
    ) -> tuple[set[str], list[tuple[Deployment, PlacementSpec]]]:
        """Ids of replicas that fulfil a goal, and the goals that none does."""
        kept: set[str] = set()
        missing = []
        for deployment, placement in goals:
            key = key_of(deployment.spec, placement)
            for member in self._members.values():
                is_free = member.ending is None and member.keeper.id not in kept
                if is_free and member.deployment is deployment and member.key == key:
                    kept.add(member.keeper.id)
                    member.answer_for(placement.chip_share)
                    break
            else:
                missing.append((deployment, placement))
        return kept, missing

    # ------------------------------------------------------------------ coming and going

    def _start_or_wait(self, deployment: Deployment, placement: PlacementSpec, kept: set[str]) -> None:
        name, chips = deployment.name, [chip.uid for chip in placement.chips]
        cordoned = [chip for chip in chips if chip in self.cordoned]
        if cordoned:
            self._waiting[name] = f"{cordoned[0]} is not used: {self.cordoned[cordoned[0]]}"
            return
        short = [chip for chip in chips if self.free_bytes(chip) < placement.memory_bytes]
        if short and not self._make_room(deployment, placement, short, kept):
            needed, free = placement.memory_bytes / _GIB, self.free_bytes(short[0]) / _GIB
            self._cramped.add(name)
            self._waiting[name] = f"it needs {needed:.2f} GiB of {short[0]}, where {max(0.0, free):.2f} are free"
        if short:
            return
        taken = {member.keeper.id for member in self._members.values()}
        free_id = next(f"{name}/{i}" for i in range(len(taken) + 1) if f"{name}/{i}" not in taken)
        keeper = deployment.add(replace(placement, id=free_id))
        self._members[free_id] = Member(deployment, keeper, key_of(deployment.spec, placement))
        kept.add(free_id)

    def _make_room(
        self, deployment: Deployment, placement: PlacementSpec, short: Sequence[str], kept: Collection[str]
    ) -> bool:
        """Ends what can be spared on chips that lack memory, if that is enough."""
        lacking = {chip: placement.memory_bytes - self.free_bytes(chip) for chip in short}
        victims = spared_for(deployment.name, lacking, self.members, kept, self._on_demand)
        for member in victims or ():
            if member.keeper.id in kept:
                log.info("%s is unloaded to make room for %s", member.deployment.name, deployment.name)
                self._on_demand.drop(member.deployment.name)
            elif member.deployment.name == deployment.name:
                log.warning("%s ends before its successor is ready: there is no room for both", member.keeper.id)
            self._end(member)
        return victims is not None

    def _may_go(
        self, member: Member, kept: Collection[str], missing: Sequence[tuple[Deployment, PlacementSpec]]
    ) -> bool:
        """True when nobody needs a replica any more that is not wanted: its successors serve, or there are none."""
        if any(chip.uid in self._lost for chip in member.placement.chips):
            return True
        name = member.deployment.name
        if any(deployment.name == name for deployment, _ in missing):
            return False
        successors = [m for m in self._members.values() if m.keeper.id in kept and m.deployment.name == name]
        is_settled = all(m.keeper.is_settled for m in successors)
        return not successors or (is_settled and any(m.keeper.is_ready for m in successors))

    def _try_failed_again(self, name: str) -> None:
        for member in list(self._members.values()):
            is_failed = member.keeper.state == "failed" and member.ending is None
            if is_failed and member.deployment.name == name:
                self._end(member)  # what is missing then is started

    def _end(self, member: Member) -> None:
        async def end() -> None:
            try:
                await member.deployment.remove(member.keeper.id, self._drain_s)
            finally:
                self._members.pop(member.keeper.id, None)
                self._poke()

        member.ending = self._spawn(end())

    def _drop_empty(self) -> None:
        """Forgets deployments that are not wanted any more and have no replica left."""
        wanted = {spec.name for spec in self._spec.deployments}
        for name, line in list(self._deployments.items()):
            newest = line[-1] if name in wanted else None
            line[:] = [deployment for deployment in line if deployment is newest or deployment.keepers]
            if not line:
                del self._deployments[name]

    # ------------------------------------------------------------------ models on demand

    def _loader(self, spec: DeploymentSpec) -> Callable[[], None] | None:
        """What a deployment does when it is asked for and not loaded; None for one that is always to be."""
        return partial(self._ask_for, spec.name) if spec.is_on_demand else None

    def _ask_for(self, name: str) -> None:
        if self._on_demand.ask_for(name):
            self._try_failed_again(name)
        self._poke()

    def _look_at_use(self) -> None:
        """Unloads what was not used for long, and lets no request wait for what failed to load."""
        for spec in self._spec.deployments:
            deployment = self.get(spec.name)
            if spec.is_on_demand and deployment is not None:
                accepts = self._on_demand.look(deployment, is_cramped=spec.name in self._cramped)
                deployment.change_to(spec, self._loader(spec) if accepts else None)

    # ------------------------------------------------------------------ chips that are lost, and plans

    def _on_chip_lost(self, placement: PlacementSpec, reason: str) -> None:
        for chip in placement.chips:
            if chip.uid not in self._lost:
                log.error("%s is fenced: %s", chip.uid, reason)
                self.cordoned[chip.uid] = reason
                self._lost.add(chip.uid)
        member = self._members.get(placement.id)
        if member is not None and self.resolve is not None:
            member.deployment.recover(True)
        self._save()
        self._spawn(self._plan_again())
        self._poke()

    def _end_recoveries(self) -> None:
        """Nobody waits any longer for a place that was found, or is not to be found."""
        for deployment in (deployment for line in self._deployments.values() for deployment in line):
            if deployment.is_recovering and not self._num_planning:
                is_settled = all(keeper.is_settled for keeper in deployment.keepers)
                if deployment.is_ready or is_settled:
                    deployment.recover(False)

    async def _plan_again(self) -> None:
        """Solves the plan for the chips that may be used now; where that fails, what can still run does."""
        resolve = self.resolve
        if resolve is not None:
            async with self._planned():
                try:
                    spec, tokenizers = await asyncio.to_thread(self._prepare, resolve)
                except MxnError as error:
                    log.error("no new plan could be made: %s", error)
                    shortfalls = {one.name: str(error) for one in self._spec.deployments if self._lacks_chips(one)}
                    self._spec = replace(self._spec, shortfalls=shortfalls)
                else:
                    self.want(spec, tokenizers)
        await self._next_step()

    def _prepare(self, resolve: Resolve) -> tuple[FleetSpec, dict[str, Tokenizer]]:
        spec = resolve(frozenset(self.cordoned))
        known = [deployment.model for line in self._deployments.values() for deployment in line]
        folders = {one.model.folder for one in spec.deployments if one.model not in known}
        return spec, {folder: Tokenizer.load(folder) for folder in folders}

    def _lacks_chips(self, spec: DeploymentSpec) -> bool:
        return any(chip.uid in self.cordoned for placement in spec.placements for chip in placement.chips)

    def _tell_trouble(self, goals: Sequence[tuple[Deployment, PlacementSpec]], kept: Collection[str]) -> None:
        """Tells every deployment why it has less than it should."""
        for name, line in self._deployments.items():
            trouble = self._spec.shortfalls.get(name) or self._waiting.get(name, "")
            if not trouble and ((name, "") in self._drained or any(key for one, key in self._drained if one == name)):
                trouble = "it was drained by hand; `mxn apply` brings it back"
            used = {chip.uid for d in line for placement in d.spec.placements for chip in placement.chips}
            lost = sorted(used & (self._lost | self._emptied))
            if not trouble and lost:
                trouble = f"{lost[0]} is not used: {self.cordoned.get(lost[0], 'it was lost')}"
            if trouble and trouble != line[-1].trouble:
                log.warning("%s is degraded: %s", name, trouble)
            line[-1].trouble = trouble

    @contextlib.asynccontextmanager
    async def _planned(self) -> AsyncIterator[None]:
        """Plans are made one after another; while one is made, nothing counts as settled."""
        self._num_planning += 1
        try:
            async with self._planning:
                yield
        finally:
            self._num_planning -= 1
            self._poke()

    def _chips(self) -> set[str]:
        return {chip.uid for m in self._members.values() for chip in m.placement.chips}

    def _save(self) -> None:
        if self._folder is not None:
            self._folder.state.cordoned = dict(self.cordoned)
            self._folder.save()

    async def _next_step(self) -> None:
        """Returns when the loop has taken notice."""
        self._poke()
        if self._loop is not None and not self._loop.done():
            await self._changed.wait()

    def _poke(self) -> None:
        self._wake.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._poke()
