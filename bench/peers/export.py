"""Write the ONNX graphs, pooling and normalising included: `python export.py FOLDER OUT`.

plain.onnx   as torch exports it; ONNX Runtime and OpenVINO fuse operators when they load it
int8.onnx    its matrix products in int8, with scales of the activations found at run time

ONNX Runtime's own fusions for BERT, done beforehand, made it slower here; so did scales for each
column of the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoModel


class Embedder(torch.nn.Module):
    """The model, the mean over its tokens, and the norm."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._model = AutoModel.from_pretrained(folder, attn_implementation="eager")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        rows = self._model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(rows.dtype)
        mean = (rows * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)


def main() -> None:
    folder, out = sys.argv[1], Path(sys.argv[2])
    model = Embedder(folder).eval()
    example = torch.ones(2, 8, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(
        model,
        (example, example),
        str(out / "plain.onnx"),
        input_names=names,
        output_names=["vectors"],
        dynamic_axes={name: {0: "texts", 1: "tokens"} for name in names},
        opset_version=17,
        dynamo=False,
    )
    quantize_dynamic(out / "plain.onnx", out / "int8.onnx", weight_type=QuantType.QInt8)


if __name__ == "__main__":
    main()
