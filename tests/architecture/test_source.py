"""Rules that hold for every line of source, found in its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "kernels" / "mxn_kernels").rglob("*.py")])
ENVIRONMENT_READERS = {ROOT / "src/mxn/config/environment.py", ROOT / "kernels/mxn_kernels/environment.py"}

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    faults = [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in find_faults(tree)]
    if text.strip() and ast.get_docstring(tree) is None:
        faults.append(f"{path.relative_to(ROOT)}:1: has no module docstring")
    if path not in ENVIRONMENT_READERS:
        faults += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in find_environment_reads(tree)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "code",
    [
        "raise NotImplementedError",
        "raise NotImplementedError('later')",
        "eval(text)",
        "exec(text)",
        "import pickle",
        "from dill import loads",
        "import jinja2\njinja2.Environment()",
        "from jinja2 import Environment",
        "from jinja2 import Template",
        "torch.load(path)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_fault_is_found(code: str) -> None:
    assert list(find_faults(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["torch.load(path, weights_only=True)", "model.eval()", "from jinja2.sandbox import ImmutableSandboxedEnvironment"],
)
def test_harmless_code_is_no_fault(code: str) -> None:
    assert not list(find_faults(ast.parse(code)))


@pytest.mark.parametrize("code", ["import os\nos.environ['A']", "import os\nos.getenv('A')", "from os import environ"])
def test_environment_read_is_found(code: str) -> None:
    assert list(find_environment_reads(ast.parse(code)))


def find_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and fault: stubs, code from text, unpickling, and templates outside the sandbox."""
    for node in ast.walk(tree):
        match node:
            case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
                yield node.lineno, "NotImplementedError: an abstract method says so, anything else is finished"
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield node.lineno, f"{name} runs text as code"
            case ast.Import(names=names) if UNPICKLERS & {alias.name.split(".")[0] for alias in names}:
                yield node.lineno, "unpickling runs what the file says"
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in UNPICKLERS:
                yield node.lineno, "unpickling runs what the file says"
            case ast.ImportFrom(module="jinja2", names=names) if {"Environment", "Template"} & {a.name for a in names}:
                yield node.lineno, "a template from a model runs in jinja2.sandbox only"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="jinja2"), attr="Environment" | "Template")):
                yield node.lineno, "a template from a model runs in jinja2.sandbox only"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                if not is_true(keywords, "weights_only"):
                    yield node.lineno, "torch.load unpickles unless weights_only=True"
            case ast.Call(keywords=keywords) if is_true(keywords, "trust_remote_code"):
                yield node.lineno, "trust_remote_code runs what a model brings along"


def find_environment_reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields lines that look at environment variables, which one file of each package does."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb" | "getenv" | "putenv"):
                yield node.lineno, "environment variables are read in environment.py alone"
            case ast.ImportFrom(module="os", names=names) if {"environ", "getenv"} & {alias.name for alias in names}:
                yield node.lineno, "environment variables are read in environment.py alone"


def is_true(keywords: list[ast.keyword], name: str) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is True for k in keywords)
