# The scheduler's Python face. The work is done by native/scheduler.cpp.

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
                    context._handle.ptr[0],
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

    def job(self, Tokenization tokenization not None, int64_t n_texts, *,
            str norm="none", double p=2, int width=0, bint dedup=True, bint share=True):
        """Return a `Job` for `n_texts` texts.

        Parameters
        ----------
        tokenization : Tokenization
            Makes texts into ids.
        n_texts : int
            How many texts will be added.
        norm : {"none", "p", "max", "int16"}
            What rows are divided by: nothing, their p-norm, their largest absolute value, or that
            value scaled to 32760.
        p : float
            The p of the p-norm, at least 1.
        width : int
            Numbers of a row that are wanted, from the first; 0: all.
        dedup : bool
            Compute equal texts once.
        share : bool
            Compute what the texts begin with once, if `shares_prefix`.
        """
        return Job(self, tokenization, n_texts, norm, p, width, dedup, share)

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
