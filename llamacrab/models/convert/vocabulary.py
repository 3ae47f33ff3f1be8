"""Write the vocabulary of a BERT model: WordPiece, or Unigram as in multilingual-e5-small.

Ids, kinds and scores are those of llama.cpp's own converter; for Unigram those for XLM-R, whose
tokenizer such models use.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from llamacrab._core import SEGMENT_B_OFFSET
from llamacrab.errors import ConvertError
from llamacrab.models.convert.folder import ELSEWHERE, read_json, read_text, size

if TYPE_CHECKING:
    from pathlib import Path

# The converter calls a token special by its role; these are the roles that BERT has, and their
# default spellings.
WORDPIECE = {role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
UNIGRAM = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}

# The score of an id that no token has, as in llama.cpp's converter.
LEAST_SCORE = -10000.0


class Tokenizer:
    """The tokenizer files of a folder, read once.

    Attributes
    ----------
    folder : Path
        The model's folder.
    settings : dict
        The content of ``tokenizer_config.json``.
    is_unigram : bool
        Whether it is Unigram (sentencepiece), with one score per token, or else WordPiece.
    """

    def __init__(self, folder: Path) -> None:
        """Read the files; both are optional."""
        self.folder = folder
        self.settings = read_json(folder / "tokenizer_config.json", optional=True)
        self._tokenizer = read_json(folder / "tokenizer.json", optional=True)
        model = self._tokenizer.get("model")
        self._model: dict[str, Any] = model if isinstance(model, dict) else {}
        self.is_unigram = isinstance(self._model.get("vocab"), list)

    @property
    def has_segments(self) -> bool:
        """Whether the model gets token types, which distinguish a document from a query."""
        usual = ["input_ids"] if self.is_unigram else ["token_type_ids"]
        return "token_type_ids" in (self.settings.get("model_input_names") or usual)

    def words(self) -> dict[int, str]:
        """Return the tokens of a WordPiece vocabulary by id. Some ids may have none."""
        vocabulary: Any = self._model.get("vocab")
        if not isinstance(vocabulary, dict) or "merges" in self._model:
            if not (self.folder / "vocab.txt").is_file():
                raise ConvertError(
                    f"{self.folder} has neither a tokenizer.json of type WordPiece or Unigram, nor "
                    f"vocab.txt. {ELSEWHERE}"
                )
            lines = read_text(self.folder / "vocab.txt").rstrip("\n").split("\n")
            vocabulary = {token: i for i, token in enumerate(lines)}  # of equal tokens the last
        if not all(isinstance(i, int) and i >= 0 for i in vocabulary.values()):
            raise ConvertError(f"{self.folder / 'tokenizer.json'} has tokens without an id")
        return {i: token for token, i in vocabulary.items()}

    def pieces(self) -> list[tuple[str, float]]:
        """Return the tokens of a Unigram vocabulary and their scores, in the order of their ids."""
        if self._model.get("byte_fallback"):
            raise ConvertError(
                f"{self.folder}: its tokenizer has byte_fallback, which llama.cpp's Unigram "
                "tokenizer does not support"
            )
        try:
            return [(str(piece), float(score)) for piece, score in self._model["vocab"]]
        except (TypeError, ValueError):
            raise ConvertError(
                f"{self.folder / 'tokenizer.json'} has a vocabulary that is not a list of tokens "
                "and scores"
            ) from None

    def added(self, n_tokens: int) -> dict[int, dict[str, Any]]:
        """Return the tokens added to the vocabulary by id, if the model has a row for them."""
        by_id = {token.get("id", -1): token for token in self._tokenizer.get("added_tokens") or []}
        return {i: token for i, token in by_id.items() if 0 <= i < n_tokens and "content" in token}

    def spelling(self, role: str) -> str:
        """Return how the token with this role is spelled."""
        token = self.settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return str(token or (UNIGRAM if self.is_unigram else WORDPIECE)[role])

    def steps(self, key: str, parts: str) -> list[dict[str, Any]]:
        """Return the parts of a step such as "normalizer"; without parts, the step itself."""
        step = self._tokenizer.get(key) or {}
        return list(step.get(parts, [step] if step else []))


def write_vocabulary(
    writer: Any, gguf: Any, tokenizer: Tokenizer, config: dict[str, Any], *, twice: bool
) -> None:
    """Write the tokens, their kinds and roles, and the settings of the tokenizer."""
    unigram, folder = tokenizer.is_unigram, tokenizer.folder
    pieces = tokenizer.pieces() if unigram else []
    tokens = {i: piece for i, (piece, _) in enumerate(pieces)} if unigram else tokenizer.words()
    n_tokens = size(config, "vocab_size")
    if max(tokens, default=0) >= n_tokens:
        raise ConvertError(
            f"{folder} has tokens up to id {max(tokens)}, its config says {n_tokens} tokens"
        )
    added = tokenizer.added(n_tokens)
    tokens |= {i: str(token["content"]) for i, token in added.items()}

    ids = {token: i for i, token in tokens.items()}
    special = {role: ids.get(tokenizer.spelling(role)) for role in WORDPIECE}
    for role in ("cls", "sep"):
        if special[role] is None:
            raise ConvertError(f"the vocabulary of {folder} lacks {tokenizer.spelling(role)}")

    # An id without a token is written as unused.
    kind = gguf.TokenType
    spelled = [tokens.get(i, f"[PAD{i}]") for i in range(n_tokens)]
    kinds = [kind.NORMAL if i in tokens else kind.UNUSED for i in range(n_tokens)]
    for i, token in added.items():
        kinds[i] = kind.CONTROL if token.get("special") else kind.USER_DEFINED
    for role, place in special.items():
        if place is not None:
            kinds[place] = kind.UNKNOWN if unigram and role == "unk" else kind.CONTROL
    if not unigram:
        found_whole = (kind.CONTROL, kind.USER_DEFINED)
        spelled = [
            token if k in found_whole else _phantom(token)
            for token, k in zip(spelled, kinds, strict=True)
        ]
    if twice:
        writer.add_uint32(SEGMENT_B_OFFSET, n_tokens)
        # A word never holds a space, so no text is tokenized into these. They are not control
        # tokens, as llama.cpp searches every text for each control token.
        spelled += [f" {i}" for i in range(n_tokens)]
        kinds += [kind.UNUSED] * n_tokens

    writer.add_token_type_count(size(config, "type_vocab_size"))
    writer.add_token_list(spelled)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(special["cls"])
    writer.add_eos_token_id(special["sep"])
    writer.add_sep_token_id(special["sep"])
    for role in ("unk", "pad", "mask"):
        if special[role] is not None:
            getattr(writer, f"add_{role}_token_id")(special[role])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_add_sep_token(unigram)  # pairs: <s> A </s></s> B </s>, and [CLS] A [SEP] B [SEP]
    if unigram:
        scores = [score for _, score in pieces]
        # Added tokens are found first; their scores are not used.
        scores += [0.0 if i in added else LEAST_SCORE for i in range(len(scores), len(spelled))]
        writer.add_token_scores(scores)
        _write_unigram(writer, tokenizer)
    else:
        _write_wordpiece(writer, tokenizer)


def _phantom(token: str) -> str:
    """Spell a WordPiece as llama.cpp does: U+2581 before a token that starts a word."""
    return token[2:] if token.startswith("##") else "\u2581" + token


def _write_wordpiece(writer: Any, tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")  # llama.cpp's name for BERT's own splitting
    lowercase = tokenizer.settings.get("do_lower_case", True)
    strip_accents = tokenizer.settings.get("strip_accents")
    for step in tokenizer.steps("normalizer", "normalizers"):
        if step.get("type") == "BertNormalizer":
            lowercase, strip_accents = step.get("lowercase", True), step.get("strip_accents")
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", bool(lowercase))
    if strip_accents is not None:  # the default is the value of `lowercase`
        writer.add_bool("tokenizer.ggml.normalizer.strip_accents", strip_accents)


def _write_unigram(writer: Any, tokenizer: Tokenizer) -> None:
    normalizers = tokenizer.steps("normalizer", "normalizers")
    splitters = tokenizer.steps("pre_tokenizer", "pretokenizers")
    kinds = {step.get("type") for step in (*normalizers, *splitters)}
    # Replace and WhitespaceSplit turn several spaces into one, as sentencepiece does.
    if others := kinds - {"Precompiled", "Replace", "Strip", "WhitespaceSplit", "Metaspace"}:
        odd = min(map(str, others))
        raise ConvertError(f"{tokenizer.folder}: llama.cpp's Unigram tokenizer has no step {odd}")
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(any(map(_adds_prefix, splitters)))
    writer.add_remove_extra_whitespaces(not kinds.isdisjoint({"Replace", "WhitespaceSplit"}))
    for step in normalizers:
        if charsmap := step.get("precompiled_charsmap"):
            writer.add_precompiled_charsmap(base64.b64decode(charsmap))


def _adds_prefix(step: dict[str, Any]) -> bool:
    """Return whether a splitter puts U+2581 before a text; older files use another key."""
    usual = "always" if step.get("add_prefix_space", True) else "never"
    return step.get("type") == "Metaspace" and step.get("prepend_scheme", usual) != "never"
