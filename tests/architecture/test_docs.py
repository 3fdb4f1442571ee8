"""Documentation that would otherwise drift from the code."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mxn.backends.base import Backend, Embedder, Executor
from mxn.bench.metrics import METRIC_UNITS
from mxn.core.model import LoadSettings, Model, ModelSpec

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "kernels/README.md",
]
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
MAKE_TARGET = re.compile(r"\bmake ([a-z]+)\b")


def test_cli_reference_is_what_the_program_prints() -> None:
    done = subprocess.run([sys.executable, "-m", "mxn.cli.reference"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs/cli.md").read_text() == done.stdout, "run: python -m mxn.cli.reference > docs/cli.md"


def test_readme_names_both_commands_on_its_first_screen() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "make demo" in first_screen
    assert "make test" in first_screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_links_and_make_targets_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = {name for block in code_in(text) for name in MAKE_TARGET.findall(block)} - targets
    assert not unknown, f"{page.name} names make targets that are not there: {unknown}"


def test_the_vendors_page_shows_every_method_as_the_contract_wants_it() -> None:
    """Its examples, put together, make classes that the contract accepts and values that can be built."""
    shown: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/vendors.md").read_text(), re.DOTALL):
        exec(compile(code, "vendors.md", "exec"), shown)  # noqa: S102 (our own page)
    functions = {name: value for name, value in shown.items() if isinstance(value, FunctionType)}
    methods = {name: value for name, value in functions.items() if value.__code__.co_filename == "vendors.md"}
    for interface in (Backend, Executor, Embedder):
        public = {name for name, value in vars(interface).items() if isinstance(value, FunctionType) and name[0] != "_"}
        assert public <= methods.keys()
    outer = {name: methods[name] for name in vars(Backend) if name in methods and name != "serve"}
    backend = type("MyChipBackend", (Backend,), {"name": "mychip", **outer})()
    type("MyChipExecutor", (Executor,), {name: methods[name] for name in vars(Executor) if name in methods})
    type("MyChipEmbedder", (Embedder,), {name: methods[name] for name in vars(Embedder) if name in methods})
    assert "install mychip-driver" in backend.probe().reason
    (chip,) = backend.chips()
    spec = ModelSpec(
        architecture="llama",
        num_layers=1,
        hidden_size=8,
        vocab_size=9,
        num_heads=1,
        num_kv_heads=1,
        key_dim=8,
        value_dim=8,
        max_context=64,
        num_parameters=None,
    )
    assert backend.supports(spec, chip).verdict == "yes"
    assert backend.estimate(spec, LoadSettings(), chip).kv_cache.value
    assert backend.capabilities(chip).kv == "paged"
    shown["mychip"] = SimpleNamespace(has_sensor=lambda: False, read_watts=lambda: 12.0)
    assert backend.power(chip).read().reason
    shown["mychip"].has_sensor = lambda: True
    reader = backend.power(chip)
    reader.sample()
    assert reader.read().energy_j is not None
    reader.close()
    assert backend.memory_used(chip, 1).unit == "B"
    model = Model(name="m", folder="/m", revision="1", spec=spec)
    assert methods["serve"](backend, model, LoadSettings(), [chip]).argv[0] == "mychip-serve"
    assert methods["warm_up"](None).compiled


def test_the_benchmarkers_page_defines_every_figure_of_a_record() -> None:
    page = (ROOT / "docs/benchmarking.md").read_text()
    assert not [name for name in METRIC_UNITS if f"`{name}`" not in page]


def test_constraints_pin_every_direct_dependency() -> None:
    """Optional chips' libraries aside: those are chosen by the machine, not by the set-up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"], *extras["dev"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name == "mxn":
            continue
        assert name in pins, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(pins[name]), f"constraints.txt: {name}=={pins[name]} is not {requirement}"


def code_in(text: str) -> list[str]:
    """Code blocks and code spans of a Markdown text."""
    return re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)
