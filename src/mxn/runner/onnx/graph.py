"""An exported decoder graph: checked before ONNX Runtime opens it, and changed to take what a step really knows.

The model builder's graphs take an attention mask and give logits for every token. mxn gives each row's length instead
(`seqlens_k`, `total_sequence_length`, inputs of GroupQueryAttention) and asks for the rows it needs (`logit_rows`), so
nothing is computed to be thrown away. The change is made in memory; the files stay as the builder wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from mxn.errors import ModelError, UnsupportedModelError

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_MAX_GRAPH_BYTES = 2**31 - 1
_PER_TOKEN = {"MatMul", "MatMulNBits", "Gemm"}
_ELEMENTWISE = {"Mul", "Div", "Tanh", "Cast", "Add", "Identity", "Clip"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInput:
    """One KV tensor of the graph; `present` is the output that extends it in place."""

    past: str
    present: str
    num_heads: int
    dim: int
    dtype: np.dtype


@dataclass(frozen=True, kw_only=True)
class DecoderGraph:
    """A decoder ready for a session: `content` is the graph, `folder` holds its weights.

    caches: key and value of every layer. takes_positions: True when it wants `position_ids` too.
    logits_dtype: of the one output `logits`, (rows, vocabulary). weight_bytes: of all its tensors.
    """

    content: bytes
    folder: Path
    caches: tuple[CacheInput, ...]
    takes_positions: bool
    logits_dtype: np.dtype
    vocab_size: int
    weight_bytes: int


def read_graph(path: Path, *, key_dim: int, value_dim: int) -> DecoderGraph:
    """Reads and checks a graph file that the model builder wrote.

    Args: key_dim, value_dim: sizes of a key and a value vector, which the graph itself leaves open.
    Raises: ModelError for a damaged file or one that reads outside its folder; UnsupportedModelError for a graph of
      another kind.
    """
    model = check_graph_file(path)
    graph = model.graph
    _take_lengths(graph, path)
    _take_logit_rows(graph, path)
    _drop_dead_nodes(graph)
    caches = tuple(_caches(graph, path, key_dim, value_dim))
    logits = next(output for output in graph.output if output.name == "logits")
    return DecoderGraph(
        content=model.SerializeToString(),
        folder=path.parent,
        caches=caches,
        takes_positions=any(value.name == "position_ids" for value in graph.input),
        logits_dtype=_numpy_dtype(logits.type.tensor_type.elem_type),
        vocab_size=logits.type.tensor_type.shape.dim[-1].dim_value,
        weight_bytes=sum(_num_bytes(tensor) for tensor in graph.initializer),
    )


def check_graph_file(path: Path) -> ModelProto:
    """The graph of a file, found whole, whose weights lie in plain files beside it.

    ONNX Runtime would open whatever path a graph names, so this comes first.
    Raises: ModelError naming the tensor, what was found and what was expected.
    """
    try:
        size = path.stat().st_size
        if path.is_symlink() or not path.is_file() or size > _MAX_GRAPH_BYTES:
            raise ModelError(f"{path}: expected a plain graph file of at most 2 GiB; export the model again")
        model = onnx.load_model(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: the graph cannot be read: {error.strerror}; export the model again") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path}: damaged, this is no ONNX graph ({error}); export the model again") from error
    if not model.graph.node:
        raise ModelError(f"{path}: damaged, the graph has no nodes; export the model again")
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_external(path, tensor)
    return model


def _check_external(path: Path, tensor: TensorProto) -> None:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = facts.get("location", "")
    if not location or Path(location).name != location or location in (".", "..") or "\\" in location:
        raise ModelError(
            f"{path}: tensor {tensor.name} lies at {location!r}, outside the graph's folder; expected a plain file "
            "name. mxn does not open this graph"
        )
    file = path.parent / location
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise ModelError(f"{file}: a link or no plain file; the weights of a graph must lie beside it")
    try:
        offset, length = int(facts.get("offset", 0)), int(facts.get("length", _num_bytes(tensor)))
        size = file.stat().st_size
    except ValueError as error:
        raise ModelError(f"{path}: tensor {tensor.name} has no readable place in {location}: {error}") from error
    except OSError as error:
        raise ModelError(
            f"{file}: weights of {path.name} are missing ({error.strerror}); export the model again"
        ) from error
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(
            f"{file}: expected at least {offset + length} bytes for {tensor.name}, found {size}; "
            "it is cut off: export the model again"
        )


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model, also inside nodes, subgraphs and functions."""
    pending: list[GraphProto] = [model.graph]
    nodes: list[NodeProto] = [node for function in model.functions for node in function.node]
    while pending or nodes:
        if pending:
            graph = pending.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            yield from (attribute.t, *attribute.tensors) if attribute.type != AttributeProto.GRAPH else ()
            pending += [attribute.g] if attribute.type == AttributeProto.GRAPH else []
            pending += attribute.graphs


