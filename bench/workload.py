"""Texts to measure with: WordNet's glosses where they are installed, else our own test texts.

apt-get install wordnet-base
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
OWN = Path(__file__).resolve().parents[1] / "tests" / "data" / "texts.jsonl"


def sentences() -> list[str]:
    """Return distinct texts of about 18 tokens, always the same and in the same order."""
    if WORDNET.is_dir():
        lines = (
            line
            for name in ("noun", "verb", "adj", "adv")
            for line in (WORDNET / f"data.{name}").read_text(encoding="utf-8").splitlines()
        )
        found = [line.split(" | ", 1)[1].strip() for line in lines if " | " in line]
    else:
        print(f"{WORDNET} is missing: texts are made of {OWN.name}", file=sys.stderr)
        whole = [json.loads(line)["text"] for line in OWN.read_text(encoding="utf-8").splitlines()]
        words = [word for text in whole for word in text.split()]
        found = [" ".join(words[i : i + 12]) for i in range(len(words) - 12)]
    random.Random(0).shuffle(found)
    return found


def short(n: int) -> list[str]:
    """Return `n` texts of about 18 tokens."""
    return list(itertools.islice(itertools.cycle(sentences()), n))


def mixed(n: int) -> list[str]:
    """Return `n` texts of 15 to 512 tokens, short ones more often than long ones."""
    rng = random.Random(1)
    source = itertools.cycle(sentences())
    texts = []
    for _ in range(n):
        # Words, not tokens: a word of these texts is about 1.3 tokens.
        wanted = int(10 * 38 ** rng.random())
        words: list[str] = []
        while len(words) < wanted:
            words += next(source).split()
        texts.append(" ".join(words[:wanted]))
    return texts


WORKLOADS = {"short": lambda: short(4000), "mixed": lambda: mixed(1000)}
