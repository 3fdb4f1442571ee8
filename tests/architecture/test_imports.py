"""Import rules: as contracts over the source, and as what is really loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CONTROL_PLANE = (
    "core",
    "config",
    "energy",
    "store",
    "engine",
    "fleet",
    "server",
    "bench",
    "conformance",
    "cli",
    "backends",
)
ON_RAY = ("mxn.fleet.launchers.ray", "mxn.fleet.ray_controller", "mxn.server.ray_gateway")
"""What runs on a Ray cluster only, and is imported where `launcher: ray` asks for it."""

HEAVY = ("torch", "transformers", "triton", "onnxruntime", "ray", "vllm", "accelerate", "mxn.runner", "mxn_kernels")

# Imports modules one after another and names the first that brings in a heavy library.
IMPORT_ALL = """
import importlib, sys
modules, heavy = sys.argv[1].split(","), sys.argv[2].split(",")
for module in modules:
    importlib.import_module(module)
    loaded = [name for name in heavy if name in sys.modules]
    if loaded:
        sys.exit(f"importing {module} loads {', '.join(loaded)}")
"""


def test_every_import_contract_is_kept() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_control_plane_loads_no_heavy_library() -> None:
    modules = control_plane_modules()
    assert "mxn.engine.worker" in modules
    done = run_python(IMPORT_ALL, ",".join(modules), ",".join(HEAVY))
    assert done.returncode == 0, done.stderr


def test_one_process_can_tell_that_a_heavy_library_was_loaded() -> None:
    """Guards the test above: the same check fails when something heavy is imported."""
    done = run_python(IMPORT_ALL, "mxn.core,mxn.runner", ",".join(HEAVY))
    assert "importing mxn.runner loads mxn.runner" in done.stderr


def control_plane_modules() -> list[str]:
    """Dotted names of all modules of the control plane, backends included: those import heavy libraries in `load`."""
    source = ROOT / "src"
    names = ["mxn", "mxn.errors"]
    for package in CONTROL_PLANE:
        for path in sorted((source / "mxn" / package).rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            if parts[-1] != "__main__":
                names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if not name.startswith(ON_RAY)]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
