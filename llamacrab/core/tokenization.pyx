# From a text to the token ids that a model reads, within a limit.

_TRUNCATE = {
    False: <int>native.truncate_side.none,
    True: <int>native.truncate_side.end,
    "end": <int>native.truncate_side.end,
    "start": <int>native.truncate_side.start,
    "middle": <int>native.truncate_side.middle,
}


cdef int _append(native.token_vector &into, Vocab vocab, ids) except -1:
    cdef const int32_t[::1] view = as_token_ids(ids)
    vocab.check_ids(view)
    cdef Py_ssize_t i
    for i in range(view.shape[0]):
        into.push_back(view[i])
    return 0


cdef class Tokenization:
    """How the texts of one call become token ids. The rules are in native/tokenization.cpp.

    Parameters
    ----------
    vocab : Vocab
        The model's vocabulary.
    limit : int
        Number of tokens that fit, special tokens included.
    truncate : bool or {"end", "start", "middle"}
        Which part to cut away from a text that is too long; True is the end. What is put around
        the text is never cut. "middle" keeps the first half of what fits, rounded up, and the last
        half.
    parse_special : bool
        Treat the spelling of a special token in a text as that token.
    prefix_ids, suffix_ids : sequence of int, optional
        Ids before and after a text; by default those of the model's training.
    prefix_text, suffix_text : str
        Strings before and after a text, which are split into tokens together with it.
    shift : int
        Added to all smaller ids between `prefix_ids` and `suffix_ids`: `Vocab.segment_b_offset` for
        a document.
    text_only : bool
        Refuse token ids, because nothing can be put around them.
    advice, larger : str
        For the error about a text that is too long: what to pass to the call, and how to make
        `limit` larger (empty if that is impossible).
    """

    cdef native.tokenization _native
    cdef native.token_vector _common  # leading ids of nearly every text
    cdef bint _text_only
    cdef str _advice, _larger
    cdef readonly Vocab vocab

    def __init__(self, Vocab vocab not None, *, int limit, truncate=False,
                 bint parse_special=False, prefix_ids=None, suffix_ids=None, prefix_text="",
                 suffix_text="",
                 int shift=0, bint text_only=False, str advice="pass truncate=True to cut it",
                 str larger=""):
        cdef int side = _truncate_side(truncate)
        self.vocab = vocab
        self._text_only = text_only
        self._advice = f"{advice}, or {larger}" if larger else advice
        self._larger = f", or {larger}" if larger else ""
        self._native.vocab = vocab._ptr
        self._native.limit = limit
        self._native.shift = shift
        self._native.truncate = <native.truncate_side>side
        self._native.parse_special = parse_special
        self._native.decompose = vocab._decompose
        if prefix_ids is None:
            prefix_ids = vocab.prefix_ids
        if suffix_ids is None:
            suffix_ids = vocab.suffix_ids
        _append(self._native.prefix_ids, vocab, prefix_ids)
        _append(self._native.suffix_ids, vocab, suffix_ids)
        self._native.prefix_text = _utf8(_exact(prefix_text))
        self._native.suffix_text = _utf8(_exact(suffix_text))
        self._common = self._native.common()

    def tokenize(self, text, int64_t index=0):
        """Return the ids of one text: int32, shape (n,).

        Parameters
        ----------
        text : str or sequence of int
            A text, or token ids. Nothing is put around token ids.
        index : int
            Number of the text in its call, for error messages.

        Raises
        ------
        TextTooLongError
            The text has more than `limit` tokens, and `truncate` is false.
        EmptyInputError
            There are no tokens.
        InputError
            `text` is neither a str nor a sequence of token ids of this vocabulary.
        ContextError
            What is put around the text leaves no room for it within `limit`.
        """
        if not isinstance(text, str):
            return self.check_ids(text, index)
        cdef bytes data = _utf8(self.vocab.checked(text))
        cdef native.string_view view = native.string_view(data, len(data))
        cdef native.token_vector ids
        cdef int64_t n_tokens = 0
        cdef native.tokenize_status status
        with nogil:
            status = self._native.apply(view, ids, n_tokens)
        if status != native.tokenize_status.ok:
            raise self.error(status, n_tokens, index)
        return _int32_array(ids.data(), ids.size())

    cdef check_ids(self, ids, int64_t index):
        """Check the caller's ids, and truncate them as a text."""
        if (self._text_only or isinstance(ids, (bytes, bytearray, memoryview))
                or not hasattr(ids, "__len__")):
            raise _wrong(index, _no_text(ids, index, self._text_only))
        cdef const int32_t[::1] view
        try:
            array = as_token_ids(ids)
            view = array
            self.vocab.check_ids(view)
        except InputError as error:
            if _holds_str(ids):
                raise _wrong(index, _no_text(ids, index, False)) from None
            raise _wrong(index, f"text {index}: {error}") from None
        if len(array) == 0:
            raise _wrong(index, f"text {index} has no tokens", EmptyInputError)
        cdef int64_t limit = self._native.limit
        if len(array) <= limit:
            return array
        if self._native.truncate == native.truncate_side.none:
            raise TextTooLongError(len(array), limit, index, self._advice)
        # If the ids start or end with the special tokens, these are kept, as for a text.
        prefix, suffix = self.vocab.prefix_ids, self.vocab.suffix_ids
        cdef Py_ssize_t n_before = len(prefix), n_after = len(suffix)
        if tuple(array[:n_before]) != prefix:
            n_before = 0
        if tuple(array[len(array) - n_after:]) != suffix:
            n_after = 0
        if n_before + n_after >= limit:
            n_before = n_after = 0
        cdef int64_t room = limit - n_before - n_after
        cdef int64_t first = native.n_leading_kept(self._native.truncate, room)
        return np.concatenate(
            [array[:n_before + first], array[len(array) - (room - first) - n_after:]]
        )

    cdef object error(self, native.tokenize_status status, int64_t n_tokens, int64_t index):
        if status == native.tokenize_status.too_long:
            return TextTooLongError(n_tokens, self._native.limit, index, self._advice)
        if status == native.tokenize_status.empty:
            return _wrong(index, f"text {index} has no tokens", EmptyInputError)
        if status == native.tokenize_status.no_room:
            return _wrong(
                index,
                f"text {index}: of {self._native.limit} tokens none is left for the text, after "
                f"what stands around it: shorten the prompt or the query{self._larger}",
                ContextError,
            )
        return _wrong(index, f"text {index}: {_UNSPLITTABLE}")


