# The scheduler's Python face: jobs, futures, and what ends them. The work is done by
# native/tokenization.cpp and native/scheduler.cpp.

# Texts that one admission takes at most: they are encoded together without the GIL, sorted by
# length among themselves, and their tokens are freed together.
cdef int TEXTS_A_CHUNK = 512

# Tokens that texts must begin with together to be worth a decode of their own.
cdef size_t SHARED_MIN = 16

# Threads that split one call's texts into tokens.
cdef int MAX_TOKENIZERS = 16

_open_schedulers = weakref.WeakSet()


@atexit.register
def _close_all():
    """Stop every worker before the interpreter, and llama.cpp with it, is taken down."""
    for scheduler in list(_open_schedulers):
        scheduler.close()


@cython.no_gc_clear  # its contexts must outlive the workers
cdef class _SchedulerHandle(_OfProcess):
    """Owns the native scheduler, and keeps what its workers use."""

    cdef native.scheduler *ptr
    cdef native.thread_pool *pool
    cdef list contexts

    def __dealloc__(self):
        if self.is_foreign():
            return
        with nogil:
            del self.ptr
            del self.pool


class _Replica:
    """A model on a device: how many contexts it has there, what they are made with, its packs."""

    def __init__(self, Model model not None, *, int n_contexts, int pack_tokens, **how):
        if not 1 <= n_contexts <= c.GGML_MAX_N_THREADS:  # each is a thread
            raise ContextError(
                f"n_contexts must be from 1 to {c.GGML_MAX_N_THREADS}, not {n_contexts}"
            )
        cdef int n_seq_max = how.pop("n_seq_max", 1)
        if model.is_causal and n_seq_max < c.llama_max_parallel_sequences():
            n_seq_max += 1  # the last one keeps what texts share
        if how.get("n_batch"):
            how["n_batch"] = max(how["n_batch"], n_seq_max)
        self.model, self.n_contexts, self.pack_tokens = model, n_contexts, pack_tokens
        self.how = {**how, "n_seq_max": n_seq_max}


