import pytest

from mxn.bench.client import RequestResult
from mxn.bench.metrics import METRIC_UNITS, Spread, metrics, percentile


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
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0, n=3)
