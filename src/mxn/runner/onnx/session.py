"""Opens sessions on the execution provider that was asked for, and says which nodes it did not take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import onnxruntime as ort

from mxn.errors import BackendError, ModelError, OutOfMemoryError
from mxn.runner.onnx.graph import op_counts

PROVIDERS: Mapping[str, tuple[str, str]] = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu"),
    "rocm": ("ROCMExecutionProvider", "onnxruntime-rocm"),
    "migraphx": ("MIGraphXExecutionProvider", "onnxruntime-rocm"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "qnn": ("QNNExecutionProvider", "onnxruntime-qnn"),
    "cann": ("CANNExecutionProvider", "onnxruntime-cann"),
    "directml": ("DmlExecutionProvider", "onnxruntime-directml"),
    "coreml": ("CoreMLExecutionProvider", "onnxruntime"),
}
"""Names for the option `provider`: ONNX Runtime's own name, and the package that brings it."""


class CheckedGraph(Protocol):
    """A graph that passed `check_graph_file`: its serialised content, the folder of its weights, and their size."""

    @property
    def content(self) -> bytes: ...
    @property
    def folder(self) -> Path: ...
    @property
    def weight_bytes(self) -> int: ...


def available_providers() -> list[str]:
    """Our names of the providers that the installed ONNX Runtime has."""
    present = set(ort.get_available_providers())
    return [name for name, (theirs, _) in PROVIDERS.items() if theirs in present]


def check_provider(provider: str) -> None:
    """Raises: BackendError naming what is available, when the installed ONNX Runtime lacks the provider."""
    name, package = PROVIDERS[provider]
    if name not in ort.get_available_providers():
        raise BackendError(
            f'provider "{provider}" is not in the installed ONNX Runtime {ort.__version__}; available: '
            f"{', '.join(available_providers())}. pip install {package}, in an environment of its own: its packages "
            "replace each other"
        )


def open_session(
    graph: CheckedGraph,
    *,
    provider: str,
    threads: int,
    allow_fallback: bool,
    options: Mapping[str, str],
    spins: bool = True,
) -> tuple[ort.InferenceSession, str]:
    """A session on a provider, and one sentence on which nodes run where.

    allow_fallback: nodes that the provider does not take may run on the CPU; otherwise such a graph is refused.
    options: passed to the provider as they are.
    spins: compute threads wait for the next node in a loop, not asleep.
    Raises: BackendError naming the nodes that were not taken; ModelError when the graph cannot be opened.
    """
    name, _ = PROVIDERS[provider]
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if spins else "0")
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.folder))
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = ort.InferenceSession(graph.content, settings, providers=[(name, dict(options))])
    except Exception as error:  # ONNX Runtime's exceptions have no common class but this
        text = str(error).splitlines()[0]
        if "alloc" in text.lower():
            raise OutOfMemoryError(
                f"the graph's {graph.weight_bytes / 2**30:.2f} GiB of weights did not fit"
            ) from error
        raise ModelError(f"ONNX Runtime {ort.__version__} cannot open the graph in {graph.folder}: {text}") from error
    if name not in session.get_providers():
        raise BackendError(
            f'provider "{provider}" did not start here, and ONNX Runtime fell back to '
            f"{', '.join(session.get_providers())}; see its log above"
        )
    return session, _assignment(session, provider, name, allow_fallback=allow_fallback)


def _assignment(session: ort.InferenceSession, provider: str, name: str, *, allow_fallback: bool) -> str:
    taken: list[str] = []
    left: list[str] = []
    for part in session.get_provider_graph_assignment_info():
        nodes = [node.op_type for node in part.get_nodes()]
        (taken if part.ep_name == name else left).extend(nodes)
    if not left:
        return f"provider {provider} runs all {len(taken)} nodes"
    missed = f"{len(left)} of {len(taken) + len(left)} nodes run on the CPU instead of {provider}: {op_counts(left)}"
    if not allow_fallback:
        raise BackendError(f"{missed}. Allow it with the option fallback=allow, or choose another provider")
    return missed
