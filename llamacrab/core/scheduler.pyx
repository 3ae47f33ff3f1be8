# The scheduler: workers, their contexts, and statistics. native/scheduler.cpp does the work.

# Most threads that split one call's texts into tokens.
cdef int MAX_TOKENIZERS = 16

_open_schedulers = weakref.WeakSet()


@atexit.register
def _close_all():
    """Stop all workers before the interpreter and llama.cpp are taken down."""
    for scheduler in list(_open_schedulers):
        scheduler.close()


@cython.no_gc_clear  # its contexts must outlive the workers
cdef class _SchedulerHandle(_OfProcess):
    """Owns the native scheduler, and holds what its workers use."""

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
    """A model on a device, and its share of the layout.

    Attributes
    ----------
    model : Model
        The weights.
    n_contexts, pack_tokens : int
        Number of contexts, and tokens per pack.
    context_params : dict
        Keywords of each `Context`.
    """

    def __init__(self, Model model not None, *, int n_contexts, int pack_tokens, **context_params):
        if not 1 <= n_contexts <= c.GGML_MAX_N_THREADS:  # each has a thread
            raise ContextError(
                f"n_contexts must be from 1 to {c.GGML_MAX_N_THREADS}, not {n_contexts}"
            )
        cdef int n_seq_max = context_params.pop("n_seq_max", 1)
        if model.is_causal and n_seq_max < c.llama_max_parallel_sequences():
            n_seq_max += 1  # the last one is for the shared prefix
        if context_params.get("n_batch"):
            context_params["n_batch"] = max(context_params["n_batch"], n_seq_max)
        self.model, self.n_contexts, self.pack_tokens = model, n_contexts, pack_tokens
        self.context_params = {**context_params, "n_seq_max": n_seq_max}

    @property
    def n_threads(self):
        """Threads of all contexts together."""
        return self.n_contexts * max(1, self.context_params.get("n_threads", 1))


cdef tuple _make_contexts(list replicas):
    """Return the contexts of all replicas, and of each its tokens per pack and spare threads."""
    contexts, pack_tokens, spare_threads = [], [], []
    # Only rows are wanted, so decoders need no LM head. For doubters there is a way back.
    headless = os.environ.get("LLAMACRAB_HEADLESS") != "0"
    # llama.cpp gives these warnings for every context; _diagnostics.py gives them once.
    native.log_context_warnings(False)
    try:
        # In turn, so that the first idle workers are on different devices.
        for turn in range(max(replica.n_contexts for replica in replicas)):
            for replica in replicas:
                if turn < replica.n_contexts:
                    context = Context(
                        replica.model, _headless=headless, **replica.context_params)
                    # Only llamacrab's kernels take more threads than their context has.
                    lends = replica.model.cpu_backend != "ggml"
                    contexts.append(context)
                    pack_tokens.append(replica.pack_tokens)
                    spare_threads.append(context.n_threads if lends else 0)
    finally:
        native.log_context_warnings(True)
    if min(pack_tokens) < 1:
        raise ContextError(f"pack_tokens must be at least 1, not {min(pack_tokens)}")
    return contexts, pack_tokens, spare_threads


