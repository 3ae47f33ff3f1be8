"""Turn a query and a document into the token ids of their pair."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llamacrab._core import Tokenization
from llamacrab.errors import InputError, UnsupportedModelError
from llamacrab.requests.prompts import ids_of, split_at_special
from llamacrab.requests.reranker_families import family_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from llamacrab._core import Model, Vocab
    from llamacrab.options import Truncate

# Number of queries of a `rerank_pairs` call whose tokens are cached.
QUERIES_KEPT = 4096


@dataclass(frozen=True, slots=True)
class PairFormat:
    """How a query and a document become one text.

    Each of the templates is a tuple of parts that are tokenized on their own. Together they hold
    ``{document}`` once.

    Attributes
    ----------
    plain : tuple of str, optional
        The template of a call without an instruction.
    instructed : tuple of str, optional
        The template of a call with one; it holds ``{instruction}``.
    """

    plain: tuple[str, ...] | None = None
    instructed: tuple[str, ...] | None = None

    def parts(self, instruction: str | None) -> tuple[str, ...] | None:
        """Return the template of a call, or None for the format of llama-server.

        Raises
        ------
        InputError
            The call has an instruction that no template takes, or lacks one, or it is not a str.
        """
        if instruction is None:
            if self.plain is None and self.instructed is not None:
                raise InputError("the template holds {instruction}: pass instruction=")
            return self.plain
        if not isinstance(instruction, str):
            raise InputError(f"the instruction is {type(instruction).__name__}, not str")
        if self.instructed is None:
            raise InputError(
                "this model takes no instruction; a template= with {instruction} would"
            )
        return self.instructed


def pair_format(model: Model, template: str | None, *, has_answers: bool) -> PairFormat:
    """Return the format of a reranker's pairs.

    Parameters
    ----------
    model : Model
        The reranker.
    template : str, optional
        The caller's template; by default that of the GGUF, or that of the model's family.
    has_answers : bool
        The model is scored by its answers.

    Raises
    ------
    InputError
        The caller's template lacks a placeholder, or there must be a template and is none.
    """
    if template is not None:
        if not isinstance(template, str):
            raise InputError(f"template is {type(template).__name__}, not str")
        if template.count("{document}") != 1 or "{query}" not in template:
            raise InputError("template must hold {query}, and {document} exactly once")
        return _format_of(template)
    own, family = model.chat_template("rerank"), family_of(model)
    if family is not None and ((own,) == family.template or (own is None and has_answers)):
        return PairFormat(family.template, family.instructed)
    if own is not None:
        return _format_of(own)
    if has_answers:
        raise InputError(
            f"{model.path} has no template for pairs: pass template=, a string with {{query}} and "
            "{document} that ends where the answer would begin"
        )
    return PairFormat()


def _format_of(template: str) -> PairFormat:
    if "{instruction}" in template:
        return PairFormat(instructed=(template,))
    return PairFormat(plain=(template,))


class PairTemplate:
    """Pairs one query with documents.

    The format is a template with ``{query}`` and ``{document}`` filled in, by default the GGUF's
    chat template named ``rerank``. Without a template it is that of llama-server's rerank endpoint,
    ``[BOS] query [EOS][SEP] document [EOS]``, each special token only where the GGUF asks for it
    (llama.cpp, ``format_prompt_rerank`` in tools/server). Only the template can hold special
    tokens: in a query or a document their spelling stays text.

    Parameters
    ----------
    model : Model
        The reranker.
    query : str
        The query.
    form : PairFormat, optional
        The templates; by default that of the GGUF.
    instruction : str, optional
        What to fill in for ``{instruction}``.

    Raises
    ------
    InputError
        The query is not a str, or the instruction does not fit the template.
    UnsupportedModelError
        The GGUF's template does not hold ``{document}`` exactly once.
    """

    def __init__(
        self,
        model: Model,
        query: str,
        form: PairFormat | None = None,
        instruction: str | None = None,
    ) -> None:
        if not isinstance(query, str):
            raise InputError(f"the query is {type(query).__name__}, not str")
        self._vocab = vocab = model.vocab
        if form is None:
            form = pair_format(model, None, has_answers=False)
        parts = form.parts(instruction)
        # A pair is: prefix_ids, then the tokens of prefix_text + document + suffix_text, then
        # suffix_ids. The two texts are tokenized together with the document: tokens may span both.
        self._prefix_text = self._suffix_text = ""
        if parts is None:
            prefix, suffix = _around_document(vocab, query)
        else:
            values = {"query": query, "instruction": instruction or ""}
            before, after = _split_at_document(model, parts)
            prefix, suffix = _filled(before, values), _filled(after, values)
            self._prefix_text, self._suffix_text = str(prefix.pop()), str(suffix.pop(0))
        self._prefix_ids = ids_of(vocab, prefix)
        # The document and the tokens after it are BERT's segment B.
        shift = vocab.segment_b_offset or 0
        self._suffix_ids = [token + shift for token in ids_of(vocab, suffix)]

    def tokenization(
        self, *, limit: int, truncate: Truncate = False, larger: str = ""
    ) -> Tokenization:
        """Return a tokenization of documents into the token ids of their pairs with the query.

        Parameters
        ----------
        limit : int
            Tokens of the longest pair.
        truncate : bool or {"end", "start", "middle"}
            Where to cut the document of a pair that is too long. Only the document is cut.
        larger : str
            How to make `limit` larger, for error messages.
        """
        return Tokenization(
            self._vocab,
            limit=limit,
            truncate=truncate,
            prefix_ids=self._prefix_ids,
            suffix_ids=self._suffix_ids,
            prefix_text=self._prefix_text,
            suffix_text=self._suffix_text,
            shift=self._vocab.segment_b_offset or 0,
            text_only=True,
            advice="pass truncate=True to cut the document",
            larger=larger,
        )


def _around_document(vocab: Vocab, query: str) -> tuple[list[str | int], list[str | int]]:
    """Return the pieces before and after the document for a GGUF without a template."""
    closing = vocab.sep if vocab.eos is None else vocab.eos
    bos = vocab.bos if vocab.add_bos else None
    eos = closing if vocab.add_eos else None
    sep = vocab.sep if vocab.add_sep else None
    prefix, suffix = (bos, query, eos, sep), (eos,)
    return [piece for piece in prefix if piece is not None], [p for p in suffix if p is not None]


def _split_at_document(
    model: Model, parts: tuple[str, ...]
) -> tuple[list[str | int], list[str | int]]:
    """Return the pieces of a template before the document and after it, special tokens as ids.

    The last piece before the document and the first one after it are texts that touch it.
    """
    if sum(part.count("{document}") for part in parts) != 1:
        raise UnsupportedModelError(
            f"the rerank template of {model.path} must hold {{document}} exactly once"
        )
    sides: tuple[list[str | int], list[str | int]] = [], []
    side = 0
    for part in parts:
        texts = part.split("{document}")
        sides[side].extend(split_at_special(model.vocab, texts[0]))
        if len(texts) == 2:
            side = 1
            sides[side].extend(split_at_special(model.vocab, texts[1]))
    return sides


def _filled(pieces: list[str | int], values: dict[str, str]) -> list[str | int]:
    """Fill values into the pieces of a template; special tokens in them stay text."""
    names = "|".join(values)
    return [
        # In one pass: a query may spell a placeholder.
        piece
        if isinstance(piece, int)
        else re.sub(f"{{({names})}}", lambda found: values[found[1]], piece)
        for piece in pieces
    ]


def common_ids(model: Model, form: PairFormat, instruction: str | None) -> list[int]:
    """Return the token ids that the pairs of all queries start with, or nearly all.

    The pairs of several queries share what stands before the query in the template.
    """
    parts = form.parts(instruction)
    if parts is None:
        return []
    before, _ = _split_at_document(model, parts)
    common: list[str | int] = []
    last = before[-1]
    for piece in before:
        if isinstance(piece, str) and "{query}" in piece:
            last = piece.split("{query}")[0]
            break
        common.append(piece)
    else:
        common.pop()
    *common, last = _filled([*common, last], {"instruction": instruction or ""})
    # The last token may be another one, as what follows touches it.
    return ids_of(model.vocab, common) + ids_of(model.vocab, [last])[:-1]


class Pairs:
    """Pairs of a query and a document. A slice gives their token ids.

    Parameters
    ----------
    model : Model
        The reranker.
    pairs : sequence of (str, str)
        Query and document of each pair.
    form : PairFormat, optional
        The templates; by default that of the GGUF.
    instruction : str, optional
        What to fill in for ``{instruction}``.
    limit : int
        Tokens of the longest pair.
    truncate : bool or {"end", "start", "middle"}
        Where to cut the document of a pair that is too long.
    larger : str
        How to make `limit` larger, for error messages.
    """

    def __init__(
        self,
        model: Model,
        pairs: Sequence[Any],
        form: PairFormat | None = None,
        instruction: str | None = None,
        *,
        limit: int,
        truncate: Truncate = False,
        larger: str = "",
    ) -> None:
        self._pairs = pairs
        self._tokenization_of = lru_cache(QUERIES_KEPT)(
            lambda query: PairTemplate(model, query, form, instruction).tokenization(
                limit=limit, truncate=truncate, larger=larger
            )
        )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, wanted: slice) -> list[np.ndarray]:
        return [self._ids(i) for i in range(len(self))[wanted]]

    def _ids(self, index: int) -> np.ndarray:
        pair = self._pairs[index]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"pair {index} is not a (query, document): {pair!r:.80}")
        query, document = pair
        if not isinstance(query, str):
            raise InputError(f"the query of pair {index} is {type(query).__name__}, not str")
        return self._tokenization_of(query).tokenize(document, index)
