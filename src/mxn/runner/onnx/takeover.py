"""Takes 4-bit weights over from a GGUF file into an exported graph, bit for bit, instead of rounding them again.

GGUF's Q4_0 is MatMulNBits' own format in another order: blocks of 32 weights d * (q - 8), d a float16 that a float32
scale holds exactly. Q4_1 adds a float minimum to each block. MatMulNBits takes one too, but then unpacks all weights at
every call: 1,210 us instead of 17 for one row of a 1536 x 576 weight on two Zen 5 cores. So such weights stay as the
builder rounded them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from gguf import GGMLQuantizationType
from onnx import ModelProto, TensorProto

from mxn.errors import ModelError
from mxn.runner.gguf_architectures import ARCHITECTURES
from mxn.runner.gguf_file import GgufFile, GgufTensor
from mxn.runner.onnx.graph import check_graph_file

BLOCK = 32
_BLOCK_BYTES = 18
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_WEIGHT = re.compile(r"(?P<owner>.*)\.(?P<part>attn|mlp)\.(?P<name>\w+)\.MatMul\.weight_Q4")


def take_over(gguf: Path, graph: Path) -> str:
    """Writes the file's Q4_0 weights into the graph's data. Returns one sentence on what was taken.

    Raises: ModelError when the file and the graph are not of one model.
    """
    file = GgufFile(gguf)
    architecture = ARCHITECTURES.get(str(file.metadata.get("general.architecture")))
    config = architecture.config(file) if architecture is not None else None
    if architecture is None or config is None:
        return f"no weights taken from {gguf.name}: its architecture is converted by another path"
    sources = {name: tensor for tensor in file.tensors.values() if (name := architecture.weight_name(tensor.name))}
    model = check_graph_file(graph)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    kinds: dict[str, int] = {}
    for node in model.graph.node:
        matched = _WEIGHT.fullmatch(node.input[1]) if node.op_type == "MatMulNBits" else None
        if matched is None:
            continue
        parts = _FUSED.get(matched["name"], (matched["name"],))
        owner = f"{matched['owner']}.{'self_attn' if matched['part'] == 'attn' else 'mlp'}"
        tensors = [sources.get(f"{owner}.{part}.weight") for part in parts]
        kind = {tensor.kind.name if tensor else "none" for tensor in tensors}
        kinds["/".join(sorted(kind))] = kinds.get("/".join(sorted(kind)), 0) + 1
        if kind != {"Q4_0"}:
            continue
        blocks = [_blocks(file, tensor, architecture.restore, config) for tensor in tensors if tensor is not None]
        packed = np.concatenate([one[0] for one in blocks])
        scales = np.concatenate([one[1] for one in blocks])
        _write(graph, initializers[node.input[1]], packed)
        _write(graph, initializers[node.input[2]], scales)
    found = ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
    return f"{kinds.get('Q4_0', 0)} of {sum(kinds.values())} 4-bit weights taken from {gguf.name} bit for bit ({found})"


def dequantise(model: ModelProto, graph: Path, name: str) -> np.ndarray:
    """A 4-bit weight of a graph as float32 (outputs, inputs): what MatMulNBits computes with."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    packed = _read(graph, tensors[f"{name}_Q4"], np.uint8).reshape(*tensors[f"{name}_Q4"].dims)
    scales = _read(graph, tensors[f"{name}_scales"], np.float32).reshape(*packed.shape[:2], 1)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1).astype(np.float32)
    return ((values - 8) * scales).reshape(packed.shape[0], -1)


def _blocks(
    file: GgufFile, tensor: GgufTensor, restore: Any, config: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """A Q4_0 tensor as MatMulNBits holds it: packed (outputs, blocks, 16) and scales (outputs, blocks)."""
    if tensor.kind is not GGMLQuantizationType.Q4_0:
        raise ModelError(f"{file.path}: expected {tensor.name} in Q4_0, found {tensor.kind.name}")
    num_rows, num_columns = tensor.shape
    raw = file.raw(tensor).reshape(num_rows, num_columns // BLOCK, _BLOCK_BYTES)
    # llama.cpp reorders some rows; what undoes that for weights undoes it for the numbers of their rows.
    order = restore(tensor.name, np.arange(num_rows, dtype=np.float32)[:, None], config)[:, 0].astype(np.int64)
    raw = raw[order]
    scales = raw[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    low, high = raw[..., 2:] & 15, raw[..., 2:] >> 4  # weights 0..15 and 16..31 of a block
    values = np.concatenate([low, high], -1)
    return values[..., 0::2] | (values[..., 1::2] << 4), scales


def _place(tensor: TensorProto) -> tuple[str, int, int]:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    return facts["location"], int(facts["offset"]), int(facts["length"])


def _read(graph: Path, tensor: TensorProto, dtype: type) -> np.ndarray:
    if tensor.data_location != TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor).reshape(-1).view(dtype)
    location, offset, length = _place(tensor)
    return np.fromfile(graph.parent / location, np.uint8, length, offset=offset).view(dtype)


def _write(graph: Path, tensor: TensorProto, values: np.ndarray) -> None:
    """Overwrites a tensor's data in place; the graph itself does not change."""
    location, offset, length = _place(tensor)
    if values.nbytes != length:
        raise ModelError(f"{graph}: {tensor.name} has {length} bytes, the GGUF file gives {values.nbytes}")
    with (graph.parent / location).open("r+b") as stream:
        stream.seek(offset)
        stream.write(np.ascontiguousarray(values).tobytes())
