# One context: check a batch, decode it, copy the rows out. native/decoder.cpp does the work.

_FLASH_ATTN = {
    "auto": c.LLAMA_FLASH_ATTN_TYPE_AUTO,
    None: c.LLAMA_FLASH_ATTN_TYPE_AUTO,
    False: c.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    True: c.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}


# `no_gc_clear`: the garbage collector would release the model first when it breaks a cycle.
@cython.no_gc_clear
cdef class _ContextHandle(_OfProcess):
    """Owns a decoder, and holds the model that it reads."""

    cdef native.decoder *ptr
    cdef _ModelHandle model

    def __dealloc__(self):
        if self.ptr != NULL and not self.is_foreign():
            del self.ptr


cdef class Context:
    """The buffers of a computation. Several contexts may use one model.

    Only one thread at a time may use a context; a second one gets a `ContextError`.

    Parameters
    ----------
    model : Model
        The weights.
    n_ctx : int
        Number of tokens that a causal model can hold, of all sequences together; 0: as many as the
        model was trained with. An encoder such as BERT has no memory and ignores it.
    n_batch : int
        Number of tokens that one `decode` can take; 0: `n_ctx`.
    n_ubatch : int
        Number of tokens that are computed in one step; 0: `n_batch`. A text must fit in it, unless
        the model is causal and the pooling is LAST or RANK.
    n_seq_max : int
        Number of sequences that one `decode` can take, at most 256.
    n_threads : int
        Threads that compute; 0: as many as this process may use.
    pooling_type : PoolingType or str
        UNSPECIFIED: what the GGUF says, otherwise MEAN.
    flash_attn : bool or "auto"
        Flash attention.
    kv_unified : bool
        Whether the sequences of a causal model share its `n_ctx` cells. Otherwise each sequence has
        an equal part of them.
    offload_kqv : bool
        Keep attention and its memory on the GPU.

    Raises
    ------
    ContextError
        The sizes do not fit each other or the model.
    PoolingError
        The pooling is RANK and the GGUF has no classification head.
    AllocationError
        There is not enough memory for these sizes.
    """

    cdef _ContextHandle _handle
    cdef Vocab _vocab
    cdef readonly object pooling_type
    cdef readonly int n_ctx, n_batch, n_ubatch, n_seq_max, n_threads
    cdef readonly int n_pos_max  #: positions that a sequence may have
    cdef readonly int n_out  #: width of a row
    cdef readonly bint is_causal, has_memory
    cdef bint _busy  # a thread is using the context
    cdef dict _decoded  # seq_id -> number of tokens, of the last decode
    cdef int _n_decoded

    def __init__(self, Model model not None, *, int n_ctx=0, int n_batch=0, int n_ubatch=0,
                 int n_seq_max=1, int n_threads=0, pooling_type=PoolingType.UNSPECIFIED,
                 flash_attn="auto", bint kv_unified=True, bint offload_kqv=True,
                 bint _headless=False):
        model_handle = model.handle()
        pooling = _choose_pooling(model, pooling_type)
        n_ctx = n_ctx or model.n_ctx_train
        n_batch = n_batch or max(n_ctx, n_seq_max)
        n_ubatch = n_ubatch or n_batch
        n_threads = n_threads or usable_cpus()
        _check_sizes(model, n_ctx, n_batch, n_ubatch, n_seq_max, n_threads)
        _check_memory(n_ctx)
        # llama.cpp plans its memory for a full ubatch of n_seq_max sequences of equal length. With
        # pooling MEAN it asserts that they divide the ubatch evenly
        # (llama_context::graph_reserve).
        n_ubatch = -(-n_ubatch // n_seq_max) * n_seq_max
        n_batch = max(n_batch, n_ubatch)

        cdef c.llama_context_params params = c.llama_context_default_params()
        cdef int pooling_value = pooling, flash_value = _flash_attn_value(model, flash_attn)
        params.n_ctx = max(n_ctx, n_ubatch)
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch
        params.n_seq_max = n_seq_max
        params.n_threads = n_threads
        params.n_threads_batch = n_threads
        params.pooling_type = <c.llama_pooling_type>pooling_value
        if model.arch == "llama-embed":
            # llama.cpp treats it as causal unless the GGUF says otherwise, which converters omit.
            params.attention_type = c.LLAMA_ATTENTION_TYPE_NON_CAUSAL
        params.flash_attn_type = <c.llama_flash_attn_type>flash_value
        params.embeddings = True
        params.offload_kqv = offload_kqv
        params.no_perf = True
        params.kv_unified = kv_unified

        cdef _ContextHandle handle = _make_context(model, model_handle, params, _headless)
        self._vocab = model.vocab
        self.pooling_type = pooling
        self.n_out = model.n_cls_out if pooling == PoolingType.RANK else model.n_embd_out
        self._read_sizes(handle.ptr.context())
        if model.has_position_table:
            self.n_pos_max = min(self.n_pos_max, model.n_ctx_train)
        self._decoded = {}
        self._handle = handle

    cdef int _read_sizes(self, c.llama_context *context) except -1:
        """Store the sizes that llama.cpp chose."""
        self.n_ctx = c.llama_n_ctx(context)
        self.n_batch = c.llama_n_batch(context)
        self.n_ubatch = c.llama_n_ubatch(context)
        self.n_seq_max = c.llama_n_seq_max(context)
        self.n_threads = c.llama_n_threads_batch(context)
        self.is_causal = c.llama_get_causal_attn(context)
        self.has_memory = c.llama_get_memory(context) != NULL
        self.n_pos_max = c.llama_n_ctx_seq(context) if self.has_memory else 2**31 - 1
        return 0

    cdef _ContextHandle enter(self):
        """Reserve the context for this thread: with two threads in it, llama.cpp would crash."""
        with cython.critical_section(self):
            if self._handle is None:
                raise ClosedError("the context is closed")
            self._handle.check_process("Context")
            if self._busy:
                raise ContextError(
                    "another thread is using this context: make one context per thread, of one "
                    "model"
                )
            self._busy = True
            return self._handle

    cdef void leave(self):
        with cython.critical_section(self):
            self._busy = False

    def close(self):
        """Free the context when no call uses it any more."""
        with cython.critical_section(self):
            self._handle = None

    @property
    def closed(self):
        return self._handle is None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        if self.closed:
            return "<Context (closed)>"
        return (
            f"<Context n_ctx={self.n_ctx} n_batch={self.n_batch} n_ubatch={self.n_ubatch} "
            f"n_seq_max={self.n_seq_max} pooling_type={self.pooling_type.name}>"
        )

    @property
    def n_tokens_max(self):
        """Number of tokens of the longest sequence that one `decode` can take."""
        n = self.n_batch if self.may_split else min(self.n_batch, self.n_ubatch)
        return min(n, self.n_pos_max)

    @property
    def may_split(self):
        """Whether rows stay correct if a batch is larger than `n_ubatch`."""
        return (
            self.has_memory and self.is_causal
            and self.pooling_type not in (PoolingType.MEAN, PoolingType.CLS)
        )

    def decode(self, Batch batch not None):
        """Compute the rows of a batch, without the GIL. Read them before the next `decode`.

        Raises
        ------
        InputError
            The batch is empty, or has an id, `seq_id` or position that this model cannot take.
        ContextError
            The batch is larger than this context, or another thread is using the context.
        DecodeError
            llama.cpp failed. The message is llama.cpp's.
        """
        cdef _ContextHandle handle = self.enter()
        try:
            self._decode(handle, batch)
        finally:
            self.leave()

    cdef int _decode(self, _ContextHandle handle, Batch batch) except -1:
        self._decoded = {}
        self._n_decoded = 0
        self._check(batch)
        cdef native.failure failure
        with nogil:
            failure = handle.ptr.decode(batch._batch[0])
        if failure.kind == native.failure_kind.no_room:
            raise ContextError(
                f"the memory of this context (n_ctx={self.n_ctx}) has no room for {batch.n_tokens} "
                "more tokens: call clear() between batches, or make n_ctx larger"
            )
        if failure.kind != native.failure_kind.none:
            raise _error_of(failure, f"decode {batch.n_tokens} tokens")
        self._decoded = dict(batch._next_pos)
        self._n_decoded = batch.n_tokens
        return 0

    def clear(self):
        """Remove earlier batches from the memory of a causal model."""
        cdef _ContextHandle handle = self.enter()
        try:
            handle.ptr.clear_memory()
        finally:
            self.leave()

    def seq_row(self, int seq_id):
        """Return the pooled row of a sequence of the last batch: float32, shape (n_out,)."""
        row = np.empty(self.n_out, dtype=np.float32)
        self.copy_seq_row(seq_id, row)
        return row

    def copy_seq_row(self, int seq_id, float[::1] out not None):
        """Write the pooled row of a sequence of the last batch into `out`.

        Returns
        -------
        bool
            Whether all values are finite.
        """
        cdef _ContextHandle handle = self.enter()
        try:
            return self._copy_seq_row(handle, seq_id, out)
        finally:
            self.leave()

    cdef object _copy_seq_row(self, _ContextHandle handle, int seq_id, float[::1] out):
        if self.pooling_type == PoolingType.NONE:
            raise PoolingError("pooling NONE gives rows of tokens, not of sequences: token_rows()")
        if seq_id not in self._decoded:
            raise InputError(f"sequence {seq_id} is not in the last batch {tuple(self._decoded)}")
        if out.shape[0] != self.n_out:
            raise InputError(f"a row has {self.n_out} values, the array has {out.shape[0]}")
        cdef const float *row
        with nogil:
            row = handle.ptr.sequence_row(seq_id)
        if row == NULL:
            raise DecodeError(0, f"llama.cpp has no row for sequence {seq_id}")
        memcpy(&out[0], row, self.n_out * sizeof(float))
        return _all_finite(row, self.n_out)

    def token_rows(self, int start=0, stop=None):
        """Return the rows of tokens of the last batch, by their index in it.

        Returns
        -------
        ndarray of float32, shape (stop - start, n_out)

        Raises
        ------
        PoolingError
            This context pools, so it has one row per sequence only.
        """
        cdef _ContextHandle handle = self.enter()
        try:
            return self._token_rows(handle, start, stop)
        finally:
            self.leave()

    cdef object _token_rows(self, _ContextHandle handle, int start, stop):
        if self.pooling_type != PoolingType.NONE:
            raise PoolingError(
                f"pooling {self.pooling_type.name} gives one row per sequence; rows of tokens need "
                "NONE"
            )
        cdef int end = self._n_decoded if stop is None else stop
        if not 0 <= start <= end <= self._n_decoded:
            raise InputError(f"tokens {start} to {end} are not among the {self._n_decoded} decoded")
        rows = np.empty((end - start, self.n_out), dtype=np.float32)
        cdef float[:, ::1] view = rows
        cdef const float *row
        cdef int i
        for i in range(start, end):
            row = handle.ptr.token_row(i)
            if row == NULL:
                raise DecodeError(0, f"llama.cpp has no row for token {i}: {_native_errors()}")
            memcpy(&view[i - start, 0], row, self.n_out * sizeof(float))
        return rows

    cdef int _check(self, Batch batch) except -1:
        """Refuse a batch on which llama.cpp would assert, or fail with a code and a log line."""
        cdef int n = batch._batch.n_tokens()
        if n == 0:
            raise InputError("the batch holds no tokens")
        if n > self.n_batch:
            raise ContextError(f"the batch holds {n} tokens, n_batch is {self.n_batch}")
        if n > self.n_ubatch and not self.may_split:
            raise ContextError(
                f"the batch holds {n} tokens, n_ubatch is {self.n_ubatch}: with pooling "
                f"{self.pooling_type.name} this model must compute it in one step"
            )
        if len(batch._next_pos) > self.n_seq_max:
            raise ContextError(
                f"the batch holds {len(batch._next_pos)} sequences, n_seq_max is {self.n_seq_max}"
            )
        cdef int i, token, seq_id, pos
        for i in range(n):
            token = batch._batch.token(i)
            seq_id = batch._batch.seq_id(i)
            pos = batch._batch.pos(i)
            if not 0 <= token < self._vocab.n_tokens:
                raise InputError(
                    f"sequence {seq_id}: token id {token} is not in range({self._vocab.n_tokens})"
                )
            if seq_id >= self.n_seq_max:
                raise InputError(f"seq_id {seq_id} is not in range(n_seq_max={self.n_seq_max})")
            if pos >= self.n_pos_max:
                raise ContextError(
                    f"sequence {seq_id} reaches position {pos}, this context takes "
                    f"{self.n_pos_max} tokens per sequence"
                )
        return 0


cdef object _choose_pooling(Model model, pooling_type):
    """Return the pooling of a context; PoolingError if the model cannot pool that way."""
    pooling = PoolingType(pooling_type)
    if pooling == PoolingType.UNSPECIFIED:
        pooling = model.pooling_type
    if pooling == PoolingType.UNSPECIFIED:
        pooling = PoolingType.MEAN
    if pooling == PoolingType.RANK and not model.has_rank_head:
        raise PoolingError(
            "pooling RANK needs a classification head (tensor cls.weight or cls.output.weight), "
            f"which {model.path} lacks: it is an embedder, or was converted without its head"
        )
    return pooling


cdef int _flash_attn_value(Model model, flash_attn) except? -2:
    if flash_attn not in _FLASH_ATTN:
        raise ContextError(f"flash_attn must be True, False or 'auto', not {flash_attn!r}")
    if flash_attn in ("auto", None) and model.cpu_backend != "ggml":
        # llama.cpp decides against it if attention runs on another device than it expects.
        flash_attn = True
    return _FLASH_ATTN[flash_attn]


cdef _ContextHandle _make_context(Model model, _ModelHandle model_handle,
                                  c.llama_context_params params, cbool headless):
    cdef _ContextHandle handle = _ContextHandle()
    handle.model = model_handle
    sync_log_level()
    native.log_take_errors()
    try:
        with nogil:
            handle.ptr = native.decoder.make(model_handle.ptr, params, headless).release()
    except MemoryError:
        handle.ptr = NULL
    if handle.ptr != NULL:
        return handle
    reason = _native_errors()
    # A failed assertion (native/llama_guard.hpp) is about numbers of the GGUF, or about memory.
    if "gave up at" in reason and "insufficient memory" not in reason:
        raise ModelCorruptError(f"llama.cpp cannot compute with {model.path}: {reason}")
    raise AllocationError(
        f"cannot make a context of n_ctx={params.n_ctx}, n_batch={params.n_batch}, "
        f"n_ubatch={params.n_ubatch}, n_seq_max={params.n_seq_max}: {reason}"
    )


cdef object _error_of(const native.failure &failure, str action, str note=""):
    """Return the exception for a failure.

    `action` is what was tried, such as "decode 3 tokens"; `note` is added to llama.cpp's message.
    """
    message = failure.message.decode("utf-8", "replace") or "llama.cpp gave no reason"
    if failure.kind == native.failure_kind.no_memory:
        return AllocationError(f"not enough memory to {action}")
    if failure.kind == native.failure_kind.numerical:
        return NumericalError(failure.index, message)
    if failure.kind == native.failure_kind.closed:
        return ClosedError("the Llama was closed")
    if failure.kind == native.failure_kind.cancelled:
        return CancelledError("the job was cancelled")
    return DecodeError(failure.code, message + note)


cdef cbool _all_finite(const float *row, int n) noexcept nogil:
    cdef int i
    for i in range(n):
        if not isfinite(row[i]):
            return False
    return True


# Bytes that llama.cpp stores per cell of its cache (llama_kv_cells): a position, some numbers, and
# the set of its sequences. All of them are written at once.
cdef int64_t _CELL_BYTES = 4 + 4 + 8 + 32


cdef int _check_memory(int64_t n_ctx) except -1:
    """Refuse a size for which the system would end this process for lack of memory."""
    available = available_memory()
    if available is not None and n_ctx * _CELL_BYTES > available:
        raise AllocationError(
            f"n_ctx={n_ctx} needs {n_ctx * _CELL_BYTES >> 20} MiB for the table of cells alone; "
            f"{available >> 20} MiB are available"
        )
    return 0


cdef int _check_sizes(Model model, int n_ctx, int n_batch, int n_ubatch, int n_seq_max,
                      int n_threads) except -1:
    cdef int n_seqs = <int>c.llama_max_parallel_sequences()
    for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch), ("n_ubatch", n_ubatch)):
        if not 1 <= value <= 2**30:
            raise ContextError(f"{name} must be from 1 to 2**30, not {value}")
    if not 1 <= n_seq_max <= n_seqs:
        raise ContextError(f"n_seq_max must be from 1 to {n_seqs}, not {n_seq_max}")
    if n_batch < n_seq_max:
        raise ContextError(f"n_batch={n_batch} is less than n_seq_max={n_seq_max}: each sequence "
                           "has at least one token")
    if not 1 <= n_threads <= c.GGML_MAX_N_THREADS:
        raise ContextError(f"n_threads must be from 1 to {c.GGML_MAX_N_THREADS}, not {n_threads}")
    if model.has_position_table and n_ctx > model.n_ctx_train:
        raise ContextError(
            f"n_ctx={n_ctx} is more than the {model.n_ctx_train} positions that this model has"
        )
    return 0
