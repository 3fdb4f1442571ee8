"""Smallest real things that tests share: a byte tokenizer folder and models of the fake backend.

What the kernels' tests do not need is imported where it is used: they run with torch, Triton and transformers alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec

if TYPE_CHECKING:
    from mxn.fleet.spec import DeploymentSpec

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

LLAMA_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "vocab_size": 1000,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}


@pytest.fixture(autouse=True)
def small_numbers_stay() -> Iterator[None]:
    """Undoes what loading a model on a CPU sets for its whole process: denormal numbers count as zero."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session", autouse=True)
def own_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What loads of tiny models take is no part of what the user's machine was seen to do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MXN_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def byte_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder whose tokenizer maps each byte to a token and knows three control tokens."""
    folder = tmp_path_factory.mktemp("byte-tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={ch: i for i, ch in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "bos_token": SPECIAL[0], "eos_token": SPECIAL[2]})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
    return folder


@pytest.fixture(scope="session")
def fake_model(byte_tokenizer_folder: Path) -> Model:
    """A model that the fake backend serves: 256 byte tokens + 3 control tokens."""
    spec = ModelSpec(
        architecture="fake",
        num_layers=1,
        hidden_size=1,
        vocab_size=259,
        num_heads=1,
        num_kv_heads=1,
        key_dim=1,
        value_dim=1,
        max_context=2048,
        num_parameters=None,
    )
    return Model(name="fake-model", folder=str(byte_tokenizer_folder), revision="r1", spec=spec)


def fake_chip(number: int = 0) -> Chip:
    return Chip(uid=f"fake-{number}", kind=None, name="Simulated chip", vendor="mxn", memory_bytes=1 << 30, cores=1)


@pytest.fixture
def fake_deployment(fake_model: Model) -> Callable[..., DeploymentSpec]:
    """Makes deployment specs on the fake backend; keywords `options` (dict), any `LoadSettings` or spec field."""
    from mxn.fleet.spec import DeploymentSpec, PlacementSpec

    def make(
        name: str = "fake-model",
        *,
        options: dict[str, object] | None = None,
        backend: str = "fake",
        num_replicas: int = 1,
        environment: Mapping[str, str] | None = None,
        **fields: object,
    ) -> DeploymentSpec:
        spec_fields = {k: fields.pop(k) for k in list(fields) if k in DeploymentSpec.__dataclass_fields__}
        settings = LoadSettings(options=tuple((k, str(v)) for k, v in (options or {}).items()), **fields)  # type: ignore[arg-type]
        placements = [
            PlacementSpec(
                id=f"{name}/{i}",
                backend=backend,
                chips=[fake_chip(i)],
                settings=settings,
                environment=environment or {},
            )
            for i in range(num_replicas)
        ]
        return DeploymentSpec(name=name, model=fake_model, placements=placements, **spec_fields)  # type: ignore[arg-type]

    return make


@pytest.fixture
def install_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], Path]:
    """Installs backends of other vendors where Python searches: a distribution "acme-chips", from sources by name.

    Each name gets a module `acme_NAME` and an entry point for its class `Acme`; "NAME" in a source is replaced by it.
    """

    def install(sources: Mapping[str, str]) -> Path:
        info = tmp_path / "acme_chips-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-chips\nVersion: 1.0\n")
        lines = ["[mxn.backends]"]
        for name, source in sources.items():
            (tmp_path / f"acme_{name}.py").write_text(source.replace("NAME", name) + "\n")
            lines.append(f"{name} = acme_{name}:Acme")
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the processes that are started
        return tmp_path

    return install


@pytest.fixture(scope="session")
def write_word_tokenizer() -> Callable[..., Path]:
    """Writes a byte-level tokenizer.json in which every word of the benchmark's prompts is one token."""
    from mxn.bench.workloads import WORDS

    def write(folder: Path, *, with_bos: bool = False) -> Path:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=3000,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator([" " + word for word in WORDS.split()] * 3, trainer)
        if with_bos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
            )
        folder.mkdir(parents=True, exist_ok=True)
        backend.save(str(folder / "tokenizer.json"))
        return folder

    return write


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_folder: Path, write_word_tokenizer: Callable[..., Path]
) -> str:
    """A folder in Hugging Face layout with a chat template and no weights to speak of."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_word_tokenizer(folder)
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(byte_tokenizer_folder / name, folder / name)
    (folder / "generation_config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return str(folder)
