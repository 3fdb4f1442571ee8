"""Documentation that would otherwise drift from the code."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_minimal_adapter_of_the_vendors_page_is_whole(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/vendors.md").read_text(), re.DOTALL)
    module = tmp_path / "mxn_mychip.py"
    module.write_text(code + "\n\nprint(MyChipBackend().probe().reason)\n")
    done = subprocess.run([sys.executable, "-W", "error", module], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "install mychip-driver" in done.stdout


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
