"""`mxn top`: what a running server does right now, redrawn every second or so."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxn.cli.rates import Rate, Rates

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_WIDE = 110
"""Columns from which replicas are shown with backend and quantisation."""
_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {"ready": "green", "loading": "yellow", "starting": "yellow", "draining": "yellow", "cold": "cyan"}


def top(
    url: Annotated[str, typer.Option(help="Address of an mxn server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="MXN_API_KEY", help="Key that the server asks for.")] = None,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2, max=60)] = 1.0,
) -> None:
    """Watch a running server: load, tokens/s, tokens per watt.

    By model, replica and chip. Ctrl-C ends it. Off a terminal it looks twice, prints once as plain text and ends.
    Rates are those of the last 10 s.
    """
    from mxn.cli.console import out
    from mxn.cli.converse import get_json, http_client

    base = url.rstrip("/").removesuffix("/v1")
    console = out()
    view = View(base)
    with http_client(api_key) as client:
        if not console.is_terminal:
            view.take(get_json(client, f"{base}/v1/mxn/status"))
            time.sleep(every)
            view.take(get_json(client, f"{base}/v1/mxn/status"))
            console.print(view.screen(console.width))
            return
        _watch(console, view, lambda: get_json(client, f"{base}/v1/mxn/status"), every)


def _watch(console: Console, view: View, look: Any, every_s: float) -> None:
    """Redraws until Ctrl-C. A server that does not answer is said so, and looked for again."""
    from rich.live import Live

    from mxn.errors import MxnError

    view.take(look())  # an address that is wrong from the start is an error, not a screen
    with Live(view.screen(console.width), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every_s)
                try:
                    view.take(look())
                except MxnError as error:
                    view.fault = str(error)
                live.update(view.screen(console.width, console.height), refresh=True)
        except KeyboardInterrupt:
            return


class View:
    """What is shown, made of the status answers taken so far. fault: why the newest could not be had."""

    def __init__(self, base: str) -> None:
        self.fault = ""
        self._base = base
        self._status: Mapping[str, Any] = {}
        self._rates = Rates()
        self._speeds: deque[float] = deque(maxlen=60)

    def take(self, status: Mapping[str, Any]) -> None:
        """Adds an answer of /v1/mxn/status."""
        self.fault = ""
        self._status = status
        self._rates.take(status)
        self._speeds.append(self._total().output_tokens_per_s or 0.0)

    def screen(self, width: int, height: int | None = None) -> RenderableType:
        """All of it, for a terminal of that many columns; lines that a lower one cannot hold are left out."""
        from rich.console import Group

        parts = [self._headline(), self._totals(width), "", self._replicas(width)]
        reasons = self._reasons()
        num_lines = 4 + self._num_rows() + len(reasons)
        if height is None or num_lines + len(self._status["chips"]) + 2 <= height:
            parts += ["", self._chips(width)]
        if reasons:
            parts += ["", *reasons]
        return Group(*parts)

    def _headline(self) -> RenderableType:
        from rich.text import Text

        gateway = self._status["gateway"]
        line = Text(f"mxn {gateway['version']}", style="bold")
        line.append(f"  {self._base}  ", style="dim")
        if self.fault:
            return line.append(f"does not answer: {self.fault}", style="red")
        replicas = [replica for d in self._status["deployments"] for replica in d["replicas"]]
        num_ready = sum(replica["is_ready"] for replica in replicas)
        line.append(
            "draining" if gateway["is_draining"] else "serving", style="yellow" if gateway["is_draining"] else "green"
        )
        line.append(f"  {num_ready} of {len(replicas)} replicas ready")
        line.append(f"  {gateway['num_active_requests']} requests")
        return line

    def _totals(self, width: int) -> RenderableType:
        from rich.text import Text

        total = self._total()
        stats = [replica["stats"] for d in self._status["deployments"] for replica in d["replicas"] if replica["stats"]]
        line = Text()
        for label, value in (
            ("tokens/s ", number(total.output_tokens_per_s)),
            ("  prompt/s ", number(total.prompt_tokens_per_s)),
            ("  watts ", watts_text(total)),
            ("  tokens/W ", number(total.tokens_per_watt)),
            ("  running ", str(sum(s["num_running"] for s in stats))),
            ("  waiting ", str(self._num_waiting())),
        ):
            line.append(label, style="dim").append(value, style="bold")
        if width >= _WIDE:
            line.append("  ").append(sparkline(self._speeds, 24), style="cyan")
        return line

    def _replicas(self, width: int) -> Table:
        """A row per deployment that has several replicas, and one per replica."""
        is_wide = width >= _WIDE
        table = _table(width)
        table.add_column("MODEL / REPLICA", ratio=3, no_wrap=True, overflow="ellipsis")
        table.add_column("STATE", max_width=16, no_wrap=True, overflow="ellipsis")
        if is_wide:
            table.add_column("BACKEND", max_width=12, no_wrap=True, overflow="ellipsis")
            table.add_column("QUANT", no_wrap=True)
        table.add_column("CHIPS", max_width=24 if is_wide else 12, no_wrap=True, overflow="ellipsis")
        for name in ("RUN", "WAIT", "KV %", "TOK/S", "W", "TOK/W"):
            table.add_column(name, justify="right", no_wrap=True)
        for deployment in self._status["deployments"]:
            rows = deployment["replicas"]
            if len(rows) != 1:
                rate = Rate.total(self._rates.of(replica["id"]) for replica in rows)
                num_ready = sum(replica["is_ready"] for replica in rows)
                state = f"{num_ready}/{len(rows)} ready" if rows else state_text(deployment)
                table.add_row(
                    f"[bold]{deployment['model']}[/]",
                    _coloured(state, deployment),
                    *(("", "") if is_wide else ()),
                    "",
                    *_figures(deployment["stats"], rate, deployment["num_waiting"]),
                )
            for replica in rows:
                label = f"[bold]{deployment['model']}[/]" if len(rows) == 1 else f"  {replica['id']}"
                info = replica["info"] or {}
                more = (replica["backend"], info.get("quantisation", "-")) if is_wide else ()
                chips = "+".join(replica["chips"])
                queued = deployment["num_waiting"] if len(rows) == 1 else 0
                figures = _figures(replica["stats"], self._rates.of(replica["id"]), queued)
                table.add_row(label, _coloured(state_text(replica), replica), *more, chips, *figures)
        return table

    def _chips(self, width: int) -> Table:
        """A row per chip: who is on it and what it draws."""
        table = _table(width)
        table.add_column("CHIP", max_width=24 if width >= _WIDE else 12, no_wrap=True, overflow="ellipsis")
        table.add_column("NAME", ratio=2, no_wrap=True, overflow="ellipsis")
        table.add_column("REPLICAS", ratio=3, no_wrap=True, overflow="ellipsis")
        table.add_column("TOK/S", justify="right", no_wrap=True)
        table.add_column("W", justify="right", no_wrap=True)
        table.add_column("TOK/W", justify="right", no_wrap=True)
        table.add_column("SOURCE", max_width=22, no_wrap=True, overflow="ellipsis")
        for chip in self._status["chips"]:
            rate = Rate.total(self._rates.of(replica_id) for replica_id in chip["replicas"])
            replicas = ", ".join(chip["replicas"]) or "none"
            if chip["state"] != "ok":
                replicas = f"[red]{chip['state']}[/]: {chip['reason']}"
            table.add_row(
                chip["uid"],
                chip["name"],
                replicas,
                number(rate.output_tokens_per_s),
                watts_text(rate),
                number(rate.tokens_per_watt),
                chip["power_source"],
            )
        return table

    def _reasons(self) -> list[RenderableType]:
        """Why replicas are not ready, and what deployments lack; a line each."""
        from rich.text import Text

        texts = []
        for deployment in self._status["deployments"]:
            texts += [
                f"{replica['id']}: {replica['reason']}" for replica in deployment["replicas"] if replica["reason"]
            ]
            if deployment["trouble"]:
                texts.append(f"{deployment['model']}: {deployment['trouble']}")
        return [Text(text, style="red", no_wrap=True, overflow="ellipsis") for text in texts]

    def _num_rows(self) -> int:
        return sum(len(d["replicas"]) + (len(d["replicas"]) != 1) for d in self._status["deployments"])

    def _num_waiting(self) -> int:
        return sum(d["stats"]["num_waiting"] + d["num_waiting"] for d in self._status["deployments"])

    def _total(self) -> Rate:
        return Rate.total(self._rates.of(r["id"]) for d in self._status["deployments"] for r in d["replicas"])


def state_text(part: Mapping[str, Any]) -> str:
    """The state of a deployment or a replica, with how far its loading is."""
    if part["is_ready"]:
        return "ready"
    if part["is_stalled"]:
        return "stalled"
    if part["state"] == "loading" and part["load_phase"]:
        return f"{part['load_phase']} {part['load_fraction']:.0%}"
    return str(part["state"])


def number(value: float | None) -> str:
    """Three digits that matter; a dash for what is not known."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def watts_text(rate: Rate) -> str:
    """Watts, with "+?" when a part of them is not metered."""
    return number(rate.watts) + ("+?" if rate.has_unmetered and rate.watts is not None else "")


def sparkline(values: Sequence[float] | deque[float], width: int) -> str:
    """The newest values as bars from 0 to the highest."""
    shown = list(values)[-width:]
    highest = max(shown, default=0.0)
    return "".join(_BARS[min(7, int(8 * value / highest))] if highest > 0 else _BARS[0] for value in shown)


def _table(width: int) -> Table:
    from rich.table import Table

    return Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim", width=width, expand=True)


def _figures(stats: Mapping[str, Any] | None, rate: Rate, num_queued: int) -> tuple[str, ...]:
    if stats is None:
        return ("-",) * 6
    total = stats["num_total_blocks"]
    usage = f"{100 * (1 - stats['num_free_blocks'] / total):.0f}" if total else "-"
    return (
        str(stats["num_running"]),
        str(stats["num_waiting"] + num_queued),
        usage,
        number(rate.output_tokens_per_s),
        watts_text(rate),
        number(rate.tokens_per_watt),
    )


def _coloured(text: str, part: Mapping[str, Any]) -> str:
    style = "green" if part["is_ready"] else _STYLES.get(part["state"], "red")
    return f"[{'red' if part['is_stalled'] else style}]{text}[/]"
