"""Bulk jobs: a corpus in, its vectors out, stopped at any moment and resumed without loss.

Data flows one way: `sources` give rows in order, `job` has them embedded, `shards` writes them, and
`manifest` remembers what is finished; `exports` makes a database or an index of the shards.
"""

from llamacrab.corpus.job import Summary, embed_corpus

__all__ = ["Summary", "embed_corpus"]