cdef class Scheduler:
    """All texts of all callers of one model: a queue, and a worker thread for every context.

    Parameters
    ----------
    model : Model
        The weights.
    replicas : sequence of (Model, dict)
        The same on other devices. The dict holds what is different there: `n_contexts`,
        `pack_tokens`, and any of `how`.
    n_contexts : int
        Contexts, each with a worker.
    pack_tokens : int
        Tokens that a pack aims at.
    queue_tokens : int
        Tokens that may wait before a producer must.
    deterministic : bool
        One text a pack.
    on_pack : callable, optional
        Called with a dict for every pack; see `Llama`.
    **how
        What each `Context` is made with.
    """

    cdef _SchedulerHandle _handle
    cdef object _lock, _notifier, _watcher, __weakref__
    cdef Context _context
    cdef int64_t _queue_tokens
    cdef int _most  # tokens that a pack may have
    cdef readonly bint deterministic

    def __init__(self, Model model not None, *, replicas=(), int n_contexts, int pack_tokens,
                 int64_t queue_tokens=0, bint deterministic=False, on_pack=None, **how):
        cdef _SchedulerHandle handle = _SchedulerHandle()
        cdef Context context
        cdef int most
        base = {"n_contexts": n_contexts, "pack_tokens": pack_tokens, **how}
        places = [_Replica(model, **base), *(_Replica(one, **base | own) for one, own in replicas)]
        if queue_tokens < 0:
            raise ContextError(f"queue_tokens must not be negative, as {queue_tokens} is")
        self._lock = threading.RLock()  # a signal's handler may close what future() has locked
        self.deterministic = deterministic
        self._queue_tokens = queue_tokens
        handle.contexts = []
        wanted = []
        c.log_context_warnings(False)  # _diagnostics.py says once what llama.cpp says per context
        try:
            # In turn, so that the first free workers are those of different devices.
            for turn in range(max(place.n_contexts for place in places)):
                for place in places:
                    if turn < place.n_contexts:
                        handle.contexts.append(Context(place.model, **place.how))
                        wanted.append(place.pack_tokens)
        finally:
            c.log_context_warnings(True)
        if min(wanted) < 1:
            raise ContextError(f"pack_tokens must be at least 1, not {min(wanted)}")
        # The one that takes the shortest texts says which are too long.
        self._context = min(handle.contexts, key=lambda one: one.n_tokens_max)
        self._most = max(min(one.n_batch, one.n_ubatch) for one in handle.contexts)
        n_workers = len(handle.contexts)
        handle.ptr = new native.scheduler(self._limits(max(wanted), n_workers))
        try:
            for context, pack_tokens in zip(handle.contexts, wanted):
                # Alone, a model may be told to take larger packs later on.
                most = min(context.n_batch, context.n_ubatch)
                handle.ptr.add_worker(
                    context._handle.model.ptr, context._handle.ptr, context._params,
                    min(most, pack_tokens) if replicas else most, self._pack_texts(context))
        except RuntimeError as error:  # the system gives no more threads
            raise AllocationError(f"cannot start {n_workers} threads: {error}") from None
        # The caller's thread splits texts into tokens, helped by as many as leave no CPU idle.
        n_threads = sum(
            place.n_contexts * max(1, place.how.get("n_threads", 1)) for place in places
        )
        handle.pool = new native.thread_pool(max(0, min(n_threads, MAX_TOKENIZERS) - 1))
        self._handle = handle
        _open_schedulers.add(self)
        if on_pack is not None:
            self._watcher = threading.Thread(
                target=_watch, args=(handle, on_pack), name="llamacrab-watcher", daemon=True)
            self._watcher.start()

    cdef native.limits _limits(self, int pack_tokens, int n_contexts):
        cdef native.limits bounds
        bounds.pack_tokens = max(1, min(pack_tokens, self._most))
        # On a CPU a pack costs about as much as 120 tokens before its first token is computed.
        bounds.pack_min = min(128, bounds.pack_tokens)
        bounds.queue_tokens = self._queue_tokens or 32 * n_contexts * bounds.pack_tokens
        return bounds

    cdef int _pack_texts(self, Context context):
        """Return how many texts a context takes; a cache's last sequence is not for them."""
        if self.deterministic:
            return 1
        return context.n_seq_max - (context.has_memory and context.n_seq_max > 1)

    cdef _SchedulerHandle handle(self):
        cdef _SchedulerHandle handle
        with cython.critical_section(self):
            handle = self._handle
        if handle is None:
            raise ClosedError("the Llama is closed")
        handle.check_process("Llama")
        return handle

    def __del__(self):
        self.close()

    def close(self):
        """Stop: running packs are aborted, callers get ClosedError, and the contexts are freed."""
        cdef _SchedulerHandle handle
        with cython.critical_section(self):
            handle = self._handle
            self._handle = None
        if handle is None or handle.is_foreign():
            return
        with nogil:
            handle.ptr.close()
        with self._lock:  # future() may be starting it
            notifier = self._notifier
        for thread in (notifier, self._watcher):
            if thread is not None and thread is not threading.current_thread():
                thread.join()
        for context in handle.contexts:
            context.close()

    @property
    def closed(self):
        return self._handle is None

    @property
    def context(self):
        """One of the contexts, for its sizes."""
        return self._context

    @property
    def n_contexts(self):
        return len(self.handle().contexts)

    @property
    def pack_tokens(self):
        """Tokens that a pack aims at; may be set at any time."""
        return self.handle().ptr.get_limits().pack_tokens

    @pack_tokens.setter
    def pack_tokens(self, int value):
        cdef _SchedulerHandle handle = self.handle()
        handle.ptr.set_limits(self._limits(value, len(handle.contexts)))

    @property
    def shares_prefix(self):
        """Whether ids that texts of a job begin with are computed once for all of them.

        That is right where a text's row is that of its last token, and a token sees only those
        before it.
        """
        return (
            self._context.has_memory and self._context.is_causal and self._context.n_seq_max > 1
            and not self.deterministic
            and self._context.pooling_type in (PoolingType.LAST, PoolingType.RANK)
        )

    def job(self, Tokenization tokenization not None, int64_t n_texts, *, double norm=0,
            int width=0, bint dedup=True, bint share=True):
        """Return a `Job` for `n_texts` texts.

        Parameters
        ----------
        tokenization : Tokenization
            Makes texts into ids.
        n_texts : int
            How many texts will be added.
        norm : float
            p of the p-norm that rows are divided by; 0: none; inf: the greatest absolute value;
            -16: that, scaled to 32760.
        width : int
            Numbers of a row that are wanted, from the first; 0: all.
        dedup : bool
            Compute equal texts once.
        share : bool
            Compute what the texts begin with once, if `shares_prefix`.
        """
        return Job(self, tokenization, n_texts, norm, width, dedup, share)

    def future(self, Job job not None, finish=None, remap_error=None):
        """Return a `concurrent.futures.Future` of a job, to which all texts have been added.

        Parameters
        ----------
        job : Job
            The job.
        finish : callable, optional
            Turns the job's rows into the future's result.
        remap_error : callable, optional
            Called with a `LlamaError` before it becomes the future's exception.
        """
        cdef _SchedulerHandle handle = self.handle()
        with self._lock:
            if self._notifier is None:
                notifier = threading.Thread(
                    target=_notify, args=(handle,), name="llamacrab-notifier", daemon=True)
                notifier.start()  # one that does not start must not pass for one that has
                self._notifier = notifier
        future = _JobFuture(job, finish, remap_error)
        job._future = future
        Py_INCREF(job)  # the notifier's, until the job has ended
        cdef cbool will_be_reported
        with nogil:
            will_be_reported = handle.ptr.seal(job._job[0], <void *>job)
        if not will_be_reported:
            _resolve(job)
        return future

    def stats(self):
        """Return counts since the start, a dict; see `Llama.stats`."""
        cdef _SchedulerHandle handle = self.handle()
        cdef native.worker_stats one
        workers = []
        for one in handle.ptr.stats():
            workers.append({
                "packs": one.n_packs,
                "texts": one.n_texts,
                "tokens": one.n_tokens,
                "wait_seconds": one.wait_seconds,
                "decode_seconds": one.decode_seconds,
                "copy_seconds": one.copy_seconds,
            })
        return {
            "queued_texts": handle.ptr.queued_texts(),
            "queued_tokens": handle.ptr.queued_tokens(),
            "tokenize_seconds": handle.ptr.tokenize_seconds(),
            "workers": workers,
        }

    def recent_packs(self):
        """Return the last packs, up to 4096, a structured array; see `Llama.recent_packs`."""
        cdef _SchedulerHandle handle = self.handle()
        records = [tuple(_record(one).values()) for one in handle.ptr.recent_packs()]
        return np.array(records, dtype=[
            ("worker", np.int32), ("n_texts", np.int32), ("n_tokens", np.int32),
            ("seconds", np.float64), ("wait_seconds", np.float64),
            ("decode_seconds", np.float64), ("copy_seconds", np.float64),
            ("queued_tokens", np.int64),
        ])

    def _inject(self, str kind, int64_t after=0, int64_t times=1):
        """Make decodes fail, for tests: skip `after` of them, then fail `times`."""
        kinds = {"none": 0, "decode_error": 1, "no_memory": 2, "throws": 3, "not_finite": 4}
        cdef int value = kinds[kind]
        self.handle().ptr.inject(<native.fault_kind>value, after, times)


