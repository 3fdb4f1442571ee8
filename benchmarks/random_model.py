"""A model folder with random weights in the shape of Llama 3.2 1B: weights that fit no cache and were never 4-bit.

    python benchmarks/random_model.py FOLDER --tokenizer FOLDER_OF_ANOTHER_MODEL

The tokenizer is borrowed, so that text prompts work, and filled up with words that no text contains, so that every id
has a text. It must be a BPE one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

# transformers would take benchmarks/kernels.py for the package "kernels".
sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

VOCABULARY = 128_256
COPIED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def main() -> None:
    """Writes config, weights (bf16 safetensors) and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a model whose tokenizer is copied")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    borrowed = json.loads((arguments.tokenizer / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=arguments.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        bos_token_id=borrowed.get("bos_token_id"),
        eos_token_id=borrowed.get("eos_token_id"),
        dtype="bfloat16",
    )
    torch.manual_seed(arguments.seed)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(arguments.folder)
    tokenizer = json.loads((arguments.tokenizer / "tokenizer.json").read_text())
    known = {*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])}
    tokenizer["model"]["vocab"] |= {f"unused{i}": i for i in range(VOCABULARY) if i not in known}
    (arguments.folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    for name in COPIED:
        if (arguments.tokenizer / name).is_file():
            shutil.copyfile(arguments.tokenizer / name, arguments.folder / name)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters in {arguments.folder}")


if __name__ == "__main__":
    main()