# ---------------------------------------------------------------- what the graph takes and gives


def _take_lengths(graph: GraphProto, path: Path) -> None:
    """Makes GroupQueryAttention's lengths inputs of the graph in place of the attention mask."""
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    others = sorted({node.op_type for node in graph.node if "Attention" in node.op_type} - {"GroupQueryAttention"})
    if not attentions or others:
        raise UnsupportedModelError(
            f"{path}: expected GroupQueryAttention in every layer, found {', '.join(others) or 'no attention'}; "
            "the onnx backend runs decoders whose keys and values stay in slots"
        )
    for node in attentions:
        node.input[5], node.input[6] = "seqlens_k", "total_sequence_length"
    kept = [value for value in graph.input if value.name != "attention_mask"]
    del graph.input[:]
    graph.input.extend(kept)
    graph.input.append(helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch_size"]))
    graph.input.append(helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []))


def _take_logit_rows(graph: GraphProto, path: Path) -> None:
    """Puts a selection of rows before the output head: logits become (rows, vocabulary)."""
    producers = {name: node for node in graph.node for name in node.output}
    node = producers.get("logits")
    while node is not None and node.op_type in _ELEMENTWISE:
        node = producers.get(node.input[0])
    if node is None or node.op_type not in _PER_TOKEN:
        found = "nothing" if node is None else node.op_type
        raise UnsupportedModelError(f"{path}: expected a matrix product before the logits, found {found}")
    hidden = node.input[0]
    at = list(graph.node).index(node)
    graph.node.insert(at, helper.make_node("Gather", ["mxn.flat_hidden", "logit_rows"], ["mxn.rows"], axis=0))
    graph.node.insert(at, helper.make_node("Flatten", [hidden], ["mxn.flat_hidden"], axis=2))
    node.input[0] = "mxn.rows"
    graph.input.append(helper.make_tensor_value_info("logit_rows", TensorProto.INT64, ["rows"]))
    for output in graph.output:
        if output.name == "logits":
            kind = output.type.tensor_type
            shape = ["rows", kind.shape.dim[-1].dim_value]
            output.CopyFrom(helper.make_tensor_value_info("logits", kind.elem_type, shape))
    del graph.value_info[:]  # shapes noted for the old rows


def _drop_dead_nodes(graph: GraphProto) -> None:
    """Removes what nothing depends on any more: the mask's own nodes."""
    wanted = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    wanted.update(name for inner in attribute.g.node for name in inner.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _caches(graph: GraphProto, path: Path, key_dim: int, value_dim: int) -> Iterator[CacheInput]:
    outputs = {output.name for output in graph.output} - {"logits"}
    known = {"input_ids", "position_ids", "seqlens_k", "total_sequence_length", "logit_rows"}
    for value in graph.input:
        matched = _PAST.fullmatch(value.name)
        if matched is None:
            if value.name not in known:
                raise UnsupportedModelError(f"{path}: the graph takes {value.name!r}, which mxn does not give")
            continue
        present = f"present.{matched[1]}.{matched[2]}"
        shape = value.type.tensor_type.shape.dim
        if present not in outputs or len(shape) != 4 or shape[1].dim_value < 1:
            raise UnsupportedModelError(f"{path}: {value.name} is no KV cache of (batch, heads, tokens, size)")
        outputs.discard(present)
        yield CacheInput(
            past=value.name,
            present=present,
            num_heads=shape[1].dim_value,
            dim=shape[3].dim_value or (key_dim if matched[2] == "key" else value_dim),
            dtype=_numpy_dtype(value.type.tensor_type.elem_type),
        )
    if outputs:
        raise UnsupportedModelError(f"{path}: the graph gives {', '.join(sorted(outputs))}, which mxn does not know")


def _numpy_dtype(kind: int) -> np.dtype:
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind))


def _num_bytes(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * _numpy_dtype(tensor.data_type).itemsize


def op_counts(names: Sequence[str]) -> str:
    """ "151 MatMulNBits, 30 GroupQueryAttention": how often each name occurs, most frequent first."""
    counts = sorted(((names.count(name), name) for name in set(names)), key=lambda one: (-one[0], one[1]))
    return ", ".join(f"{count} {name}" for count, name in counts)
