"""The page holds every figure, needs nothing from outside, and shows what is no result as none."""

import re
from html.parser import HTMLParser

import pytest

from mxn.bench.page import page
from mxn.bench.records import ALL, Report, Skipped
from mxn.bench.svg import Series, chart
from mxn.bench.workloads import WORKLOADS
from mxn.core.quantity import Provenance

from .made import MANIFEST, record, report, subject


class Checker(HTMLParser):
    """Fails at tags that are not closed in order."""

    VOID = frozenset({"meta", "line", "circle", "polyline", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


def test_page_shows_the_figures_and_needs_nothing_from_outside() -> None:
    one = record((100.0,), workload=WORKLOADS["W2c8"])
    other = record((400.0,), workload=WORKLOADS["W2c32"], of=subject("fp", quantisation="fp32"))
    text = page([report(one, other)])
    found = checked(text)
    shown = " ".join(found.text)
    assert "5.00 tok/W" in shown
    assert "20.0 tok/W" in shown
    assert "measured" in shown
    assert found.tags.count("svg") == 3
    assert not re.search(r"https?://|<script|<link|src=|@import|url\(", text)


def test_faulty_record_is_no_result_and_not_in_the_charts() -> None:
    text = page([report(record(faults=("3 of 32 requests: the server died",)))])
    assert "no result" in text
    assert "the server died" in text
    assert "no record has both figures" in text
    assert "tok/W" not in text


def test_unknown_power_is_a_dash_and_never_zero() -> None:
    shown = " ".join(checked(page([report(record(watts=None))])).text)
    assert "- tok/W" in shown
    assert "watts unknown" in shown
    assert not re.search(r"\b0(\.0+)? tok/W", shown)


def test_skipped_cells_tell_why() -> None:
    skipped = (
        Skipped(model="tiny", backend="cpu", quantisation="bf16", reason="needs 9 GiB"),
        Skipped(model=ALL, backend="cuda", quantisation=ALL, reason="absent: no driver"),
    )
    shown = " ".join(checked(page([Report(manifest=MANIFEST, records=(record(),), skipped=skipped)])).text)
    assert "needs 9 GiB" in shown
    assert "cuda: absent: no driver" in shown


def test_rows_that_are_not_like_for_like_are_told() -> None:
    text = page([report(record(), record(of=subject("b", quantisation="fp32"), provenance=Provenance.ESTIMATED))])
    assert "Not like for like: power is measured in" in text


def test_names_from_outside_cannot_become_markup() -> None:
    text = page([report(record(of=subject("<script>alert(1)</script>", model="<b>x")))])
    assert "<script>" not in text
    assert "<b>x" not in text


@pytest.mark.parametrize("high", [1e-6, 0.7, 3.0, 99.0, 12_345.0])
def test_axes_reach_every_point(high: float) -> None:
    svg = chart([Series(name="a", points=((high, high, ""), (0.0, None, "")))], x_title="x", y_title="y")
    x, y = (float(v) for v in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)[0])
    assert 66 <= x <= 640 - 18
    assert 14 <= y <= 340 - 48
