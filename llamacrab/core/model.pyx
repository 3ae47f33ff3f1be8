# The weights of a model.


class PoolingType(enum.IntEnum):
    """How the rows of a text's tokens become its row (``llama_pooling_type``)."""

    UNSPECIFIED = c.LLAMA_POOLING_TYPE_UNSPECIFIED  #: what the GGUF says, otherwise MEAN
    NONE = c.LLAMA_POOLING_TYPE_NONE  #: no pooling: one row per token
    MEAN = c.LLAMA_POOLING_TYPE_MEAN  #: the mean over the tokens
    CLS = c.LLAMA_POOLING_TYPE_CLS  #: the first token
    LAST = c.LLAMA_POOLING_TYPE_LAST  #: the last token
    RANK = c.LLAMA_POOLING_TYPE_RANK  #: the scores of the classification head

    @classmethod
    def _missing_(cls, value):
        """Take a name in any case, such as ``"mean"``."""
        if isinstance(value, str) and value.upper() in cls.__members__:
            return cls[value.upper()]
        names = ", ".join(f"'{name.lower()}'" for name in cls.__members__)
        raise PoolingError(f"pooling_type must be a PoolingType or one of {names}, not {value!r}")


class SplitMode(enum.IntEnum):
    """How a model is spread over several GPUs (``llama_split_mode``)."""

    NONE = c.LLAMA_SPLIT_MODE_NONE
    LAYER = c.LLAMA_SPLIT_MODE_LAYER
    ROW = c.LLAMA_SPLIT_MODE_ROW


cdef c.ggml_backend_dev_t _offloading_device(str name) except? NULL:
    """Return the GPU with this name, or NULL for the CPU."""
    cdef c.ggml_backend_dev_t device = find_device(name)
    if c.ggml_backend_dev_get_type(device) == c.GGML_BACKEND_DEVICE_TYPE_CPU:
        return NULL
    return device


cdef class _ModelHandle(_OfProcess):
    """Owns a llama_model. Objects that need the weights hold it, also after `Model.close`."""

    cdef c.llama_model *ptr

    def __dealloc__(self):
        if self.ptr != NULL and not self.is_foreign():
            c.llama_model_free(self.ptr)


