"""Jobs: embed a corpus into files. A job can be interrupted at any time and resumed.

Data flows one way: `sources` give rows in order, `job` embeds them, `shards` writes them, and
`manifest` records what is finished; `exports` makes a database or an index of the shards.
"""

from llamacrab.corpus.job import Summary, embed_corpus

__all__ = ["Summary", "embed_corpus"]
