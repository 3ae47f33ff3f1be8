"""transformers: a decoder from a GGUF, the row of the last token. `dtype` is the name of a type.

Needs its extras `gguf` and `accelerate`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers


class Peer:
    def load(self, files: dict[str, str], *, outtype: str, dtype: str, n_threads: int) -> str:
        torch.set_num_threads(n_threads)
        path = Path(files[f"gguf {outtype}"])
        how = {"gguf_file": path.name}
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **how)
        self._model = transformers.AutoModel.from_pretrained(
            path.parent, dtype=getattr(torch, dtype), attn_implementation="sdpa", **how
        ).eval()
        return f"transformers {transformers.__version__}"

    @torch.inference_mode()
    def embed(self, texts: list[str], *, batch: int) -> np.ndarray:
        eos = self._tokenizer.eos_token_id
        ids = [self._tokenizer(text)["input_ids"] for text in texts]
        ids = [one if one[-1] == eos else [*one, eos] for one in ids]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows = np.empty((len(ids), self._model.config.hidden_size), dtype=np.float32)
        for i in range(0, len(order), batch):
            chosen = order[i : i + batch]
            lengths = torch.tensor([len(ids[j]) for j in chosen])
            tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
            for k, j in enumerate(chosen):
                tokens[k, : lengths[k]] = torch.tensor(ids[j])  # causal: padding behind is not seen
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
            found = self._model(input_ids=tokens, attention_mask=mask, use_cache=False)
            last = found.last_hidden_state[torch.arange(len(chosen)), lengths - 1].float()
            rows[chosen] = torch.nn.functional.normalize(last, dim=1).numpy()
        return rows