cdef class Model:
    """The weights and the vocabulary of a GGUF file. Safe to share between threads.

    Parameters
    ----------
    path : str or os.PathLike
        The GGUF file.
    n_gpu_layers : int
        Number of layers to put on GPUs, if this build supports GPUs; -1: all.
    main_gpu : int
        The GPU that holds the whole model with ``SplitMode.NONE``.
    split_mode : SplitMode
        How several GPUs share the model.
    device : str, optional
        Name of the device that holds the whole model, as ``llamacrab info --devices`` shows it. By
        default, all GPUs share the model.
    use_mmap : bool
        Map the file instead of reading it.
    use_mlock : bool
        Do not let the system swap the weights out.
    check_tensors : bool
        Check the weights for NaN and infinity while loading.
    cpu_backend : str
        What computes on the CPU: ``"ggml"``, llama.cpp's own code; ``"llamacrab"``, the kernels of
        `llamacrab/kernels`; ``"int8"``, these kernels with products in 8 bits; ``"auto"``, what the
        environment variable ``LLAMACRAB_CPU_BACKEND`` says, otherwise the faster of the first two.

    Raises
    ------
    DeviceError
        There is no device of this name.
    ModelNotFoundError, ModelFormatError, ModelCorruptError, UnsupportedModelError, ModelError
        See their docstrings. The message contains llama.cpp's.
    """

    cdef _ModelHandle _handle
    cdef Vocab _vocab
    cdef readonly str path
    cdef readonly object device  #: as given: the name of a device, or None
    cdef dict _metadata
    cdef object _made  # creates an equal model, for pickle
    cdef frozenset _head_tensors
    cdef readonly str cpu_backend  #: what computes: "ggml", "llamacrab" or "int8"
    cdef readonly str cpu_backend_reason  #: why, such as "asked for"
    cdef readonly bint wants_int8  #: whether "int8" was asked for
    cdef readonly int n_int8_matrices  #: matrices in 8 bits
    cdef dict _ffn_types

    def __init__(self, path, *, int n_gpu_layers=-1, int main_gpu=0, split_mode=SplitMode.LAYER,
                 device=None, bint use_mmap=True, bint use_mlock=False, bint check_tensors=False,
                 cpu_backend="auto"):
        self.path = os.fspath(path)
        self._made = functools.partial(
            type(self), os.path.abspath(self.path), n_gpu_layers=n_gpu_layers, main_gpu=main_gpu,
            split_mode=split_mode, device=device, use_mmap=use_mmap, use_mlock=use_mlock,
            check_tensors=check_tensors, cpu_backend=cpu_backend)
        sync_log_level()
        self._head_tensors, doubt, self._ffn_types = _read_header(self.path)
        cdef c.llama_model_params params = c.llama_model_default_params()
        cdef int mode = SplitMode(split_mode)
        params.n_gpu_layers = n_gpu_layers
        params.main_gpu = main_gpu
        params.split_mode = <c.llama_split_mode>mode
        cdef c.ggml_backend_dev_t[2] chosen
        cdef bint has_gpu
        self.device = device
        if device is None:
            has_gpu = _has_gpu()
        else:
            chosen[0] = _offloading_device(device)
            chosen[1] = NULL
            params.devices = chosen
            has_gpu = chosen[0] != NULL
        on_gpu = has_gpu and n_gpu_layers != 0
        self.cpu_backend, self.cpu_backend_reason = _choose_backend(cpu_backend, doubt, on_gpu)
        self.wants_int8 = self.cpu_backend == "int8"
        if self.cpu_backend != "ggml" and not has_gpu:
            # "All layers" without a GPU would make llama.cpp compute each norm with ggml's code.
            params.n_gpu_layers = 0
        params.load_mode = _load_mode(use_mmap, use_mlock)
        params.check_tensors = check_tensors
        cdef _ModelHandle handle = self._load(params)
        if c.llama_model_has_encoder(handle.ptr) and c.llama_model_has_decoder(handle.ptr):
            raise UnsupportedModelError(
                f"{self.path} is an encoder-decoder (such as T5): it has no single row per text. "
                "Use an encoder or a decoder model"
            )
        self._metadata = {
            _meta_string(handle, i, False): _meta_string(handle, i, True)
            for i in range(c.llama_model_meta_count(handle.ptr))
        }
        self._vocab = Vocab.of(handle, self._metadata)
        if self.cpu_backend == "int8" and self.n_int8_matrices == 0:
            self.cpu_backend = "llamacrab"  # no matrix can be in 8 bits
        self._handle = handle

    cdef _ModelHandle _load(self, c.llama_model_params params):
        cdef bytes name = os.fsencode(self.path)
        cdef const char *chars = name
        cdef _ModelHandle handle = _ModelHandle()
        cdef native.cpu_backend backend = _backend_value(self.cpu_backend)
        cdef int n_int8_matrices = 0
        native.log_take_errors()
        try:
            with nogil:
                handle.ptr = native.load_model(chars, params, backend, n_int8_matrices)
        except MemoryError:
            raise AllocationError(f"not enough memory to load {self.path}") from None
        PyErr_CheckSignals()  # loading may take long
        if handle.ptr == NULL:
            raise _load_error(self.path, _native_errors())
        self.n_int8_matrices = n_int8_matrices
        return handle

    cdef _ModelHandle handle(self):
        cdef _ModelHandle handle
        with cython.critical_section(self):
            handle = self._handle
        if handle is None:
            raise ClosedError("the model is closed")
        return handle

    def close(self):
        """Release the weights. Contexts of this model keep them until they are closed too."""
        with cython.critical_section(self):
            self._handle = None

    @property
    def closed(self):
        return self._handle is None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __reduce__(self):
        """Pickle the path and the arguments. The process that unpickles loads the file."""
        self.handle()
        return self._made, ()

    def __copy__(self):
        """Return itself: a model can be shared."""
        return self

    def __deepcopy__(self, memo):
        return self

    def __repr__(self):
        return f"<Model {self.path!r}{' (closed)' if self.closed else ''}>"

    @property
    def vocab(self):
        """The vocabulary, a `Vocab`."""
        self.handle()
        return self._vocab

    @property
    def metadata(self):
        """Scalar values of the GGUF header, as a dict of str to str."""
        self.handle()
        return dict(self._metadata)

    @property
    def arch(self):
        """``general.architecture`` of the GGUF, such as ``"bert"``."""
        return self.metadata.get("general.architecture", "")

    @property
    def desc(self):
        """One line from llama.cpp about the architecture, size and type."""
        cdef char buffer[256]
        c.llama_model_desc(self.handle().ptr, buffer, sizeof(buffer))
        return buffer.decode("utf-8", "replace")

    @property
    def pooling_type(self):
        """The pooling in the GGUF; UNSPECIFIED if it has none."""
        value = self.metadata.get(f"{self.arch}.pooling_type")
        if value is None or not value.isdecimal() or int(value) > PoolingType.RANK:
            return PoolingType.UNSPECIFIED
        return PoolingType(int(value))

    @property
    def has_rank_head(self):
        """Whether the GGUF has a classification head, which `PoolingType.RANK` needs."""
        return not self._head_tensors.isdisjoint({"cls.weight", "cls.output.weight"})

    @property
    def is_causal(self):
        """Whether a token sees only the tokens before it, according to the GGUF."""
        return self.metadata.get(f"{self.arch}.attention.causal", "true") == "true"

    @property
    def has_pooler(self):
        """Whether the classification head has a dense layer (``cls.weight``), as in BERT."""
        return "cls.weight" in self._head_tensors

    @property
    def has_position_table(self):
        """Whether positions have learned embeddings, so that there are only `n_ctx_train`."""
        return "position_embd.weight" in self._head_tensors

    @property
    def ffn_types(self):
        """Number of feed-forward matrices per type, such as ``{"Q4_K": 12, "Q6_K": 6}``."""
        return dict(self._ffn_types)

    @property
    def n_ctx_train(self):
        """Number of tokens of the longest text in training."""
        return c.llama_model_n_ctx_train(self.handle().ptr)

    @property
    def n_embd(self):
        """Width of a token inside the model."""
        return c.llama_model_n_embd(self.handle().ptr)

    @property
    def n_embd_out(self):
        """Width of an embedding."""
        return c.llama_model_n_embd_out(self.handle().ptr)

    @property
    def n_layer(self):
        return c.llama_model_n_layer(self.handle().ptr)

    @property
    def n_head(self):
        return c.llama_model_n_head(self.handle().ptr)

    @property
    def n_params(self):
        """Number of weights."""
        return c.llama_model_n_params(self.handle().ptr)

    @property
    def size(self):
        """Size of all weights in bytes."""
        return c.llama_model_size(self.handle().ptr)

    @property
    def n_cls_out(self):
        """Number of scores per text of the rank head; 0 without a head."""
        return c.llama_model_n_cls_out(self.handle().ptr) if self.has_rank_head else 0

    @property
    def cls_labels(self):
        """Names of the rank head's scores, as a list of str; empty if the GGUF has none."""
        cdef _ModelHandle handle = self.handle()
        labels = []
        cdef const char *label
        for i in range(self.n_cls_out):
            label = c.llama_model_cls_label(handle.ptr, i)
            if label == NULL:
                return []
            labels.append(label.decode("utf-8", "replace"))
        return labels

    def output_rows(self, tokens):
        """Return the weights that give the logits of some tokens, read from the file.

        The logit of token i is ``weights[i] @ row + bias[i]``, where `row` is the row of the last
        token after the last norm. Some architectures scale or cap logits after that.

        Parameters
        ----------
        tokens : sequence of int
            Token ids.

        Returns
        -------
        weights : ndarray of float32, shape (n, n_embd)
            Rows of the output matrix; of the token embeddings if the model has no output matrix.
        bias : ndarray of float32, shape (n,)
            Zeros if the model has no output bias.

        Raises
        ------
        InputError
            An id is not in the vocabulary.
        UnsupportedModelError
            The model has no such matrix, or one that is scaled.
        """
        cdef const int32_t[::1] view = as_token_ids(tokens)
        self._vocab.check_ids(view)
        rows = np.asarray(view).tolist()
        cdef int64_t width = self.n_embd
        shards = _shards(self._made.args[0])  # the working directory may have changed
        if _read_rows(shards, b"output.scale", (), 1) is not None:
            raise UnsupportedModelError(f"{self.path} scales its output matrix (output.scale)")
        weights = _read_rows(shards, b"output.weight", rows, width)
        if weights is None:
            weights = _read_rows(shards, b"token_embd.weight", rows, width)
        if weights is None:
            raise UnsupportedModelError(f"{self.path} has no output matrix")
        return weights, _read_bias(shards, b"output.bias", rows)

    def rank_rows(self):
        """Return the weights of a rank head that is a single product, read from the file.

        Returns
        -------
        weights : ndarray of float32, shape (n_cls_out, n_embd)
            Rows of ``cls.output.weight``.
        bias : ndarray of float32, shape (n_cls_out,)
            Zeros if the head has no bias.

        Raises
        ------
        UnsupportedModelError
            The model has no such head, or one with a dense layer before it.
        """
        rows = range(self.n_cls_out)
        if not rows or self.has_pooler:
            raise UnsupportedModelError(f"{self.path} has no rank head that is a single product")
        shards = _shards(self._made.args[0])
        weights = _read_rows(shards, b"cls.output.weight", rows, self.n_embd)
        return weights, _read_bias(shards, b"cls.output.bias", rows)

    def chat_template(self, str name=None):
        """Return the chat template with this name, by default the main one, or None."""
        cdef _ModelHandle handle = self.handle()
        cdef bytes encoded = b"" if name is None else name.encode()
        cdef const char *chars = NULL
        if name is not None:
            chars = encoded
        cdef const char *template = c.llama_model_chat_template(handle.ptr, chars)
        return None if template == NULL else template.decode("utf-8", "replace")


