import pytest

from mxn.bench.client import RequestResult
from mxn.bench.metrics import (
    METRIC_UNITS,
    Slo,
    Spread,
    drift_warning,
    error_counts,
    metrics,
    parse_slo,
    percentile,
    steady_window,
    window_metrics,
)
from mxn.errors import ConfigError


def result(start_s: float, times_s: tuple[float, ...], *, prompt: int | None = 10, error: str | None = None):
    return RequestResult(
        start_s=start_s,
        end_s=times_s[-1] if times_s else start_s,
        chunk_times_s=times_s,
        num_output_tokens=len(times_s),
        num_prompt_tokens=prompt,
        error=error,
    )


def test_figures_of_two_overlapping_requests() -> None:
    figures = metrics([result(0.0, (0.5, 1.0, 1.5)), result(1.0, (2.0, 2.2, 2.4))], client_cpu_s=0.24)
    assert figures["duration_s"] == pytest.approx(2.4)
    assert figures["output_tokens_per_s"] == pytest.approx(6 / 2.4)
    assert figures["prompt_tokens_per_s"] == pytest.approx(20 / 2.4)
    assert figures["ttft_ms"] == pytest.approx(750)
    assert figures["ttft_p99_ms"] == pytest.approx(1000)
    assert figures["tpot_ms"] == pytest.approx(350)
    assert figures["decode_tokens_per_s"] == pytest.approx(1 / 0.35)
    assert figures["itl_ms"] == pytest.approx(350)
    assert figures["client_cpu_share"] == pytest.approx(0.1)
    assert set(figures) <= set(METRIC_UNITS)


def test_one_token_answers_have_no_tpot() -> None:
    figures = metrics([result(0.0, (0.5,))], client_cpu_s=0)
    assert "tpot_ms" not in figures
    assert figures["prompt_tokens_per_s"] == pytest.approx(20)


def test_failed_requests_count_nowhere() -> None:
    assert metrics([result(0.0, (), error="refused")], client_cpu_s=0) == {}
    figures = metrics([result(0.0, (0.5, 1.0)), result(0.0, (9.0,), error="broke off")], client_cpu_s=0)
    assert figures["duration_s"] == pytest.approx(1.0)


def test_unknown_prompt_length_leaves_prompt_speed_out() -> None:
    assert "prompt_tokens_per_s" not in metrics([result(0.0, (0.5,), prompt=None)], client_cpu_s=0)


def test_percentile_is_a_value_that_occurred() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile([1.0], 1) == 1.0


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(
        median=2.0,
        low=1.0,
        high=3.0,
        n=3,
        mean=2.0,
        ci95=(pytest.approx(2 - 2.4841, abs=1e-3), pytest.approx(4.4841, abs=1e-3)),
    )


def busy(num: int, seconds: float, *, start_s: float = 0.0, rate: float = 10.0) -> list[RequestResult]:
    """`num` requests side by side, each with `rate` tokens a second, evenly."""
    times_s = tuple(start_s + (i + 1) / rate for i in range(round(seconds * rate)))
    return [result(start_s, times_s) for _ in range(num)]


def test_window_counts_what_arrived_inside() -> None:
    ended = window_metrics([*busy(4, 40), *busy(1, 10, start_s=15)], 10.05, 30.05)
    assert ended["output_tokens_per_s"] == pytest.approx((4 * 200 + 100) / 20, rel=0.005)
    assert ended["requests_per_s"] == pytest.approx(1 / 20)
    assert ended["in_flight"] == pytest.approx(4.5, rel=0.005)


def test_steady_part_of_a_closed_loop_leaves_ramp_and_drain_out() -> None:
    results = [result(i * 1.0, (60.0 + i,)) for i in range(10)]
    begin_s, end_s = steady_window(results, is_open=False)
    assert (begin_s, end_s) == (8.0, 61.0)


def test_short_gap_between_requests_does_not_end_the_steady_part() -> None:
    results = [result(i + 0.01, (i + 1.0,)) for i in range(40)]
    assert steady_window(results, is_open=False) == (0.01, 40.0)


def test_open_loop_is_cut_by_time() -> None:
    results = [result(float(i), (i + 0.5,)) for i in range(101)]
    assert steady_window(results, is_open=True) == (10.0, 90.0)


def test_run_that_is_too_short_has_no_steady_part_and_says_so() -> None:
    assert "expected at least 20 s" in str(steady_window(busy(2, 5), is_open=False))


def test_drift_is_told_and_evenness_is_not() -> None:
    even = busy(1, 30)
    assert drift_warning(even, 0, 30) is None
    rising = [*even, *(r for i in range(3) for r in busy(1, 9.0 * (i + 1), start_s=30 - 9.0 * (i + 1)))]
    assert "+" in str(drift_warning(rising, 0, 30))


def test_goodput_counts_requests_within_every_limit() -> None:
    results = [result(0, (0.1, 0.2)), result(0, (0.6, 0.7)), result(0, (0.1, 1.0)), result(0, (), error="x")]
    figures = metrics(results, None, Slo(ttft_ms=500, tpot_ms=200))
    assert figures["goodput_per_s"] == pytest.approx(1 / 1.0)
    assert figures["requests_per_s"] == pytest.approx(3)


def test_limits_are_read_from_text_or_refused() -> None:
    assert parse_slo("ttft=500, tpot=50") == Slo(ttft_ms=500, tpot_ms=50)
    for text in ("ttft", "ttft=fast", "itl=5", "ttft=-1"):
        with pytest.raises(ConfigError, match="expected ttft=MS"):
            parse_slo(text)


def test_errors_are_counted_by_kind() -> None:
    refused = result(0, (), error="x")
    assert error_counts([refused, refused, result(0, (1.0,))]) == {"other": 2}
