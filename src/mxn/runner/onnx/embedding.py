"""Makes vectors of texts with a model's ONNX graph in plain ONNX Runtime. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper

from mxn.core.model import LoadSettings, Model
from mxn.errors import ConfigError, UnsupportedModelError
from mxn.runner.encoder import EncoderFacts, EncoderRunner, Ids, check_room
from mxn.runner.onnx.graph import check_graph_file
from mxn.runner.onnx.load import OnnxOptions, Progress, may_spin
from mxn.runner.onnx.session import check_provider, open_session
from mxn.store.embedding import GRAPH_NAMES, graph_file, read_recipe
from mxn.store.integrity import read_json

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_JOINT_SCALES = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
"""Operators that round numbers on a scale taken over the whole batch, so that texts would change each other."""

_PRECISIONS = {TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.FLOAT16: "fp16"}
_SPARE = 4.0
"""Room that a session needs beside the graph: int8 weights that its nodes turn into float32 are kept so."""


@dataclass(frozen=True, kw_only=True)
class EncoderGraph:
    """A checked graph: token ids in, one vector per token out.

    output: its name. precision: of most of its weights. is_joint: texts in one batch would change each other.
    """

    content: bytes
    folder: Path
    weight_bytes: int
    output: str
    precision: str
    is_joint: bool


class OnnxEncoderRunner(EncoderRunner):
    """An encoder graph called with padded batches."""

    def __init__(self, session: ort.InferenceSession, output: str, facts: EncoderFacts) -> None:
        super().__init__(facts)
        self._session: ort.InferenceSession | None = session
        self._inputs = [value.name for value in session.get_inputs()]
        self._output = output

    def encode(self, ids: Ids, mask: Ids) -> np.ndarray:
        if self._session is None:
            raise RuntimeError("the runner is closed")
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(ids),
            "position_ids": np.ascontiguousarray(np.broadcast_to(np.arange(ids.shape[1]), ids.shape)),
        }
        return self._session.run([self._output], {name: given[name] for name in self._inputs})[0]

    def close(self) -> None:
        self._session = None


def load_onnx_embedding_runner(
    model: Model, settings: LoadSettings, *, cores: int, free_bytes: Callable[[], int], progress: Progress
) -> OnnxEncoderRunner:
    """Loads the graph that lies in a model's folder.

    Raises: ConfigError for a setting it does not offer; UnsupportedModelError where there is no graph or recipe;
      ModelError for a damaged graph or one that reads outside its folder; OutOfMemoryError.
    """
    options = OnnxOptions.parse(settings.options)
    if (options.prefill, options.block_size) != ("same", "auto"):
        raise ConfigError("prefill and block_size are options of models that generate; this one embeds")
    check_provider(options.provider)
    folder = Path(model.folder)
    recipe, path = read_recipe(folder), graph_file(folder)
    if recipe is None or path is None:
        missing = "modules.json" if recipe is None else " or ".join(GRAPH_NAMES)
        raise UnsupportedModelError(f"{folder} has no {missing}; the onnx backend embeds with a graph that is there")
    progress("weights", 0.0)
    graph = read_encoder_graph(path)
    if settings.quantisation not in ("auto", graph.precision):
        raise ConfigError(
            f'quantisation "{settings.quantisation}" is not there: {path.name} of {model.name} has {graph.precision}; '
            f"available: auto, {graph.precision}"
        )
    check_room(model.name, int(graph.weight_bytes * _SPARE), free_bytes())
    threads = settings.threads or cores
    notes: list[str] = []
    session, where = open_session(
        graph,
        provider=options.provider,
        threads=threads,
        allow_fallback=options.fallback == "allow",
        options=options.provider_options,
        spins=may_spin(options.spinning, notes),
    )
    progress("weights", 1.0)
    notes = [
        f"numbers {graph.precision}, as in {path.name}; {recipe}",
        f"ONNX Runtime {ort.__version__}, {threads} compute threads",
        *notes,
        where,
    ]
    if graph.is_joint:
        notes.append("texts are computed one by one: the graph rounds on a scale that a batch would share")
    spec = model.spec
    facts = EncoderFacts(
        recipe=recipe,
        pad_id=int(read_json(folder / "config.json").get("pad_token_id") or 0),
        dimensions=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_context=min(settings.context_length or spec.max_context, spec.max_context),
        quantisation=graph.precision,
        program=f"ONNX Runtime, {options.provider}",
        threads=threads,
        weight_bytes=graph.weight_bytes,
        is_joint=graph.is_joint,
        notes=tuple(notes),
    )
    return OnnxEncoderRunner(session, graph.output, facts)


def read_encoder_graph(path: Path) -> EncoderGraph:
    """Reads and checks a graph file: ids and mask in, one vector per token out."""
    proto = check_graph_file(path)
    names = [value.name for value in proto.graph.input]
    unknown = [name for name in names if name not in _INPUTS]
    if unknown or not {"input_ids", "attention_mask"} <= set(names):
        raise UnsupportedModelError(
            f"{path}: the graph takes {', '.join(names)}; expected input_ids and attention_mask, and of "
            f"{', '.join(_INPUTS[2:])} what it needs"
        )
    outputs = [value.name for value in proto.graph.output if len(value.type.tensor_type.shape.dim) == 3]
    if not outputs:
        raise UnsupportedModelError(f"{path}: expected an output of (texts, tokens, size), found none")
    weight_bytes, precision = _weights(proto)
    return EncoderGraph(
        content=proto.SerializeToString(),
        folder=path.parent,
        weight_bytes=weight_bytes,
        output=outputs[0],
        precision=precision,
        is_joint=any(node.op_type in _JOINT_SCALES for node in proto.graph.node),
    )


def _weights(proto: ModelProto) -> tuple[int, str]:
    """Bytes of all weights, and the kind of number that most of them are."""
    num_bytes, counts = 0, Counter[str]()
    for tensor in proto.graph.initializer:
        size = int(np.prod(tensor.dims, dtype=np.int64))
        num_bytes += size * np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        counts[_PRECISIONS.get(tensor.data_type, "fp32")] += size
    return num_bytes, counts.most_common(1)[0][0] if counts else "fp32"
