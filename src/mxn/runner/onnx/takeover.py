"""Takes 4-bit weights over from a GGUF file into an exported graph, bit for bit, instead of rounding them again.

GGUF's Q4_0 is MatMulNBits' own format in another order: blocks of 32 weights d * (q - 8), d a float16 that a float32
scale holds exactly. Q4_1 adds a float minimum to each block. MatMulNBits takes one too, but then unpacks all weights at
every call: 1,210 us instead of 17 for one row of a 1536 x 576 weight on two Zen 5 cores. So such weights stay as the
builder rounded them.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from mxn.errors import ModelError
from mxn.runner.gguf_blocks import GgufBlocks
from mxn.runner.onnx.graph import check_graph_file

_BLOCK_BYTES = 18  # a float16 scale and 32 weights of 4 bits
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_WEIGHT = re.compile(r"(?P<owner>.*)\.(?P<part>attn|mlp)\.(?P<name>\w+)\.MatMul\.weight_Q4")


def take_over(blocks: GgufBlocks, graph: Path) -> str:
    """Writes the file's Q4_0 weights into the graph's data. Returns one sentence on what was taken.

    Raises: ModelError when the file and the graph are not of one model.
    """
    model = check_graph_file(graph)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    kinds: Counter[str] = Counter()
    for node in model.graph.node:
        matched = _WEIGHT.fullmatch(node.input[1]) if node.op_type == "MatMulNBits" else None
        if matched is None:
            continue
        owner = f"{matched['owner']}.{'self_attn' if matched['part'] == 'attn' else 'mlp'}"
        parts = _FUSED.get(matched["name"], (matched["name"],))
        taken = [blocks.take(f"{owner}.{part}.weight") for part in parts]
        kind = "/".join(sorted({one[0] if one else "another format" for one in taken}))
        kinds[kind] += 1
        if kind == "q4_0":
            packed, scales = _as_nbits(np.concatenate([one[1].numpy() for one in taken if one is not None]))
            _write(graph, initializers[node.input[1]], packed)
            _write(graph, initializers[node.input[2]], scales)
    found = ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
    return f"{kinds['q4_0']} of {kinds.total()} 4-bit weights taken from {blocks.file.path.name} bit for bit ({found})"


def dequantise(model: ModelProto, graph: Path, name: str) -> np.ndarray:
    """A 4-bit weight of a graph as float32 (outputs, inputs): what MatMulNBits computes with."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    packed = _read(graph, tensors[f"{name}_Q4"], np.uint8).reshape(*tensors[f"{name}_Q4"].dims)
    scales = _read(graph, tensors[f"{name}_scales"], np.float32).reshape(*packed.shape[:2], 1)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1).astype(np.float32)
    return ((values - 8) * scales).reshape(packed.shape[0], -1)


def _as_nbits(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of Q4_0 blocks as MatMulNBits holds them: packed (outputs, blocks, 16) and scales (outputs, blocks)."""
    raw = rows.reshape(len(rows), -1, _BLOCK_BYTES)
    scales = raw[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    values = np.concatenate([raw[..., 2:] & 15, raw[..., 2:] >> 4], -1)  # low halves are weights 0..15 of a block
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
