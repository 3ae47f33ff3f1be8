"""Texts to measure with: WordNet's glosses if they are installed, else made-up sentences.

The glosses are in Debian's package ``wordnet-base``. The made-up sentences are always the same, but
simple. Results with the two are not comparable; a report says which texts it used.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")


def _phrases(text: str) -> list[str]:
    return text.split(", ")


_SUBJECTS = _phrases(
    "the harbour master, a hermit crab, our neighbour's daughter, the last ferry, an old "
    "lighthouse, the committee, a thunderstorm, the baker on the corner, one of the "
    "engineers, her translation, the museum, a retired teacher, the river, their orchestra, "
    "the night train, a small company"
)
_VERBS = _phrases(
    "carries, measures, remembers, repairs, describes, replaces, follows, crosses, ignores, "
    "collects, explains, sells, protects, divides, surprises, rebuilds, photographs, inherits"
)
_OBJECTS = _phrases(
    "forty crates of oranges, the shape of the coast, a letter from the council, two broken "
    "clocks, the price of copper, an unfinished bridge, rare orchids, the rules of the game, "
    "a map of the city, every second house, the sound of bells, its own shadow, salt and "
    "dried fish, a wooden staircase"
)
_CIRCUMSTANCES = _phrases(
    "before the tide turns, without saying a word, in the spring of 1911, at twelve degrees "
    "below zero, for less than it cost, because nobody else would, while the others sleep, "
    "according to the report, on the far side of the valley, although the law forbids it, "
    "with surprising accuracy, until the money ran out"
)


def source() -> str:
    """Return where the texts come from."""
    return "WordNet's glosses" if WORDNET.is_dir() else "made-up sentences"


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
        found = [
            " ".join(words)
            for words in itertools.product(_SUBJECTS, _VERBS, _OBJECTS, _CIRCUMSTANCES)
        ]
    random.Random(0).shuffle(found)
    return found


def short(n: int) -> list[str]:
    """Return `n` texts of about 18 tokens."""
    return list(itertools.islice(itertools.cycle(sentences()), n))


def mixed(n: int) -> list[str]:
    """Return `n` texts of 15 to 512 tokens, short ones more often than long ones."""
    rng = random.Random(1)
    # Words, not tokens: a word of these texts is about 1.3 tokens.
    return _of_words(int(10 * 38 ** rng.random()) for _ in range(n))


def long(n: int, n_words: int = 380) -> list[str]:
    """Return `n` texts of `n_words` words each."""
    return _of_words(itertools.repeat(n_words, n))


def _of_words(counts: Iterable[int]) -> list[str]:
    stream = itertools.cycle(sentences())
    texts = []
    for wanted in counts:
        words: list[str] = []
        while len(words) < wanted:
            words += next(stream).split()
        texts.append(" ".join(words[:wanted]))
    return texts