cdef str _meta_string(_ModelHandle handle, int32_t i, bint value):
    """Return key or value number `i` of the header."""
    cdef string text
    cdef int32_t n = 0
    for _ in range(2):  # the first call returns the length only
        text.resize(n + 1)
        if value:
            n = c.llama_model_meta_val_str_by_index(handle.ptr, i, &text[0], text.size())
        else:
            n = c.llama_model_meta_key_by_index(handle.ptr, i, &text[0], text.size())
    text.resize(max(n, 0))
    return (<bytes>text).decode("utf-8", "replace")


CPU_BACKENDS = ("auto", "llamacrab", "ggml", "int8")


cdef tuple _choose_backend(wanted, str doubt, bint on_gpu):
    """Return what a model computes with, "ggml", "llamacrab" or "int8", and why."""
    reason = "asked for"
    if wanted == "auto" and os.environ.get("LLAMACRAB_CPU_BACKEND"):
        wanted, reason = os.environ["LLAMACRAB_CPU_BACKEND"], "LLAMACRAB_CPU_BACKEND says so"
    if wanted == "auto":
        if on_gpu:
            return "ggml", "the model is on a GPU"
        if native.active_kernels() == NULL:
            return "ggml", "this build has no kernels of llamacrab's"
        if not native.prefer_kernels():
            return "ggml", "llamacrab has no fast kernels for this CPU"
        return ("ggml", doubt) if doubt else ("llamacrab", "faster on this CPU")
    if wanted not in CPU_BACKENDS:
        raise ModelError(f"cpu_backend must be one of {', '.join(CPU_BACKENDS)}, not {wanted!r}")
    if wanted != "ggml" and native.active_kernels() == NULL:
        raise ModelError(
            f"cpu_backend={wanted!r} needs llamacrab's own kernels, which a build with the "
            "system's libllama does not have"
        )
    return wanted, reason


cdef c.llama_load_mode _load_mode(bint use_mmap, bint use_mlock):
    if use_mmap:
        return c.LLAMA_LOAD_MODE_MMAP_MLOCK if use_mlock else c.LLAMA_LOAD_MODE_MMAP
    return c.LLAMA_LOAD_MODE_MLOCK if use_mlock else c.LLAMA_LOAD_MODE_NONE


cdef bint _has_gpu():
    return any(device["type"] in ("GPU", "IGPU") for device in devices())


cdef native.cpu_backend _backend_value(str name):
    if name == "llamacrab":
        return native.cpu_backend.llamacrab
    return native.cpu_backend.int8 if name == "int8" else native.cpu_backend.ggml


cdef object _load_error(str path, str reason):
    """Return the exception for a failed load, given llama.cpp's message."""
    if "unknown model architecture" in reason or "cannot be used as main model" in reason:
        return UnsupportedModelError(f"{path}: {reason}")
    if "unable to allocate" in reason or "failed to allocate" in reason:
        return AllocationError(f"not enough memory to load {path}: {reason}")
    return ModelCorruptError(f"cannot load {path}: {reason}")
