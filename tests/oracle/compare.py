"""Compare two files of vectors of the same texts, as of transformers and of llama.cpp.

Both hold `vectors`, `ids` and `offsets` as described in the README. Prints each text whose
token ids differ, and the least cosine of all.
"""

import argparse

import numpy as np
from common import normalize, read_texts


def rows(arrays: np.lib.npyio.NpzFile) -> list[list[int]]:
    """Cut the flat array of token ids into one list for each text."""
    return [row.tolist() for row in np.split(arrays["ids"], arrays["offsets"][1:-1])]


def main() -> None:
    """Print the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("golden")
    parser.add_argument("other")
    args = parser.parse_args()

    golden, other = np.load(args.golden), np.load(args.other)
    texts = read_texts()
    text_ids = golden["text_ids"] if "text_ids" in golden else np.arange(len(texts))
    cosines = (normalize(golden["vectors"]) * normalize(other["vectors"])).sum(axis=1)
    differing = 0
    for text_id, want, got, cosine in zip(
        text_ids, rows(golden), rows(other), cosines, strict=True
    ):
        if want != got:
            differing += 1
            print(f"text {text_id}, cosine {cosine:.6f}: {texts[text_id]!r}\n  {want}\n  {got}")
    worst = int(cosines.argmin())
    print(
        f"{differing} of {len(text_ids)} texts differ in token ids; "
        f"least cosine {cosines[worst]:.7f}, of text {text_ids[worst]}"
    )


if __name__ == "__main__":
    main()