cdef object _wrong(int64_t index, str message, kind=InputError):
    """Return an error about one text of a call."""
    error = kind(message)
    error.index = index
    return error


cdef str _no_text(value, int64_t index, bint text_only):
    """Return what is wrong with a value that is not a text, and what to pass instead."""
    kind = type(value).__name__
    if value is None or kind in ("NAType", "NaTType") or _is_nan(value):
        return f"text {index} is missing ({value}): leave it out, or pass a text in its place"
    if _holds_str(value):
        return (
            f"text {index} is {kind}, not str: embed_texts and rerank take several texts, in one "
            "flat list"
        )
    or_ids = "" if text_only else " or a sequence of token ids"
    return f"text {index} is {kind}, not str{or_ids}"


cdef bint _is_nan(value):
    return isinstance(value, (float, np.floating)) and value != value


cdef bint _holds_str(value):
    """Return whether `value` contains texts. An iterator is not read, as that would change it."""
    return (
        hasattr(value, "__len__") and getattr(value, "ndim", 1) and len(value) > 0
        and isinstance(next(iter(value)), str)
    )


cdef int _truncate_side(truncate) except -1:
    try:
        return _TRUNCATE[truncate]
    except (KeyError, TypeError):
        raise InputError(
            f"truncate must be False, True, 'end', 'start' or 'middle', not {truncate!r}"
        ) from None
