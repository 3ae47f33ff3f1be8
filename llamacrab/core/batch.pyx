# A batch: the tokens of one call of llama_decode.


cdef class Batch(_OfProcess):
    """Tokens of one or more sequences, to be decoded together.

    Parameters
    ----------
    n_tokens : int
        Number of tokens that the batch can hold.

    Examples
    --------
    >>> batch = Batch(8)
    >>> batch.add(0, [101, 7592, 102])
    >>> batch.add(1, [101, 2088, 102])
    >>> batch.n_tokens, batch.seq_ids
    (6, (0, 1))
    """

    cdef native.token_batch *_batch
    cdef readonly int capacity
    cdef dict _next_pos

    def __cinit__(self, int n_tokens):
        # llama.cpp allocates memory per token, and does not check whether it gets it.
        if not 1 <= n_tokens <= 2**24:
            raise ContextError(f"a batch has room for 1 to 2**24 tokens, not {n_tokens}")
        self._batch = new native.token_batch(n_tokens)
        self.capacity = n_tokens
        self._next_pos = {}

    def __dealloc__(self):
        if self._batch != NULL and not self.is_foreign():
            del self._batch

    def add(self, int seq_id, tokens, *, pos=None):
        """Append the tokens of a sequence.

        Parameters
        ----------
        seq_id : int
            The sequence, from 0 to ``llama_max_parallel_sequences() - 1``.
        tokens : sequence of int
            Its token ids, at least one.
        pos : int, optional
            Position of the first token. By default, the tokens continue the sequence in this batch,
            or start at 0.

        Raises
        ------
        InputError
            No tokens, a `seq_id` out of range, or a negative `pos`.
        ContextError
            The batch has no room for the tokens.
        """
        cdef const int32_t[::1] ids = as_token_ids(tokens)
        cdef int n = <int>ids.shape[0]
        cdef int n_seqs = <int>c.llama_max_parallel_sequences()
        if n == 0:
            raise InputError(f"sequence {seq_id} has no tokens")
        if not 0 <= seq_id < n_seqs:
            raise InputError(f"seq_id {seq_id} is not in range({n_seqs})")
        cdef int first = self._next_pos.get(seq_id, 0) if pos is None else pos
        if first < 0:
            raise InputError(f"sequence {seq_id} cannot start at position {first}")
        if self._batch.n_tokens() + n > self.capacity:
            raise ContextError(
                f"{n} more tokens do not fit: the batch holds {self._batch.n_tokens()} of "
                f"{self.capacity}"
            )
        self._batch.add(&ids[0], n, first, seq_id)
        self._next_pos[seq_id] = first + n

    def clear(self):
        """Remove all tokens. The capacity does not change."""
        self._batch.clear()
        self._next_pos = {}

    @property
    def n_tokens(self):
        """Number of tokens added."""
        return self._batch.n_tokens()

    @property
    def seq_ids(self):
        """Ids of the sequences added, in the order of their first token."""
        return tuple(self._next_pos)

    def __len__(self):
        return self._batch.n_tokens()

    def __repr__(self):
        return f"<Batch {self.n_tokens} of {self.capacity} tokens, {len(self._next_pos)} sequences>"
