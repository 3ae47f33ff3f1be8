"""Make the golden files of the options: quantized vectors, and where tokens come from.

    python make_options.py MINILM_FOLDER

The vectors are quantized by sentence-transformers, the places are those of the model's tokenizer.
"""

import argparse
from pathlib import Path

import numpy as np
from common import DATA, read_texts
from sentence_transformers.util.quantization import quantize_embeddings
from transformers import AutoTokenizer


def main() -> None:
    """Write tests/data/options.npz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minilm", type=Path)
    folder = parser.parse_args().minilm
    rng = np.random.default_rng(0)
    calibration = rng.normal(size=(200, 16)).astype(np.float32)
    ranges = np.stack([calibration.min(axis=0), calibration.max(axis=0)])
    vectors = rng.uniform(ranges[0], ranges[1], size=(20, 16)).astype(np.float32)
    golden = {"calibration": calibration, "vectors": vectors}
    for precision in ("int8", "uint8", "binary", "ubinary"):
        golden[precision] = quantize_embeddings(
            vectors, precision, calibration_embeddings=calibration
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(read_texts(), return_offsets_mapping=True, truncation=False)
    places = [np.array(one, dtype=np.int32) for one in encoded["offset_mapping"]]
    golden["places"] = np.concatenate(places)
    golden["ids"] = np.concatenate([np.array(i, dtype=np.int32) for i in encoded["input_ids"]])
    golden["offsets"] = np.cumsum([0, *map(len, places)], dtype=np.int32)
    np.savez_compressed(DATA / "options.npz", **golden)


if __name__ == "__main__":
    main()
