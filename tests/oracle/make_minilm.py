"""Make the golden vectors of all-MiniLM-L6-v2 with sentence-transformers.

The folder given is the model's own, in Hugging Face format; a GGUF file converted from it
must then give the same vectors. Run once, by hand; the tests only read the result.
"""

import argparse

import numpy as np
import torch
from common import DATA, ragged, read_texts
from sentence_transformers import SentenceTransformer

MAX_TOKENS = 512


def main() -> None:
    """Embed the whole corpus and store vectors and token ids."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of all-MiniLM-L6-v2")
    args = parser.parse_args()

    torch.set_num_threads(2)
    texts = read_texts()
    model = SentenceTransformer(args.model, device="cpu", model_kwargs={"dtype": torch.float32})
    model.max_seq_length = MAX_TOKENS  # the folder says 256, yet there are 512 positions
    vectors = model.encode(texts, batch_size=8, normalize_embeddings=True)

    # The folder's tokenizer.json asks for truncation to 128 tokens.
    tokenizer = model.tokenizer
    ids = tokenizer(texts, truncation=False, padding=False)["input_ids"]
    longest = max(len(row) for row in ids)
    if longest > MAX_TOKENS:
        raise ValueError(f"a text has {longest} tokens, more than the model's {MAX_TOKENS}")

    np.savez_compressed(DATA / "minilm.npz", vectors=np.asarray(vectors, np.float32), **ragged(ids))
    print(f"{len(texts)} texts, {min(map(len, ids))} to {longest} tokens, vectors {vectors.shape}")


if __name__ == "__main__":
    main()
