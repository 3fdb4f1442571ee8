"""The planner on made-up fleets: time, proven gap, and watts beside those of simpler rules. All from a seed.

Run: python benchmarks/planner.py [CASE ...]        cases: small, middle, large, large-overload, node-loss, baselines
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mxn.config.chip_card import ChipCard, load_chip_cards
from mxn.config.cluster import BackendConfig, ClusterConfig, NodeConfig, PolicyConfig
from mxn.config.demand import LoadConfig, SloConfig
from mxn.config.deployments import DeploymentConfig
from mxn.config.model_card import Architecture, ModelCard
from mxn.fleet.inventory import take_inventory
from mxn.fleet.planner.pricing import cheapest_mix
from mxn.fleet.planner.problem import SLICES_PER_CHIP, Demand, Option, Problem
from mxn.fleet.planner.solve import Effort, Outcome, solve_placement
from mxn.fleet.posing import pose

NUM_KINDS = 20


@dataclass(frozen=True)
class Fleet:
    """A posed problem, with what rules of thumb look at beside it.

    weights_share: of an option's memory, by demand and option name. price: USD per hour of one chip, by pool.
    """

    problem: Problem
    weights_share: dict[str, dict[str, float]]
    price: dict[str, float]


def make_fleet(num_models: int, num_chips: int, load: float, seed: int) -> Fleet:
    """A fleet and its demands. load: the chips that serving everybody on a middling kind would take, as a share."""
    dice = random.Random(seed)
    cards = [card for card in load_chip_cards().values() if _is_known(card)]
    kinds = [_varied(dice.choice(cards), index, dice) for index in range(NUM_KINDS)]
    weights = [dice.uniform(0.3, 2.0) for _ in kinds]
    nodes = [
        NodeConfig(name=card.id, chips={card.id: 8}, count=max(1, round(num_chips / 8 * weight / sum(weights))))
        for card, weight in zip(kinds, weights, strict=True)
    ]
    engine = BackendConfig(
        name="engine",
        chips=tuple(card.id for card in kinds),
        quantisations=("bf16", "fp8"),
        max_chips=8,
        can_share_chip=True,
    )
    inventory = take_inventory(ClusterConfig(nodes=tuple(nodes), chips=tuple(kinds), backends=(engine,)))
    models = {card.name: card for card in (_model(index, dice) for index in range(min(num_models, 60)))}
    deployments = [_deployment(index, dice.choice(list(models)), dice) for index in range(num_models)]
    posed = pose(deployments, PolicyConfig(), inventory, models)
    problem = _scaled(posed.problem, load, dice)
    share = {
        name: {o: (c.fit.weights.value or 0.0) / c.fit.available_bytes for o, c in options.items()}
        for name, options in posed.options.items()
    }
    prices = {card.id: 0.002 * (card.tdp_w.value if card.tdp_w else 0.0) * dice.uniform(0.5, 2.0) for card in kinds}
    return Fleet(problem, share, {pool.name: prices[pool.kind] for pool in problem.pools})


def _is_known(card: ChipCard) -> bool:
    return bool(
        card.kind in ("gpu", "npu")
        and card.memory_gib
        and card.memory_bandwidth_gb_s
        and card.tdp_w
        and card.compute.bf16_tflops
    )


def _varied(card: ChipCard, index: int, dice: random.Random) -> ChipCard:
    """A chip like one that exists, its figures up to a third off."""

    def other(figure):
        return figure and figure.model_copy(update={"value": figure.value * dice.uniform(0.75, 1.33)})

    rates = card.compute
    compute = rates.model_copy(update={name: other(getattr(rates, name)) for name in ("bf16_tflops", "fp8_tflops")})
    changed = {name: other(getattr(card, name)) for name in ("memory_gib", "memory_bandwidth_gb_s", "tdp_w")}
    return card.model_copy(update={**changed, "compute": compute, "id": f"kind-{index}", "idle_w": None})


def _model(index: int, dice: random.Random) -> ModelCard:
    layers, hidden = dice.choice([(16, 2048), (28, 3072), (32, 4096), (40, 5120), (64, 5120), (80, 8192)])
    vocabulary = dice.choice([32_000, 128_256, 151_936])
    architecture = Architecture(
        model_type="made-up",
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocabulary,
        num_heads=hidden // 128,
        num_kv_heads=8,
        key_dim=128,
        value_dim=128,
        max_context=8192,
        num_parameters=12 * layers * hidden * hidden + 2 * vocabulary * hidden,
        source="made up",
    )
    return ModelCard(name=f"model-{index}", source="hf:made/up", architecture=architecture)


def _deployment(index: int, model: str, dice: random.Random) -> DeploymentConfig:
    return DeploymentConfig(
        name=f"d{index}",
        model=model,
        context_length=8192,
        quantisations=dice.choice([("bf16",), ("bf16", "fp8")]),
        load=LoadConfig(
            requests_per_s=1.0,
            prompt_tokens=dice.choice([200, 800, 2000]),
            output_tokens=dice.choice([50, 200, 600]),
        ),
        slo=SloConfig(ttft_ms=dice.choice([2000.0, 5000.0]), tpot_ms=dice.choice([60.0, 120.0])),
        tier=dice.randrange(3),
    )


def _scaled(problem: Problem, load: float, dice: random.Random) -> Problem:
    """The problem with loads that together take this share of all chips, each demand on its median option."""
    demands = [demand for demand in problem.demands if demand.options]
    chips = sum(pool.num_chips for pool in problem.pools)
    shares = [math.exp(dice.gauss(0, 1)) for _ in demands]
    scaled = []
    for demand, share in zip(demands, shares, strict=True):
        chips_per_request = statistics.median(o.slices / o.capacity for o in demand.options) / SLICES_PER_CHIP
        scaled.append(replace(demand, load=load * chips * share / sum(shares) / chips_per_request))
    return replace(problem, demands=tuple(scaled))


# ---------------------------------------------------------------------- rules of thumb

Pick = Callable[[Demand, Sequence[Option], dict[str, float]], Option]


def by_rule(fleet: Fleet, pick: Pick, *, memory_factor: float = 1.0) -> dict[str, dict[str, int]]:
    """Replica after replica of demand after demand, each where the rule says; what finds no room stays unserved.

    memory_factor: a replica must have this many times its weights, whatever its KV cache needs.
    """
    room = {pool.name: float(pool.num_chips * SLICES_PER_CHIP) for pool in fleet.problem.pools}
    placed: dict[str, dict[str, int]] = {}
    for demand in fleet.problem.demands:
        counts: dict[str, int] = {}
        left = demand.load
        while left > 1e-9:
            fitting = [
                o
                for o in demand.options
                if o.slices <= room[o.pool] and fleet.weights_share[demand.name][o.name] * memory_factor <= 1
            ]
            if not fitting:
                break
            option = pick(demand, fitting, room)
            counts[option.name] = counts.get(option.name, 0) + 1
            room[option.pool] -= option.slices
            left -= option.capacity
        placed[demand.name] = counts
    return placed


def min_cost_ilp(fleet: Fleet) -> dict[str, dict[str, int]]:
    """Each demand's cheapest mix in USD, exactly, one demand after another with the chips that are left."""
    room = {pool.name: pool.num_chips * SLICES_PER_CHIP for pool in fleet.problem.pools}
    placed = {}
    for demand in fleet.problem.demands:
        mix = cheapest_mix(
            [fleet.price[o.pool] * o.slices / SLICES_PER_CHIP for o in demand.options],
            [min(1.0, o.capacity / demand.load) for o in demand.options],
            [int(room[o.pool] // o.slices) for o in demand.options],
            ((1.0, 1e6),),
        )
        counts = {o.name: n for o, n in zip(demand.options, mix.counts, strict=True) if n} if mix else {}
        for option in demand.options:
            room[option.pool] -= option.slices * counts.get(option.name, 0)
        while min(room.values()) < 0:  # several options of one pool, each counted as if alone
            option = next(o for o in demand.options if room[o.pool] < 0 and counts.get(o.name))
            counts[option.name] -= 1
            room[option.pool] += option.slices
        placed[demand.name] = counts
    return placed


def _fewest(demand: Demand, options: Sequence[Option], room: dict[str, float]) -> Option:
    return max(options, key=lambda o: (room[o.pool], -o.slices))


RULES: dict[str, Callable[[Fleet], dict[str, dict[str, int]]]] = {
    "first-fit": lambda f: by_rule(f, lambda d, options, room: options[0]),
    "binpack, 1.2 x weights": lambda f: by_rule(
        f, lambda d, options, room: min(options, key=lambda o: (o.slices, room[o.pool])), memory_factor=1.2
    ),
    "spread, 1.2 x weights": lambda f: by_rule(
        f, lambda d, options, room: min(options, key=lambda o: (o.slices, -room[o.pool])), memory_factor=1.2
    ),
    "fewest models": lambda f: by_rule(f, _fewest),
    "cost / capacity": lambda f: by_rule(
        f, lambda d, options, room: min(options, key=lambda o: fleet_cost(f, o) / o.capacity)
    ),
    "min-cost ILP": min_cost_ilp,
}


def fleet_cost(fleet: Fleet, option: Option) -> float:
    """USD per hour of a replica."""
    return fleet.price[option.pool] * option.slices / SLICES_PER_CHIP


def watts_and_served(problem: Problem, placed: dict[str, dict[str, int]]) -> tuple[float, float]:
    """What a placement draws, as the solver counts it, and the share of all load it serves (by chips it would take)."""
    watts = served = total = 0.0
    for demand in problem.demands:
        options = {o.name: o for o in demand.options}
        weight = demand.load * min(o.slices / o.capacity for o in demand.options)
        capacity = sum(options[name].capacity * count for name, count in placed[demand.name].items())
        watts += sum(options[name].cost * count for name, count in placed[demand.name].items())
        served += weight * min(1.0, capacity / demand.load)
        total += weight
    return watts, served / total


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Spent:
    """Seconds on the wall, and of one core: the solver has one thread, so they differ where others had the machine."""

    wall_s: float
    cpu_s: float

    def __str__(self) -> str:
        return f"{self.wall_s:7.2f} s ({self.cpu_s:6.2f} s of a core)"


def _solve(problem: Problem, effort: Effort) -> tuple[Outcome, Spent]:
    began_s, cpu_s = time.perf_counter(), time.process_time()
    outcome = solve_placement(problem, effort=effort)
    return outcome, Spent(time.perf_counter() - began_s, time.process_time() - cpu_s)


def _show(name: str, effort: Effort, outcome: Outcome, spent: Spent) -> None:
    stages = ", ".join(f"{s.name} {100 * s.gap:.2f} %" for s in outcome.stages)
    print(f"{name:<30} {effort:<8} {spent}   gap: {stages}", flush=True)


def run_case(name: str, shape: tuple[int, int, float], efforts: Sequence[Effort], seeds: int) -> None:
    for seed in range(seeds):
        fleet = make_fleet(*shape, seed)
        for effort in efforts:
            _show(f"{shape[0]} x {shape[1]} load {shape[2]} #{seed}", effort, *_solve(fleet.problem, effort))


def run_node_loss(seeds: int) -> None:
    """Eight chips of the fullest pool go; what is left runs on, and moving costs."""
    for seed in range(seeds):
        problem = make_fleet(1000, 10_000, 0.6, seed).problem
        before, _ = _solve(problem, "fast")
        after, spent, moved, lost = lose_node(problem, before)
        _show(f"node lost #{seed}", "fast", after, spent)
        print(f"{'':<30} {lost} replicas lost their chips, {moved} others were moved", flush=True)


def lose_node(problem: Problem, before: Outcome) -> tuple[Outcome, Spent, int, int]:
    """Outcome, what it took, replicas that stopped without having lost their chips, and replicas that lost them."""
    pools = {pool.name: pool for pool in problem.pools}
    used: dict[str, int] = dict.fromkeys(pools, 0)
    for demand in problem.demands:
        options = {o.name: o for o in demand.options}
        for name, count in before.assignment.replicas[demand.name].items():
            used[options[name].pool] += options[name].slices * count
    hit = max(pools, key=lambda name: used[name] / max(1, pools[name].num_chips))
    to_lose, lost, demands = 8 * SLICES_PER_CHIP, 0, []
    for demand in problem.demands:
        options = {o.name: o for o in demand.options}
        running = dict(before.assignment.replicas[demand.name])
        for name in list(running):
            while running[name] and options[name].pool == hit and to_lose >= options[name].slices:
                running[name] -= 1
                to_lose -= options[name].slices
                lost += 1
        moving = tuple(replace(o, start_cost=o.cost) for o in demand.options)
        demands.append(replace(demand, options=moving, running={n: c for n, c in running.items() if c}))
    fewer = tuple(replace(p, num_chips=p.num_chips - 8) if p.name == hit else p for p in problem.pools)
    changed = replace(problem, pools=fewer, demands=tuple(demands))
    after, spent = _solve(changed, "fast")
    moved = sum(
        max(0, count - after.assignment.replicas[d.name].get(name, 0))
        for d in changed.demands
        for name, count in d.running.items()
    )
    return after, spent, moved, lost


def run_baselines(seeds: int) -> None:
    """Watts of the same served load: what a rule leaves unserved is counted as if its watts per load went on."""
    for seed in range(seeds):
        fleet = make_fleet(200, 5000, 0.6, seed)
        outcome, spent = _solve(fleet.problem, "refined")
        watts, served = watts_and_served(fleet.problem, outcome.assignment.replicas)
        print(f"#{seed} {'mxn, refined':<24} {watts / 1e3:9.1f} kW  served {served:.4f} {spent}", flush=True)
        for name, rule in RULES.items():
            other, share = watts_and_served(fleet.problem, rule(fleet))
            ratio = (other / share) / (watts / served)
            print(
                f"#{seed} {name:<24} {other / 1e3:9.1f} kW  served {share:.4f}  {ratio:.2f} x mxn's watts", flush=True
            )


CASES: dict[str, Callable[[int], None]] = {
    "small": lambda seeds: run_case("small", (50, 200, 0.6), ("exact",), seeds),
    "middle": lambda seeds: run_case("middle", (200, 5000, 0.6), ("refined",), seeds),
    "middle-overload": lambda seeds: run_case("middle-overload", (200, 5000, 2.2), ("fast", "refined"), seeds),
    "large": lambda seeds: run_case("large", (1000, 10_000, 0.6), ("fast", "refined"), seeds),
    "large-overload": lambda seeds: run_case("large-overload", (1000, 10_000, 2.2), ("refined",), seeds),
    "node-loss": run_node_loss,
    "baselines": run_baselines,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all when left out")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    for name in arguments.cases or CASES:
        CASES[name](arguments.seeds)


if __name__ == "__main__":
    main()
