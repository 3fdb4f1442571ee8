"""When requests of an open loop arrive, whatever the server does."""

from __future__ import annotations

import random
from typing import Literal

from mxn.errors import ConfigError

ArrivalKind = Literal["closed", "poisson", "gamma", "constant", "trace"]


def arrival_times(
    kind: ArrivalKind, rate_per_s: float, count: int, *, seed: int, burstiness: float = 1.0
) -> list[float]:
    """Seconds from the start for `count` arrivals at a mean rate.

    burstiness: shape of the gamma distribution of the gaps; 1 is Poisson, less comes in bursts, more is more even.
    Raises: ConfigError for a rate or burstiness that is not positive.
    """
    if rate_per_s <= 0 or burstiness <= 0:
        raise ConfigError(f"rate and burstiness must be above 0, got {rate_per_s:g} and {burstiness:g}")
    chance, now_s, times_s = random.Random(seed), 0.0, []
    for _ in range(count):
        times_s.append(now_s)
        if kind == "constant":
            now_s += 1 / rate_per_s
        elif kind == "poisson":
            now_s += chance.expovariate(rate_per_s)
        else:
            now_s += chance.gammavariate(burstiness, 1 / (rate_per_s * burstiness))
    return times_s
