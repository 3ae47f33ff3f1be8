"""Write a BERT of another size with random weights: `python shape.py LIKE OUT WIDTH LAYERS HEADS`.

The folder LIKE gives the vocabulary and the rest. Random vectors mean nothing, but they cost what a
trained model of this size costs, and every library must find the same ones.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel


def main() -> None:
    like, out = Path(sys.argv[1]), Path(sys.argv[2])
    width, layers, heads = map(int, sys.argv[3:])
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        like,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        initializer_range=1.5 / width**0.5,  # enough for texts to differ
    )
    shutil.copytree(like, out, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModel.from_config(config).save_pretrained(out)
    pooling = out / "1_Pooling" / "config.json"
    said = json.loads(pooling.read_text(encoding="utf-8"))
    said["word_embedding_dimension"] = width
    pooling.write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()