cdef class Scheduler:
    """A queue for the texts of all callers of one model, and a worker thread for each context.

    Parameters
    ----------
    model : Model
        The weights.
    replicas : sequence of (Model, dict)
        Copies of the model on other devices. The dict has what is different there: `n_contexts`,
        `pack_tokens`, and any of `context_params`.
    n_contexts : int
        Number of contexts. Each has a worker.
    pack_tokens : int
        Tokens per pack.
    queue_tokens : int
        Tokens that may wait before a producer must; 0: 32 packs per context.
    deterministic : bool
        Compute one text per pack.
    on_pack : callable, optional
        Called with a dict after every pack; see `Llama`.
    **context_params
        Keywords of each `Context`.
    """

    cdef _SchedulerHandle _handle
    cdef object _lock, _notifier, _watcher, __weakref__
    cdef Context _context
    cdef int64_t _queue_tokens
    cdef int _max_pack_tokens  # of the context that takes the largest packs
    cdef readonly bint deterministic

    def __init__(self, Model model not None, *, replicas=(), int n_contexts, int pack_tokens,
                 int64_t queue_tokens=0, bint deterministic=False, on_pack=None, **context_params):
        cdef _SchedulerHandle handle = _SchedulerHandle()
        base = {"n_contexts": n_contexts, "pack_tokens": pack_tokens, **context_params}
        all_replicas = [_Replica(model, **base)]
        all_replicas += [_Replica(copy, **base | own) for copy, own in replicas]
        if queue_tokens < 0:
            raise ContextError(f"queue_tokens must not be negative, as {queue_tokens} is")
        # A signal handler may call close() while future() holds the lock, in the same thread.
        self._lock = threading.RLock()
        self.deterministic = deterministic
        self._queue_tokens = queue_tokens
        handle.contexts, wanted_tokens, spare_threads = _make_contexts(all_replicas)
        # A text must fit into every context, so the smallest one decides which are too long.
        self._context = min(handle.contexts, key=lambda context: context.n_tokens_max)
        self._max_pack_tokens = max(
            min(context.n_batch, context.n_ubatch) for context in handle.contexts
        )
        handle.ptr = new native.scheduler(
            self._limits(max(wanted_tokens), len(handle.contexts)))
        # Without replicas, `pack_tokens` may be set to a larger value later.
        self._start_workers(handle, wanted_tokens if replicas else None, spare_threads)
        # The caller's thread splits texts into tokens, with helpers on the other CPUs.
        n_threads = sum(replica.n_threads for replica in all_replicas)
        handle.pool = new native.thread_pool(max(0, min(n_threads, MAX_TOKENIZERS) - 1))
        self._handle = handle
        _open_schedulers.add(self)
        if on_pack is not None:
            self._watcher = threading.Thread(
                target=_watch, args=(handle, on_pack), name="llamacrab-watcher", daemon=True)
            self._watcher.start()

    cdef int _start_workers(self, _SchedulerHandle handle, wanted_tokens,
                            list spare_threads) except -1:
        """Start a worker for each context, for packs of at most `wanted_tokens` if given."""
        cdef Context context
        cdef int pack_tokens
        try:
            for i, context in enumerate(handle.contexts):
                pack_tokens = min(context.n_batch, context.n_ubatch)
                if wanted_tokens is not None:
                    pack_tokens = min(pack_tokens, wanted_tokens[i])
                handle.ptr.add_worker(
                    context._handle.ptr[0], pack_tokens, self._pack_texts(context),
                    spare_threads[i])
        except RuntimeError as error:  # the system has no more threads
            raise AllocationError(
                f"cannot start {len(handle.contexts)} threads: {error}") from None
        return 0

    cdef native.limits _limits(self, int pack_tokens, int n_contexts):
        cdef native.limits bounds
        bounds.pack_tokens = max(1, min(pack_tokens, self._max_pack_tokens))
        # On a CPU the fixed cost of a pack is about that of 120 tokens.
        bounds.pack_min = min(128, bounds.pack_tokens)
        bounds.queue_tokens = self._queue_tokens or 32 * n_contexts * bounds.pack_tokens
        return bounds

    cdef int _pack_texts(self, Context context):
        """Return the texts per pack; a memory's last sequence is for the shared prefix."""
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
        """Abort running packs, raise ClosedError in all callers, and free the contexts."""
        cdef _SchedulerHandle handle
        with cython.critical_section(self):
            handle = self._handle
            self._handle = None
        if handle is None or handle.is_foreign():
            return
        with nogil:
            handle.ptr.close()
        with self._lock:  # future() may just start it
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
        """The context that takes the shortest texts, for its sizes."""
        return self._context

    @property
    def n_contexts(self):
        return len(self.handle().contexts)

    @property
    def pack_tokens(self):
        """Tokens per pack. It may be set at any time."""
        return self.handle().ptr.get_limits().pack_tokens

    @pack_tokens.setter
    def pack_tokens(self, int value):
        cdef _SchedulerHandle handle = self.handle()
        handle.ptr.set_limits(self._limits(value, len(handle.contexts)))

    @property
    def shares_prefix(self):
        """Whether a shared prefix of a job is computed once.

        That is possible if a text's row is that of its last token, and a token sees only the tokens
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
            Splits texts into token ids.
        n_texts : int
            Number of texts that will be added.
        norm : {"none", "p", "max", "int16"}
            What rows are divided by: nothing, their p-norm, their largest absolute value, or that
            value scaled to 32760.
        p : float
            The p of the p-norm, at least 1.
        width : int
            Leading numbers of a row that are wanted; 0: all.
        dedup : bool
            Compute equal texts once.
        share : bool
            Compute a shared prefix once, if `shares_prefix`.
        """
        return Job(self, tokenization, n_texts, norm, p, width, dedup, share)

    def future(self, Job job not None, finish=None, remap_error=None):
        """Return a `concurrent.futures.Future` of a job. All texts must have been added.

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
                notifier.start()
                self._notifier = notifier  # only if it could be started
        future = _JobFuture(job, finish, remap_error)
        job._future = future
        Py_INCREF(job)  # the notifier's reference, which _resolve() releases
        cdef cbool will_be_reported
        with nogil:
            will_be_reported = handle.ptr.seal(job._job[0], <void *>job)
        if not will_be_reported:
            _resolve(job)
        return future

    def stats(self):
        """Return counts since the start, as a dict; see `Llama.stats`."""
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
        """Return the last packs, up to 4096, as a structured array; see `Llama.recent_packs`."""
        cdef _SchedulerHandle handle = self.handle()
        records = [tuple(_record(one).values()) for one in handle.ptr.recent_packs()]
        return np.array(records, dtype=[
            ("worker", np.int32), ("n_texts", np.int32), ("n_tokens", np.int32),
            ("n_threads", np.int32),
            ("seconds", np.float64), ("wait_seconds", np.float64),
            ("decode_seconds", np.float64), ("copy_seconds", np.float64),
            ("queued_tokens", np.int64),
        ])

    def _inject(self, str kind, int64_t after=0, int64_t times=1):
        """For tests: make `times` decodes fail, after `after` more."""
        kinds = {
            "none": <int>native.fault_kind.none,
            "decode_error": <int>native.fault_kind.decode_error,
            "no_memory": <int>native.fault_kind.no_memory,
            "throws": <int>native.fault_kind.throws,
            "not_finite": <int>native.fault_kind.not_finite,
            "no_hidden_rows": <int>native.fault_kind.no_hidden_rows,
        }
        cdef int value = kinds[kind]
        self.handle().ptr.inject(<native.fault_kind>value, after, times)

    def _count_heads(self):
        """For tests: graphs cut off before the LM head, and how many of them computed it too.

        The latter are counted from the first call on.
        """
        cdef Context context
        cdef int64_t n_headless = 0, n_heads = 0
        for context in self.handle().contexts:
            n_headless += context._handle.ptr.n_headless
            n_heads += context._handle.ptr.n_heads
            context._handle.ptr.watch_heads = True
        return n_headless, n_heads


cdef dict _record(native.pack_record one):
    return {
        "worker": one.worker,
        "n_texts": one.n_texts,
        "n_tokens": one.n_tokens,
        "n_threads": one.n_threads,
        "seconds": one.seconds,
        "wait_seconds": one.wait_seconds,
        "decode_seconds": one.decode_seconds,
        "copy_seconds": one.copy_seconds,
        "queued_tokens": one.queued_tokens,
    }


def _watch(_SchedulerHandle handle, on_pack):
    """Call `on_pack` after every pack, on a thread of its own: workers do not wait for it."""
    cdef int64_t n_seen = 0
    cdef vector[native.pack_record] new_packs
    cdef native.pack_record one
    while True:
        with nogil:
            new_packs = handle.ptr.next_packs(n_seen)
        if new_packs.empty():
            return
        for one in new_packs:
            try:
                on_pack(_record(one))
            except Exception:
                _logger.exception("on_pack raised; it will be called for the next pack too")
