"""What `mxn top` and `mxn status` show, from answers of a server and from a real one."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from mxn.cli.rates import Rate, Rates
from mxn.cli.top import View, sparkline, watts_text

from .conftest import Mxn, Serving


def replica(name: str, chip: str, *, tokens: int = 0, joules: float | None = 0.0, **fields: Any) -> dict[str, Any]:
    stats = {
        "num_running": 2,
        "num_waiting": 1,
        "num_free_blocks": 75,
        "num_total_blocks": 100,
        "num_output_tokens": tokens,
        "num_prompt_tokens": 0,
        "chip_energy_j": joules,
    }
    progress = {"state": "ready", "is_ready": True, "is_stalled": False, "load_phase": "", "load_fraction": 1.0}
    facts = {"reason": "", "backend": "cuda", "chips": [chip], "info": {"quantisation": "fp8"}, "stats_age_s": 0.0}
    return {"id": name, **progress, **facts, "stats": stats, **fields}


def status(now_s: float, *replicas: dict[str, Any]) -> dict[str, Any]:
    chips: dict[str, dict[str, Any]] = {}
    for one in replicas:
        for uid in one["chips"]:
            empty = {"uid": uid, "name": "H100", "state": "ok", "reason": "", "power_source": "nvml (measured)"}
            chips.setdefault(uid, {**empty, "replicas": []})["replicas"].append(one["id"])
    stats: dict[str, int] = {}
    for one in replicas:
        for key, value in (one["stats"] or {}).items():
            stats[key] = stats.get(key, 0) + (value or 0)
    deployment = {
        "model": "llama",
        "state": "ready",
        "is_ready": True,
        "is_stalled": False,
        "trouble": "",
        "num_waiting": 5,
    }
    gateway = {"version": "1", "now_s": now_s, "is_draining": False, "num_active_requests": 3}
    deployments = [{**deployment, "replicas": list(replicas), "stats": stats}]
    return {"gateway": gateway, "deployments": deployments, "chips": list(chips.values())}


def shown(view: View, width: int, height: int | None = None) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(view.screen(width, height))
    return [line.rstrip() for line in console.export_text().splitlines()]


def watched(*answers: dict[str, Any]) -> View:
    view = View("http://localhost:8000")
    for answer in answers:
        view.take(answer)
    return view


TWO = watched(
    status(100.0, replica("llama/0", "gpu-0"), replica("llama/1", "gpu-1")),
    status(
        102.0,
        replica("llama/0", "gpu-0", tokens=2000, joules=1000.0),
        replica("llama/1", "gpu-1", tokens=1000, joules=200.0),
    ),
)


@pytest.mark.parametrize("width", [80, 120])
def test_top_shows_tokens_watts_and_tokens_per_watt_of_all_and_each(width: int) -> None:
    lines = shown(TWO, width)
    assert max(map(len, lines)) <= width
    assert "tokens/s 1,500" in lines[1]
    assert "watts 600" in lines[1]
    assert "tokens/W 2.50" in lines[1]
    [total] = [line for line in lines if line.startswith("llama ")]
    assert total.split()[-6:] == ["4", "7", "25", "1,500", "600", "2.50"]
    [first] = [line for line in lines if line.startswith("  llama/0")]
    assert first.split()[-6:] == ["2", "1", "25", "1,000", "500", "2.00"]
    [chip] = [line for line in lines if line.startswith("gpu-1")]
    assert "llama/1" in chip
    assert chip.split()[-5:-2] == ["500", "100", "5.00"]


def test_wide_screen_adds_backend_and_format() -> None:
    assert "fp8" not in "".join(shown(TWO, 80))
    assert "cuda" in "".join(shown(TWO, 120))
    assert "fp8" in "".join(shown(TWO, 120))


def test_low_screen_leaves_chips_out() -> None:
    assert any(line.startswith("CHIP") for line in shown(TWO, 80, 24))
    assert not any(line.startswith("CHIP") for line in shown(TWO, 80, 9))


def test_replica_that_is_not_ready_says_why() -> None:
    fault = "weights.safetensors is truncated"
    broken = replica("llama/1", "gpu-1", is_ready=False, state="failed", reason=fault, stats=None, info=None)
    loading = replica(
        "llama/2", "gpu-2", is_ready=False, state="loading", load_phase="weights", load_fraction=0.4, stats=None
    )
    lines = shown(watched(status(1.0, replica("llama/0", "gpu-0"), broken, loading)), 80)
    assert any("1/3 ready" in line for line in lines)
    assert any("weights 40%" in line for line in lines)
    assert f"llama/1: {fault}" in lines


def test_server_that_went_away_is_said_so() -> None:
    view = watched(status(1.0, replica("llama/0", "gpu-0")))
    view.fault = "connection refused"
    assert "does not answer: connection refused" in shown(view, 80)[0]


def test_unmetered_chip_makes_tokens_per_watt_unknown() -> None:
    rates = Rates()
    for now_s, tokens in ((0.0, 0), (1.0, 50)):
        rates.take(
            status(
                now_s,
                replica("a/0", "gpu-0", tokens=tokens, joules=10 * now_s),
                replica("a/1", "npu-0", tokens=tokens, joules=None),
            )
        )
    total = Rate.total([rates.of("a/0"), rates.of("a/1")])
    assert total.output_tokens_per_s == 100
    assert total.tokens_per_watt is None
    assert watts_text(total) == "10.0+?"
    assert rates.of("a/0").tokens_per_watt == 5


def test_rates_start_anew_with_a_new_process_and_use_the_time_of_the_counters() -> None:
    rates = Rates()
    rates.take(status(0.0, replica("a/0", "gpu-0", tokens=1000)))
    rates.take(status(1.0, replica("a/0", "gpu-0", tokens=10)))
    assert rates.of("a/0") == Rate()
    rates.take(status(4.0, replica("a/0", "gpu-0", tokens=110, stats_age_s=1.0)))
    assert rates.of("a/0").output_tokens_per_s == 50
    rates.take(status(5.0))
    assert rates.of("a/0") == Rate()


def test_watts_are_those_between_bookings_of_energy() -> None:
    rates = Rates()
    for now_s, joules in ((0.0, 0.0), (1.0, 0.0), (5.0, 10.0), (6.0, 10.0)):
        rates.take(status(now_s, replica("a/0", "gpu-0", joules=joules)))
        assert rates.of("a/0").watts == (2.0 if joules else None)
    rates.take(status(30.0, replica("a/0", "gpu-0", joules=10.0)))
    assert rates.of("a/0").watts is None


def test_sparkline_goes_from_zero_to_the_highest() -> None:
    assert sparkline([0, 50, 100], 8) == "▁▅█"
    assert sparkline([0, 0], 8) == "▁▁"
    assert len(sparkline(range(100), 8)) == 8


def test_top_off_a_terminal_prints_once(mxn: Mxn, server: Serving) -> None:
    ran = mxn("top", "--url", server.url, "--every", "0.2")
    assert ran.code == 0, ran.err
    assert "1 of 1 replicas ready" in ran.out
    assert "fake-0" in ran.out
    assert "\x1b" not in ran.out


def test_status_of_one_deployment_shows_its_details(mxn: Mxn, server: Serving) -> None:
    ran = mxn("status", "tiny", "--url", server.url)
    assert ran.code == 0, ran.err
    assert "started in" in ran.out
    ran = mxn("status", "other", "--url", server.url)
    assert ran.code == 1
    assert "it has tiny" in ran.err


def test_explain_says_where_and_why(mxn: Mxn, server: Serving) -> None:
    ran = mxn("explain", "--url", server.url, "--prompt", "hello")
    assert ran.code == 0, ran.err
    assert "fake-0 through fake" in ran.out
    assert "> tiny/0" in ran.out
    ran = mxn("explain", "other", "--url", server.url)
    assert ran.code == 1
    assert "does not exist" in ran.err
