"""4- and 8-bit blocks of the GGUF file that a model came from, for layers that compute with them as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from mxn.runner.gguf_architectures import ARCHITECTURES, Architecture
from mxn.runner.gguf_file import GgufFile, GgufTensor

_FORMATS = {
    GGMLQuantizationType.Q4_0: "q4_0",
    GGMLQuantizationType.Q4_1: "q4_1",
    GGMLQuantizationType.Q8_0: "q8_0",
}


@dataclass(frozen=True, kw_only=True)
class GgufBlocks:
    """The file, and where each weight of the Hugging Face model lies in it."""

    file: GgufFile
    architecture: Architecture
    config: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @staticmethod
    def beside(folder: str, config: Mapping[str, Any]) -> GgufBlocks | None:
        """Of the one GGUF file in a model's folder, or None where there is none of an architecture known here.

        Raises: ModelError for a damaged file.
        """
        files = sorted(Path(folder).glob("*.gguf"))
        if len(files) != 1:
            return None
        file = GgufFile(files[0])
        architecture = ARCHITECTURES.get(str(file.metadata.get("general.architecture")))
        if architecture is None:
            return None
        tensors = {architecture.weight_name(tensor.name): tensor for tensor in file.tensors.values()}
        return GgufBlocks(file=file, architecture=architecture, config=config, tensors=tensors)

    def take(self, name: str) -> tuple[str, torch.Tensor] | None:
        """Format and blocks (outputs, bytes of a row) of a weight, or None if it is stored in another format.

        llama.cpp reorders rows of some weights; what undoes that for weights undoes it for the bytes of their rows.
        """
        tensor = self.tensors.get(name)
        if tensor is None or tensor.kind not in _FORMATS or len(tensor.shape) != 2:
            return None
        rows = self.file.raw(tensor).reshape(tensor.shape[0], -1)
        restored = self.architecture.restore(tensor.name, rows, self.config)
        return _FORMATS[tensor.kind], torch.from_numpy(restored.copy())
