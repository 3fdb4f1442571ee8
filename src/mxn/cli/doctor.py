"""`mxn doctor`: checks the set-up line by line, each with what to do when it is not right."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report. `todo`: what to do when it is not ok."""

    what: str
    state: State
    detail: str
    todo: str = ""


def doctor(
    port: Annotated[int, typer.Option(help="Port that is to be free for serving.", min=0, max=65535)] = 8000,
    model: Annotated[str | None, typer.Option(help="Model to compare ways of computing on: name, folder.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Neither serve nor compare a model.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the set-up, and say what to do.

    Versions, backends, compiler, kernels, power, memory, disk, models, network, port, and whether the default model
    gives a right answer if it is on this disk; then how far each way of computing it on the CPU is from float32, and
    how long a step takes. Exits 1 when something fails.
    """
    from mxn.cli.console import EXIT_FAILURE, out, print_pairs, show_json

    checks: list[Callable[[], Iterator[Finding]]] = [
        *(_python, _packages, _backends, _compiler, _kernels, _power, _memory, _disk, _models, _network),
        lambda: _port(port),
        *([] if quick else [_self_test, lambda: _ways(model)]),
    ]
    findings: list[Finding] = []
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    console = out()
    for check in checks:
        for finding in _guarded(check):
            findings.append(finding)
            if not json_output:
                mark = f"[{colours[finding.state]}]{finding.state:<4}[/]"
                print_pairs(console, [(finding.what, finding.detail)], mark=mark, width=15)
                if finding.todo:
                    print_pairs(console, [("", f"-> {finding.todo}")], mark="    ", width=15)
    if json_output:
        show_json(findings)
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(EXIT_FAILURE)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that breaks is itself a finding."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(check.__name__.strip("_"), "fail", f"the check broke: {type(error).__name__}: {error}")


def _python() -> Iterator[Finding]:
    import mxn

    version = platform.python_version()
    is_right = (3, 11) <= sys.version_info < (3, 15)
    yield Finding(
        "python",
        "ok" if is_right else "fail",
        f"{version} on {platform.system()} {platform.machine()}, mxn {mxn.__version__}",
        "" if is_right else "mxn needs Python 3.11 to 3.14",
    )


def _packages() -> Iterator[Finding]:
    """Compares what is installed with what mxn asks for, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    wrong, found = [], []
    for line in requires("mxn") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "cpu"}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.name in ("torch", "transformers", "tokenizers", "fastapi", "uvicorn"):
            found.append(f"{requirement.name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    todo = "pip install 'mxn[cpu]' -c constraints.txt, or `make setup` in a checkout"
    yield Finding("packages", "fail" if wrong else "ok", "; ".join(wrong or [", ".join(found)]), todo if wrong else "")


def _backends() -> Iterator[Finding]:
    from mxn.backends.survey import survey

    active = []
    for name, said in survey().items():
        if said.probe.state == "broken":
            todo = f"mxn backend doctor {name} says more; pip uninstall its package if nobody needs it"
            yield Finding(f"backend {name}", "fail", said.probe.reason, todo)
        elif not said.is_scripted:
            yield Finding(f"backend {name}", "ok", f"{said.probe.state}: {said.probe.reason}")
            active += [name] * (said.probe.state == "active")
    if not active:
        yield Finding("backends", "fail", "none is active", "pip install 'mxn[cpu]' gives the CPU backend")


def _compiler() -> Iterator[Finding]:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        yield Finding(
            "compiler",
            "warn",
            "no g++ found: the fast CPU kernels cannot be built, models run on plain torch, several times slower",
            "apt install g++ (or your system's package for it)",
        )
        return
    first = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10).stdout.splitlines()
    yield Finding("compiler", "ok", first[0] if first else compiler)


def _kernels() -> Iterator[Finding]:
    """Asks in a process of its own, because asking imports torch."""
    code = (
        "from mxn.attention.paged import PagedCpuAttention\n"
        "library = PagedCpuAttention([], 1, 16).workspace.library\n"
        "print(f'built for {library.isa}: {library.path}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    if done.returncode == 0:
        yield Finding("cpu kernels", "ok", done.stdout.strip())
    else:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1].rpartition("Error: ")[2]
        yield Finding("cpu kernels", "warn", f"not usable: {last}", "models run on plain torch; install g++ 9 or newer")


def _power() -> Iterator[Finding]:
    from mxn.backends.survey import physical_chips, survey
    from mxn.energy.reader import ReaderKind

    for chip in physical_chips({name: said for name, said in survey().items() if not said.is_scripted}):
        is_measured = chip.power.kind in (ReaderKind.COUNTER, ReaderKind.EXTERNAL, ReaderKind.SAMPLED)
        yield Finding(
            f"power of {chip.chip.uid}",
            "ok" if is_measured else "warn",
            f"{chip.power.name}: {chip.power.detail}",
            "" if is_measured else "figures stay marked as estimated; on bare metal, readable RAPL counters mend that",
        )


def _memory() -> Iterator[Finding]:
    import psutil

    from mxn.cli.console import size_text

    memory = psutil.virtual_memory()
    is_enough = memory.available >= 2 * 2**30
    yield Finding(
        "memory",
        "ok" if is_enough else "warn",
        f"{size_text(memory.available)} available of {size_text(memory.total)}, {len(os.sched_getaffinity(0))} cores",
        "" if is_enough else "the default model wants about 2 GiB; close something or use --kv-gib 0.1",
    )


def _disk() -> Iterator[Finding]:
    from mxn.cli.console import size_text
    from mxn.config.environment import cache_dir

    folder = cache_dir()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        yield Finding("cache", "fail", f"{folder} cannot be written", "set MXN_CACHE_DIR to a folder of yours")
        return
    is_enough = free >= 2 * 2**30
    todo = "" if is_enough else "free some space or set MXN_CACHE_DIR to a larger disk"
    yield Finding("cache", "ok" if is_enough else "warn", f"{folder}, {size_text(free)} free", todo)


def _models() -> Iterator[Finding]:
    from mxn.cli.console import size_text
    from mxn.cli.prepare import DEFAULT_MODEL
    from mxn.config.model_card import load_model_cards
    from mxn.store.fetch import list_cached

    cards = load_model_cards()
    cached = list_cached()
    names = ", ".join(f"{m.name} ({size_text(m.bytes)})" for m in cached) or "none"
    is_here = any(m.name == DEFAULT_MODEL for m in cached)
    yield Finding(
        "models",
        "ok" if is_here else "warn",
        f"{len(cards)} cards; on this disk: {names}",
        "" if is_here else f"mxn models pull {DEFAULT_MODEL} (about 100 MB) makes the first start quick",
    )


def _self_test() -> Iterator[Finding]:
    """Serves the default model, if it is here, and asks it something to which every sane copy knows the answer."""
    import time

    from mxn.cli.converse import Turn, converse, http_client
    from mxn.cli.own_server import own_server
    from mxn.cli.prepare import DEFAULT_MODEL
    from mxn.errors import MxnError
    from mxn.store.fetch import list_cached

    if not any(model.name == DEFAULT_MODEL for model in list_cached()):
        return
    question, turn, started_s = {"role": "user", "content": "What is the capital of France?"}, Turn(), time.monotonic()
    try:
        with own_server(DEFAULT_MODEL, is_quiet=True) as server, http_client() as client:
            ready_s = time.monotonic() - started_s
            pieces = converse(client, server.url, server.name, [question], turn, temperature=0, max_tokens=24)
            answer = "".join(pieces).strip()
    except MxnError as error:
        yield Finding(
            "self-test", "fail", str(error), "mxn serve shows how far it gets; MXN_LOG_LEVEL=debug shows more"
        )
        return
    is_right = "Paris" in answer
    yield Finding(
        "self-test",
        "ok" if is_right else "fail",
        f"{server.name} with {server.quantisation} and {server.attention} was ready after {ready_s:.0f} s and "
        f'answered "{answer}" ({turn.stats_text()})',
        "" if is_right else "the answer is wrong: try --quantisation fp32 and --attention reference, and report it",
    )


def _ways(model: str | None) -> Iterator[Finding]:
    """Every way of computing a model on the CPU beside float32, in a process of its own that may import torch."""
    import json

    from mxn.backends.host import usable_cores
    from mxn.cli.prepare import DEFAULT_MODEL
    from mxn.config.environment import child_environment
    from mxn.fleet.launchers.local import ENVIRONMENT
    from mxn.store.fetch import fetch, list_cached

    if model is None and not any(cached.name == DEFAULT_MODEL for cached in list_cached()):
        return
    folder = fetch(model or DEFAULT_MODEL).folder
    command = [sys.executable, "-m", "mxn.runner.tiers", folder, "--cores", str(usable_cores())]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env=child_environment(defaults=ENVIRONMENT)
    )
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    reference = next((entry for entry in entries if "nll" in entry), None)
    for entry in entries:
        yield _way(entry, reference)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        yield Finding("ways", "fail", f"the comparison ended early: {last}", "python -m mxn.runner.tiers shows more")


def _way(entry: dict[str, Any], reference: dict[str, Any] | None) -> Finding:
    if "nll" not in entry:
        return Finding(entry["tier"], "warn", f"not offered: {entry['error']}")
    times = ", ".join(f"{case} {ms:.3g} ms" for case, ms in entry["ms"].items())
    threads = f"{entry['threads']} thread{'s' if entry['threads'] != 1 else ''}"
    if reference is None or entry is reference:
        return Finding(entry["tier"], "ok", f"the reference, on {threads}: {times}")
    change = entry["nll"] / reference["nll"] - 1
    is_near = change <= 0.02
    return Finding(
        entry["tier"],
        "ok" if is_near else "warn",
        f"logits off by {entry['error']:.1%} (one token by {entry['worst_error']:.1%}), {entry['same_tokens']:.0%} of "
        f"{entry['num_tokens']} next tokens the same, NLL {change:+.1%}; {times}",
        "" if is_near else "serve it with --quantisation fp32, or bf16 to save memory",
    )


def _network() -> Iterator[Finding]:
    from mxn.config.environment import hub_endpoint, is_offline

    if is_offline():
        yield Finding("network", "ok", "not used: MXN_OFFLINE is set")
        return
    from urllib.parse import urlsplit

    host = urlsplit(hub_endpoint()).hostname or "huggingface.co"
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError as error:
        yield Finding(
            "network",
            "warn",
            f"{host} cannot be reached ({error}): models from the hub cannot be fetched",
            "the default model comes from the package index; set MXN_OFFLINE=1 to make that final",
        )
        return
    yield Finding("network", "ok", f"{host} can be reached")


def _port(port: int) -> Iterator[Finding]:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            yield Finding(
                "port", "warn", f"127.0.0.1:{port} cannot be used: {error.strerror}", "use --port with another"
            )
            return
    yield Finding("port", "ok", f"127.0.0.1:{port} is free")
