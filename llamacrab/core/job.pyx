# A call's texts in the scheduler: the job, its future, and the thread that resolves futures.

# Texts per chunk: they are split into tokens together without the GIL, sorted by length, and freed
# together.
cdef int MAX_CHUNK_TEXTS = 512

# A shared prefix of fewer tokens is not worth its own decode.
cdef size_t MIN_SHARED_TOKENS = 16

cdef dict _NORM_KINDS = {
    "none": <int>native.norm_kind.none,
    "p": <int>native.norm_kind.p,
    "max": <int>native.norm_kind.max,
    "int16": <int>native.norm_kind.int16,
}


@cython.no_gc_clear  # workers may write into its rows until it is freed
cdef class Job:
    """The texts of one call while the scheduler works on them.

    `add` texts, then `seal` and `wait`. A caller that stops early must `cancel`: until then,
    workers may write into the rows.

    Attributes
    ----------
    rows : ndarray of float32, or list of them
        Shape (n_texts, n_out). Each row is filled when its text is done. With pooling NONE, a list
        of arrays of shape (n_tokens, n_out).
    done : ndarray of bool, shape (n_texts,)
        Which texts have their row.
    """

    cdef Scheduler _scheduler  # so that the scheduler is not closed before its jobs end
    cdef _SchedulerHandle _handle
    cdef native.job *_job
    cdef Tokenization _tokenization
    cdef readonly object rows, done
    cdef object _future
    cdef int64_t _n_texts, _n_added
    cdef int _n_out
    cdef bint _pooled

    def __init__(self, Scheduler scheduler not None, Tokenization tokenization not None,
                 int64_t n_texts, str norm, double p, int width, bint dedup, bint share):
        cdef int norm_value = _NORM_KINDS[norm]
        self._scheduler = scheduler
        self._handle = scheduler.handle()
        self._tokenization = tokenization
        self._n_texts = n_texts
        self._n_out = width or scheduler._context.n_out
        self._pooled = scheduler._context.pooling_type != PoolingType.NONE
        if self._pooled:
            self.rows = np.zeros((n_texts, self._n_out), dtype=np.float32)
        else:
            self.rows = [np.empty((0, self._n_out), dtype=np.float32)] * n_texts
        self.done = np.zeros(n_texts, dtype=bool)
        self._job = new native.job()
        self._job.norm = <native.norm_kind>norm_value
        self._job.p = p
        self._job.width = self._n_out
        # A score may be zero. A row of zeros of an embedder is always an error.
        self._job.may_be_zero = scheduler._context.pooling_type == PoolingType.RANK
        self._job.dedup = dedup and not scheduler.deterministic
        if share and tokenization._common.size() >= MIN_SHARED_TOKENS and scheduler.shares_prefix:
            self._job.shared = tokenization._common
        cdef uint8_t[::1] done = self.done.view(np.uint8)
        if n_texts:
            self._job.done = &done[0]

    def __dealloc__(self):
        if self._job == NULL or self._handle is None or self._handle.is_foreign():
            return
        with nogil:
            # Usually the job is over. If not, no worker may write into rows that are being freed.
            self._handle.ptr.cancel(self._job[0])
            self._handle.ptr.await_quiet(self._job[0])
            del self._job

    def add(self, list texts not None, *, bint block=True, deadline=None):
        """Split texts into tokens and queue them. Wait for room in the queue if there is none.

        Parameters
        ----------
        texts : list of str or of sequences of int
            The next texts of the job.
        block : bool
            Wait for room; otherwise raise `QueueFull`.
        deadline : float, optional
            ``time.monotonic()`` at which to give up with `LlamaTimeoutError`.
        """
        cdef Py_ssize_t start = 0
        while start < len(texts):
            start += self._add_chunk(texts[start:start + MAX_CHUNK_TEXTS], block, deadline)

    cdef Py_ssize_t _add_chunk(self, list texts, bint block, deadline) except -1:
        """Queue the first of `texts`, at least one; return how many."""
        if self._n_added + len(texts) > self._n_texts:
            raise ValueError(f"the job is for {self._n_texts} texts")
        cdef native.tokenized ids
        self._tokenize(texts, ids)
        cdef Py_ssize_t i, n_texts = ids.ends.size()
        if ids.status != native.tokenize_status.ok:
            raise self._tokenization.error(ids.status, ids.n_tokens, self._n_added + n_texts)

        cdef native.chunk *chunk = new native.chunk()
        cdef unique_ptr[native.chunk] owned
        owned.reset(chunk)
        chunk.tokens.swap(ids.tokens)
        chunk.items.resize(n_texts)
        for i in range(n_texts):
            chunk.items[i].owner = self._job
            chunk.items[i].index = self._n_added + i
            chunk.items[i].first = ids.ends[i - 1] if i else 0
            chunk.items[i].n_tokens = <int32_t>(ids.ends[i] - chunk.items[i].first)
        self._place_rows(chunk)
        cdef int64_t n_tokens = chunk.tokens.size()
        self._await_room(n_tokens, block, deadline)
        cdef cbool admitted
        with nogil:
            admitted = self._handle.ptr.admit(self._job[0], move(owned))
        if not admitted:
            self._raise_failure()
        self._n_added += n_texts
        return n_texts

    cdef int _tokenize(self, list texts, native.tokenized &result) except -1:
        """Split the first of `texts`, at least one, up to a quarter of what the queue can hold."""
        cdef vector[native.source] sources
        cdef native.source one
        cdef Py_ssize_t i, size
        cdef const char *data
        cdef const int32_t[::1] ids
        cdef list references = []  # to the objects whose memory `sources` point into
        for i, text in enumerate(texts):
            one.is_ids = not isinstance(text, str)
            if one.is_ids:
                text = self._tokenization.check_ids(text, self._n_added + i)
                ids = text
                data = <const char *>&ids[0]
                size = ids.shape[0] * sizeof(int32_t)
            else:
                text = self._tokenization.vocab.checked(text)
                if PyUnicode_IS_ASCII(text):
                    data = PyUnicode_AsUTF8AndSize(text, &size)
                else:
                    # A copy, as the str would store its UTF-8 for as long as it lives.
                    text = _utf8(text)
                    data = text
                    size = len(text)
            references.append(text)
            one.bytes = native.string_view(data, size)
            sources.push_back(one)

        cdef size_t budget = max(self._handle.ptr.get_limits().queue_tokens // 4, 1)
        started = time.perf_counter()
        with nogil:
            result = native.tokenize_texts(
                self._tokenization._native, sources, budget, self._handle.pool[0])
        self._handle.ptr.add_tokenize_seconds(time.perf_counter() - started)
        return 0

    cdef int _await_room(self, int64_t n_tokens, bint block, deadline) except -1:
        """Wait for room for `n_tokens` tokens. Calls get room in the order in which they come."""
        if self._handle.ptr.has_room(self._job[0], n_tokens, block):
            return 0
        if not block:
            raise QueueFull(
                f"{self._handle.ptr.queued_tokens()} tokens wait already; {n_tokens} more do "
                f"not fit in {self._handle.ptr.get_limits().queue_tokens}, or other calls wait "
                "for room before this one"
            )
        try:
            while not self._handle.ptr.has_room(self._job[0], n_tokens, True):
                self._sleep(deadline)
        except BaseException:
            self._handle.ptr.give_up_place(self._job[0])  # another call may fit now
            raise
        return 0

    cdef int _place_rows(self, native.chunk *chunk) except -1:
        """Set where the row of each text goes."""
        cdef float[:, ::1] rows
        cdef size_t k
        if self._pooled:
            rows = self.rows
            for k in range(chunk.items.size()):
                chunk.items[k].row = &rows[chunk.items[k].index, 0]
            return 0
        for k in range(chunk.items.size()):
            own = np.empty((chunk.items[k].n_tokens, self._n_out), dtype=np.float32)
            self.rows[chunk.items[k].index] = own
            rows = own
            chunk.items[k].row = &rows[0, 0]
            chunk.items[k].n_rows = chunk.items[k].n_tokens
        return 0

    cdef int _sleep(self, deadline) except -1:
        """Sleep until the state of this job changes, or a signal arrives, or time is up."""
        cdef int64_t microseconds = -1
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise LlamaTimeoutError("the time given for this call is over")
            microseconds = <int64_t>(left * 1e6) + 1
        with nogil:
            self._job.event.sleep(microseconds)
        PyErr_CheckSignals()
        return 0

    def seal(self):
        """Declare that no more texts will come."""
        with nogil:
            self._handle.ptr.seal(self._job[0], NULL)

    def wait(self, *, deadline=None, progress=None):
        """Wait until all texts are done and return `rows`.

        Parameters
        ----------
        deadline : float, optional
            ``time.monotonic()`` at which to give up with `LlamaTimeoutError`.
        progress : callable, optional
            Called with the number of texts done, after packs.
        """
        self._job.watched = progress is not None
        while not self._handle.ptr.finished(self._job[0]):
            self._sleep(deadline)
            if progress is not None:
                progress(self.n_done)
        self._raise_failure()
        return self.rows

    def cancel(self, *, bint wait=True):
        """Drop the texts that wait, and abort a pack if it has no texts of other jobs.

        Parameters
        ----------
        wait : bool
            Return only when no worker can write into `rows` any more.
        """
        if self._handle.is_foreign():
            return
        with nogil:
            self._handle.ptr.cancel(self._job[0])
            if wait:
                self._handle.ptr.await_quiet(self._job[0])

    @property
    def n_added(self):
        """Number of texts queued so far, also after `add` has raised `QueueFull`."""
        return self._n_added

    @property
    def n_done(self):
        """Number of texts that have their row."""
        return self._handle.ptr.n_done(self._job[0])

    cdef int _raise_failure(self) except -1:
        cdef native.failure failure = self._handle.ptr.failure_of(self._job[0])
        if failure.kind == native.failure_kind.none:
            return 0
        error = _error_of(failure, f"compute text {failure.index}", f" (text {failure.index})")
        if not isinstance(error, (ClosedError, CancelledError)):
            error.index = failure.index
        raise error


class _JobFuture(concurrent.futures.Future):
    """A future whose `cancel` also cancels the job, even if it is running."""

    def __init__(self, job, finish, remap_error):
        super().__init__()
        self._llamacrab_job = job
        self._llamacrab_finish = finish
        self._llamacrab_remap_error = remap_error

    def cancel(self):
        cancelled = super().cancel()
        job = self._llamacrab_job
        if cancelled and job is not None:
            job.cancel(wait=False)
        return cancelled

    def _remapped(self, error, job):
        """Return the error to raise: `error` in terms of the caller's texts.

        If that fails, return the exception that came instead. The future must get an exception.
        """
        if not isinstance(error, LlamaError):
            return error
        error.rows, error.done = job.rows, job.done
        try:
            if self._llamacrab_remap_error is not None:
                self._llamacrab_remap_error(error)
        except BaseException as another:
            return another
        return error

    def _end(self, job):
        """Set the result or the exception. Called by the notifier's thread."""
        self._llamacrab_job = None
        if not self.set_running_or_notify_cancel():
            return
        try:
            rows = job.wait()
            finish = self._llamacrab_finish
            result = rows if finish is None else finish(rows)
        except BaseException as error:
            self.set_exception(self._remapped(error, job))
        else:
            self.set_result(result)


def _notify(_SchedulerHandle handle):
    """Resolve futures as their jobs end. Workers cannot: they never take the GIL."""
    cdef void *job
    while True:
        with nogil:
            job = handle.ptr.next_finished()
        if job == NULL:
            return
        _resolve(<Job>job)


cdef int _resolve(Job job) except -1:
    """Resolve the future of a job that has ended."""
    Py_DECREF(job)
    future = job._future
    job._future = None
    future._end(job)
    return 0