@cython.no_gc_clear  # workers may write into its rows until it is freed
cdef class Job:
    """One call's texts on their way through the scheduler.

    `add` texts, then `seal` and `wait`. A caller that stops early must `cancel`: the rows belong
    to the workers until then.

    Attributes
    ----------
    rows : ndarray of float32, or list of them
        Shape (n_texts, n_out), filled as texts are done; with pooling NONE a list of arrays of
        shape (n_tokens, n_out).
    done : ndarray of bool, shape (n_texts,)
        Which texts have their row.
    """

    cdef Scheduler _scheduler  # a scheduler that nobody else holds lives until its jobs end
    cdef _SchedulerHandle _handle
    cdef native.job *_job
    cdef Tokenization _tokenization
    cdef readonly object rows, done
    cdef object _future
    cdef int64_t _n_texts, _n_added
    cdef int _n_out
    cdef bint _pooled

    def __init__(self, Scheduler scheduler not None, Tokenization tokenization not None,
                 int64_t n_texts, double norm, int width, bint dedup, bint share):
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
        self._job.norm = norm
        self._job.width = self._n_out
        # A score may be zero; no text that a model understood has a vector of zeros.
        self._job.may_be_zero = scheduler._context.pooling_type == PoolingType.RANK
        self._job.dedup = dedup and not scheduler.deterministic
        if share and tokenization._common.size() >= SHARED_MIN and scheduler.shares_prefix:
            self._job.shared = tokenization._common
        cdef uint8_t[::1] done = self.done.view(np.uint8)
        if n_texts:
            self._job.done = &done[0]

    def __dealloc__(self):
        if self._job == NULL or self._handle is None or self._handle.is_foreign():
            return
        with nogil:
            # Usually over long since; else no worker may write into rows that are being freed.
            self._handle.ptr.cancel(self._job[0])
            self._handle.ptr.await_quiet(self._job[0])
            del self._job

    def add(self, list texts not None, *, bint block=True, deadline=None):
        """Encode texts and queue them, waiting for room in the queue where need be.

        Parameters
        ----------
        texts : list of str or of sequences of int
            The next texts of the job.
        block : bool
            Wait for room; else raise `QueueFull`.
        deadline : float, optional
            ``time.monotonic()`` at which to give up with `LlamaTimeoutError`.
        """
        cdef Py_ssize_t start = 0
        while start < len(texts):
            start += self._add_some(texts[start:start + TEXTS_A_CHUNK], block, deadline)

    cdef Py_ssize_t _add_some(self, list texts, bint block, deadline) except -1:
        """Encode and queue the first of `texts`, at least one; return how many."""
        cdef vector[native.source] sources
        cdef native.source one
        cdef Py_ssize_t i, size
        cdef const char *data
        cdef const int32_t[::1] ids
        cdef list kept = []
        if self._n_added + len(texts) > self._n_texts:
            raise ValueError(f"the job is for {self._n_texts} texts")
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
                    # Not the UTF-8 that the str would keep beside itself as long as it lives.
                    text = _utf8(text)
                    data = text
                    size = len(text)
            kept.append(text)
            one.bytes = native.string_view(data, size)
            sources.push_back(one)

        cdef native.tokenized found
        cdef size_t budget = max(self._handle.ptr.get_limits().queue_tokens // 4, 1)
        started = time.perf_counter()
        with nogil:
            found = native.tokenize_texts(
                self._tokenization._native, sources, budget, self._handle.pool[0])
        self._handle.ptr.add_tokenize_seconds(time.perf_counter() - started)
        cdef Py_ssize_t n_texts = found.ends.size()
        if found.status != native.tokenize_status.ok:
            raise self._tokenization.error(found.status, found.n_tokens, self._n_added + n_texts)

        cdef unique_ptr[native.chunk] texts_in
        cdef native.chunk *chunk = new native.chunk()
        texts_in.reset(chunk)
        chunk.tokens.swap(found.tokens)
        chunk.items.resize(n_texts)
        for i in range(n_texts):
            chunk.items[i].owner = self._job
            chunk.items[i].index = self._n_added + i
            chunk.items[i].first = found.ends[i - 1] if i else 0
            chunk.items[i].n_tokens = <int32_t>(found.ends[i] - chunk.items[i].first)
        self._place_rows(chunk)
        cdef int64_t n_tokens = chunk.tokens.size()
        self._await_room(n_tokens, block, deadline)
        cdef cbool admitted
        with nogil:
            admitted = self._handle.ptr.admit(self._job[0], move(texts_in))
        if not admitted:
            self._raise_failure()
        self._n_added += n_texts
        return n_texts

    cdef int _await_room(self, int64_t n_tokens, bint block, deadline) except -1:
        """Wait for room for `n_tokens` tokens; calls get their room in the order they come."""
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
            self._handle.ptr.give_up_place(self._job[0])  # others may fit now
            raise
        return 0

    cdef int _place_rows(self, native.chunk *chunk) except -1:
        """Give every text the place of its row."""
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
        """Sleep until something of this job has changed, a signal came, or time is up."""
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
        """Say that no more texts will come."""
        with nogil:
            self._handle.ptr.seal(self._job[0], NULL)

    def wait(self, *, deadline=None, progress=None):
        """Wait until all texts are done and return `rows`.

        Parameters
        ----------
        deadline : float, optional
            ``time.monotonic()`` at which to give up with `LlamaTimeoutError`.
        progress : callable, optional
            Called with the number of texts done, now and then.
        """
        self._job.watched = progress is not None
        while not self._handle.ptr.finished(self._job[0]):
            self._sleep(deadline)
            if progress is not None:
                progress(self.n_done)
        self._raise_failure()
        return self.rows

    def cancel(self, *, bint wait=True):
        """Stop: what waits is dropped, and a pack that nobody else needs is aborted.

        Parameters
        ----------
        wait : bool
            Return only when no worker writes into `rows` any more.
        """
        if self._handle.is_foreign():
            return
        with nogil:
            self._handle.ptr.cancel(self._job[0])
            if wait:
                self._handle.ptr.await_quiet(self._job[0])

    @property
    def n_added(self):
        """Texts queued so far; where `add` raised `QueueFull`, those after them are not."""
        return self._n_added

    @property
    def n_done(self):
        """Texts that have their row."""
        return self._handle.ptr.n_done(self._job[0])

    cdef int _raise_failure(self) except -1:
        cdef native.failure what = self._handle.ptr.failure_of(self._job[0])
        message = what.message.decode("utf-8", "replace") or "llama.cpp gave no reason"
        error = None
        if what.kind == native.failure_kind.decode:
            error = DecodeError(what.code, f"{message} (text {what.index})")
        elif what.kind == native.failure_kind.no_memory:
            error = AllocationError(f"not enough memory to compute text {what.index}")
        elif what.kind == native.failure_kind.numerical:
            error = NumericalError(what.index, message)
        elif what.kind == native.failure_kind.thrown:
            error = DecodeError(-3, f"{message} (text {what.index})")
        elif what.kind == native.failure_kind.closed:
            error = ClosedError("the Llama was closed")
        elif what.kind == native.failure_kind.cancelled:
            error = CancelledError("the job was cancelled")
        if error is None:
            return 0
        if not isinstance(error, (ClosedError, CancelledError)):
            error.index = what.index
        raise error


class _JobFuture(concurrent.futures.Future):
    """A future whose `cancel` reaches the scheduler, also while the job runs."""

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
        """Return an error that speaks of the caller's texts; whatever happens, an error."""
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
        """Take over what the job came to, on the notifier's thread."""
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
    """Resolve futures as their jobs end; the workers themselves never touch Python."""
    cdef void *ended
    while True:
        with nogil:
            ended = handle.ptr.next_finished()
        if ended == NULL:
            return
        _resolve(<Job>ended)


cdef int _resolve(Job job) except -1:
    """Resolve the future of a job that has ended."""
    Py_DECREF(job)
    future = job._future
    job._future = None
    future._end(job)
    return 0


cdef dict _record(native.pack_record one):
    return {
        "worker": one.worker,
        "n_texts": one.n_texts,
        "n_tokens": one.n_tokens,
        "seconds": one.seconds,
        "wait_seconds": one.wait_seconds,
        "decode_seconds": one.decode_seconds,
        "copy_seconds": one.copy_seconds,
        "queued_tokens": one.queued_tokens,
    }


def _watch(_SchedulerHandle handle, on_pack):
    """Call `on_pack` for every pack that ends; workers do not wait for it."""
    cdef int64_t n_seen = 0
    cdef vector[native.pack_record] fresh
    cdef native.pack_record one
    while True:
        with nogil:
            fresh = handle.ptr.next_packs(n_seen)
        if fresh.empty():
            return
        for one in fresh:
            try:
                on_pack(_record(one))
            except Exception:
                _logger.exception("on_pack raised; it is called for the next pack all the same")
