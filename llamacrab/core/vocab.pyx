# The vocabulary of a model: text <-> token ids.


class VocabType(enum.IntEnum):
    """How a vocabulary splits text (``llama_vocab_type``)."""

    NONE = c.LLAMA_VOCAB_TYPE_NONE
    SPM = c.LLAMA_VOCAB_TYPE_SPM
    BPE = c.LLAMA_VOCAB_TYPE_BPE
    WPM = c.LLAMA_VOCAB_TYPE_WPM
    UGM = c.LLAMA_VOCAB_TYPE_UGM
    RWKV = 5
    PLAMO2 = 6
    TEST = 7


# The GGUF key for the number of tokens, if each has a second copy after the first ones.
SEGMENT_B_OFFSET = "llamacrab.segment_b_offset"

_UNSPLITTABLE = (
    "llama.cpp cannot split this text: it has more tokens than can be counted, or bytes for which "
    "this vocabulary has no token"
)


cdef str _exact(text):
    """Return a text as a plain str, also if its class is a subclass, such as numpy's."""
    if type(text) is str:
        return text
    if not isinstance(text, str):
        raise TypeError(f"a text must be str, not {type(text).__name__}")
    return str.__str__(text)  # str() would call a method of the subclass


cdef bytes _utf8(str text):
    """Encode `text`; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


cdef object _int32_array(const int32_t *data, size_t size):
    array = np.empty(size, dtype=np.int32)
    cdef int32_t[::1] view = array
    if size:
        memcpy(&view[0], data, size * sizeof(int32_t))
    return array


def as_token_ids(tokens):
    """Return `tokens` as a contiguous int32 array of shape (n,), or raise InputError."""
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError) as error:
        raise InputError(f"token ids must be a flat sequence of integers: {error}") from None
    if array.size == 0:
        return np.empty(0, dtype=np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"token ids must be a flat sequence of integers, not {array.dtype} of shape "
            f"{array.shape}"
        )
    if int(array.min()) < -2**31 or int(array.max()) >= 2**31:
        raise InputError("token ids must fit in 32 bits")
    return np.ascontiguousarray(array, dtype=np.int32)


cdef class Vocab:
    """The vocabulary of a model, as ``model.vocab``. Threads may share it.

    Attributes
    ----------
    n_tokens : int
        Number of tokens; ids run from 0 to ``n_tokens - 1``.
    vocab_type : VocabType
        How text is split.
    bos, eos, sep, pad, mask : int or None
        Ids of the special tokens; None if the GGUF does not have the token.
    add_bos, add_eos, add_sep : bool
        Whether the GGUF asks for these tokens around a text.
    prefix_ids, suffix_ids : tuple of int
        The special tokens that `tokenize` puts before and after a text.
    segment_b_offset : int or None
        In a BERT cross-encoder made by `llamacrab.convert`: the number of tokens. Each has two ids,
        `i` in the query and ``i + segment_b_offset`` in the document; `n_tokens` counts both.
        `tokenize` gives the first only; `detokenize` gives the same text for both.
    """

    cdef _ModelHandle _model
    cdef const c.llama_vocab *_ptr
    cdef readonly int n_tokens
    cdef readonly object vocab_type
    cdef readonly object bos, eos, sep, pad, mask
    cdef readonly bint add_bos, add_eos, add_sep
    cdef readonly tuple prefix_ids, suffix_ids
    cdef readonly object segment_b_offset
    cdef bint _decompose

    def __init__(self):
        raise TypeError("a Vocab comes with its model: use model.vocab")

    @staticmethod
    cdef Vocab of(_ModelHandle model, dict metadata):
        cdef Vocab self = Vocab.__new__(Vocab)
        self._model = model
        self._ptr = c.llama_model_get_vocab(model.ptr)
        self.n_tokens = c.llama_vocab_n_tokens(self._ptr)
        self.vocab_type = VocabType(c.llama_get_vocab_type(self._ptr))
        self.bos = _id_or_none(c.llama_vocab_bos(self._ptr))
        self.eos = _id_or_none(c.llama_vocab_eos(self._ptr))
        self.sep = _id_or_none(c.llama_vocab_sep(self._ptr))
        self.pad = _id_or_none(c.llama_vocab_pad(self._ptr))
        self.mask = _id_or_none(c.llama_vocab_mask(self._ptr))
        self.add_bos = c.llama_vocab_get_add_bos(self._ptr)
        self.add_eos = c.llama_vocab_get_add_eos(self._ptr)
        self.add_sep = c.llama_vocab_get_add_sep(self._ptr)
        # These are the rules of llama_tokenize(add_special=true). It is not used because it asserts
        # and ends the process if a GGUF asks for a token that it does not have.
        if self.vocab_type == VocabType.WPM:
            before, after = [self.bos], [self.sep]
        else:
            before = [self.bos] if self.add_bos else []
            after = [self.eos] if self.add_eos else []
        self.prefix_ids = tuple(token for token in before if token is not None)
        self.suffix_ids = tuple(token for token in after if token is not None)
        if self.vocab_type == VocabType.RWKV:
            # At a byte that starts a token and is not a token itself, llama.cpp never stops adding.
            pieces = {self.token_to_piece(token) for token in range(self.n_tokens)}
            if any(piece[:1] not in pieces for piece in pieces):
                raise ModelCorruptError("the vocabulary lacks tokens of single bytes")
        # See decompose_hangul() in native/tokenization.hpp.
        lowercase = metadata.get("tokenizer.ggml.normalizer.lowercase", "true")
        strip = metadata.get("tokenizer.ggml.normalizer.strip_accents", lowercase)
        self._decompose = self.vocab_type == VocabType.WPM and strip == "true"
        said = metadata.get(SEGMENT_B_OFFSET)
        if said is not None:
            half = self.n_tokens // 2
            special = (self.bos, self.eos, self.sep)
            highest = max(0 if token is None else token for token in special)
            # Shifted ids must be in the range too: llama.cpp would read beyond its table.
            if said != str(half) or 2 * half != self.n_tokens or highest >= half:
                raise ModelCorruptError(
                    f"{SEGMENT_B_OFFSET} is {said}, which does not fit {self.n_tokens} tokens"
                )
            self.segment_b_offset = half
        return self

    def __len__(self):
        return self.n_tokens

    def tokenize(self, text, *, bint add_special=True, bint parse_special=False):
        """Split `text` into token ids.

        Parameters
        ----------
        text : str
            Any text. A lone surrogate is read as U+FFFD.
        add_special : bool
            Add `prefix_ids` before and `suffix_ids` after, as in the model's training.
        parse_special : bool
            Read the spelling of a special token, such as ``[SEP]``, in the text as that token.

        Returns
        -------
        ndarray of int32, shape (n,)
        """
        cdef bytes data = _utf8(self.checked(text))
        cdef native.string_view view = native.string_view(data, len(data))
        cdef native.token_vector ids
        cdef cbool done
        if add_special:
            for token in self.prefix_ids:
                ids.push_back(token)
        with nogil:
            done = native.tokenize(self._ptr, view, parse_special, self._decompose, ids)
        if not done:
            raise InputError(_UNSPLITTABLE)
        if add_special:
            for token in self.suffix_ids:
                ids.push_back(token)
        return _int32_array(ids.data(), ids.size())

    cdef int check_there(self) except -1:
        """Refuse a GGUF without a vocabulary: most functions of llama.cpp would assert on it."""
        if self.vocab_type == VocabType.NONE:
            raise UnsupportedModelError("this GGUF has no vocabulary: pass token ids")
        return 0

    cdef str checked(self, text):
        """Return a text as a plain str; refuse one that llama_tokenize cannot take."""
        self.check_there()
        cdef str plain = _exact(text)
        # At most 4 bytes per character, or 6 for decomposed Hangul.
        if len(plain) > 2**31 // 6:
            raise InputError(f"a text of {len(plain)} characters is more than llama.cpp can take")
        return plain

    def detokenize(self, tokens, *, bint remove_special=False, bint unparse_special=True):
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Parameters
        ----------
        tokens : sequence of int
            Ids, each in ``range(n_tokens)``.
        remove_special : bool
            Drop the special tokens that `tokenize` adds.
        unparse_special : bool
            Write out the special tokens.

        Raises
        ------
        InputError
            An id is out of range.
        """
        array = as_token_ids(tokens)
        cdef const int32_t[::1] ids = array
        cdef int32_t n_ids = <int32_t>ids.shape[0]
        cdef string text
        cdef int32_t size
        self.check_there()
        if n_ids == 0:
            return ""
        self.check_ids(ids)
        if self.segment_b_offset:
            ids = array % np.int32(self.segment_b_offset)
        with nogil:
            text.resize(16 * n_ids + 64)
            size = c.llama_detokenize(self._ptr, &ids[0], n_ids, &text[0], <int32_t>text.size(),
                                      remove_special, unparse_special)
            if size < 0:
                text.resize(-size)
                size = c.llama_detokenize(self._ptr, &ids[0], n_ids, &text[0], -size,
                                          remove_special, unparse_special)
        text.resize(max(size, 0))
        return (<bytes>text).decode("utf-8", "replace")

    def token_to_piece(self, int token, *, bint special=True):
        """Return the bytes that one token stands for."""
        token = self.first_copy(token)
        cdef string piece
        cdef int32_t size
        piece.resize(64)
        size = c.llama_token_to_piece(self._ptr, token, &piece[0], 64, 0, special)
        if size < 0:
            piece.resize(-size)
            size = c.llama_token_to_piece(self._ptr, token, &piece[0], -size, 0, special)
        piece.resize(max(size, 0))
        return <bytes>piece

    def is_control(self, int token):
        """Return whether a token is special: it controls the model and stands for no text."""
        token = self.first_copy(token)
        return bool(c.llama_vocab_is_control(self._ptr, token))

    cdef int first_copy(self, int token) except -1:
        """Check an id, and return the id of the same text in segment A."""
        self.check_there()
        if not 0 <= token < self.n_tokens:
            raise InputError(f"token id {token} is not in range({self.n_tokens})")
        return token if self.segment_b_offset is None else token % self.segment_b_offset

    cdef int check_ids(self, const int32_t[::1] ids) except -1:
        cdef Py_ssize_t i
        for i in range(ids.shape[0]):
            if not 0 <= ids[i] < self.n_tokens:
                raise InputError(
                    f"token {i} has id {ids[i]}, which is not in range({self.n_tokens})"
                )
        return 0


cdef object _id_or_none(c.llama_token token):
    return None if token == c.LLAMA_TOKEN_NULL else token
