"""Finds backends by name through the entry point group `mxn.backends`. A broken plugin breaks nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from types import MappingProxyType

from mxn.backends.base import Backend
from mxn.errors import BackendError

ENTRY_POINT_GROUP = "mxn.backends"

_BUILT_IN = {
    "cpu": "mxn.backends.cpu:CpuBackend",
    "cuda": "mxn.backends.cuda:CudaBackend",
    "fake": "mxn.backends.fake:FakeBackend",
    "onnx": "mxn.backends.onnx:OnnxBackend",
    "rocm": "mxn.backends.rocm:RocmBackend",
    "llama.cpp": "mxn.backends.llama_cpp:LlamaCppBackend",
    "server": "mxn.backends.server:ServerBackend",
    "vllm": "mxn.backends.vllm:VllmBackend",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendEntry:
    """A backend that is installed, whether or not it can be imported. `target` is "module:Class"."""

    name: str
    target: str
    distribution: str


def installed_backends() -> Mapping[str, BackendEntry]:
    """All backends that are installed, by name. Imports none of them; a plugin cannot replace a built-in one."""
    found = {
        entry.name: BackendEntry(
            name=entry.name, target=entry.value, distribution=entry.dist.name if entry.dist else "unknown"
        )
        for entry in entry_points(group=ENTRY_POINT_GROUP)
    }
    for name, target in _BUILT_IN.items():
        found[name] = BackendEntry(name=name, target=target, distribution="mxn")
    return MappingProxyType(dict(sorted(found.items())))


def load_backend(name: str) -> Backend:
    """Imports and creates a backend.

    Raises: BackendError naming what is installed, or why the plugin cannot be used.
    """
    entries = installed_backends()
    if name not in entries:
        raise BackendError(f'backend "{name}" is not installed; available: {", ".join(entries)}')
    module_name, _, class_name = entries[name].target.partition(":")
    try:
        cls = getattr(import_module(module_name), class_name)
        backend = cls()
    except Exception as error:
        raise BackendError(
            f'backend "{name}" (from {entries[name].distribution}) cannot be used: {type(error).__name__}: {error}'
        ) from error
    if not isinstance(backend, Backend):
        raise BackendError(f'backend "{name}" is a {type(backend).__name__}, expected a subclass of mxn Backend')
    if backend.name != name:
        raise BackendError(f'{class_name} is registered as "{name}" and calls itself "{backend.name}"; use one name')
    return backend
