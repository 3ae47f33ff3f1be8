# The weights of a model.


class PoolingType(enum.IntEnum):
    """How the rows of a text's tokens become its row (``llama_pooling_type``)."""

    UNSPECIFIED = c.LLAMA_POOLING_TYPE_UNSPECIFIED  #: what the GGUF says, else MEAN
    NONE = c.LLAMA_POOLING_TYPE_NONE  #: no pooling: a row for every token
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
    """Return the GPU of this name; NULL for the CPU, to which nothing is offloaded."""
    cdef c.ggml_backend_dev_t device = find_device(name)
    if c.ggml_backend_dev_get_type(device) == c.GGML_BACKEND_DEVICE_TYPE_CPU:
        return NULL
    return device


cdef class _ModelHandle(_OfProcess):
    """Owns a llama_model. What needs the weights holds it, so they outlive `Model.close`."""

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
        Layers to put on GPUs, if this build has any; -1 means all.
    main_gpu : int
        The GPU that takes the whole model under ``SplitMode.NONE``.
    split_mode : SplitMode
        How several GPUs share the model.
    device : str, optional
        The one device that takes the whole model, by the name that ``llamacrab info --devices``
        shows; by default all GPUs share it.
    use_mmap : bool
        Map the file instead of reading it.
    use_mlock : bool
        Keep the weights from being swapped out.
    check_tensors : bool
        Look for NaN and infinity in the weights while loading.
    cpu_backend : str
        What computes on the CPU: ``"ggml"``, llama.cpp's own code; ``"llamacrab"``, the kernels of
        `llamacrab/kernels`; ``"int8"``, the same with products in 8 bits; ``"auto"``, what the
        environment variable ``LLAMACRAB_CPU_BACKEND`` says, else the faster of the first two.

    Raises
    ------
    DeviceError
        There is no device of this name.
    ModelNotFoundError, ModelFormatError, ModelCorruptError, UnsupportedModelError, ModelError
        See their docstrings. The message holds llama.cpp's own words.
    """

    cdef _ModelHandle _handle
    cdef Vocab _vocab
    cdef readonly str path
    cdef readonly object device  #: as given: the name of a device, or None
    cdef dict _metadata
    cdef object _made  # what pickle makes it of again
    cdef frozenset _head_tensors
    cdef readonly str cpu_backend  #: what computes: "ggml", "llamacrab" or "int8"
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
        self._head_tensors, suits, self._ffn_types = _read_header(self.path)
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
        self.cpu_backend = _choose_backend(cpu_backend, suits, has_gpu and n_gpu_layers != 0)
        self.wants_int8 = self.cpu_backend == "int8"
        cdef native.cpu_backend backend = _backend_value(self.cpu_backend)
        if self.cpu_backend != "ggml" and not has_gpu:
            # "All layers", without a GPU, makes llama.cpp put each norm on ggml's CPU code.
            params.n_gpu_layers = 0
        params.load_mode = (
            c.LLAMA_LOAD_MODE_MMAP_MLOCK if use_mmap and use_mlock else
            c.LLAMA_LOAD_MODE_MMAP if use_mmap else
            c.LLAMA_LOAD_MODE_MLOCK if use_mlock else
            c.LLAMA_LOAD_MODE_NONE
        )
        params.check_tensors = check_tensors
        cdef bytes name = os.fsencode(self.path)
        cdef const char *chars = name
        cdef _ModelHandle handle = _ModelHandle()
        c.log_take_errors()
        cdef int n_int8 = 0
        try:
            with nogil:
                handle.ptr = native.load_model(chars, params, backend, n_int8)
        except MemoryError:
            raise AllocationError(f"not enough memory to load {self.path}") from None
        PyErr_CheckSignals()  # loading may have taken long
        if handle.ptr == NULL:
            raise _load_error(self.path, _native_errors())
        if c.llama_model_has_encoder(handle.ptr) and c.llama_model_has_decoder(handle.ptr):
            raise UnsupportedModelError(
                f"{self.path} is an encoder-decoder (such as T5): it does not give one row a text. "
                "Use an encoder or a decoder model"
            )
        self._metadata = {
            _meta_string(handle, i, False): _meta_string(handle, i, True)
            for i in range(c.llama_model_meta_count(handle.ptr))
        }
        self._vocab = Vocab.of(handle, self._metadata)
        self.n_int8_matrices = n_int8
        if self.cpu_backend == "int8" and n_int8 == 0:
            self.cpu_backend = "llamacrab"  # which is what it computes as
        self._handle = handle

    cdef _ModelHandle handle(self):
        cdef _ModelHandle handle
        with cython.critical_section(self):
            handle = self._handle
        if handle is None:
            raise ClosedError("the model is closed")
        return handle

    def close(self):
        """Let go of the weights. Contexts made from this model go on working until they close."""
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
        """Pickle its file and arguments: the process that unpickles it loads it itself."""
        self.handle()
        return self._made, ()

    def __copy__(self):
        """Return itself: one model serves all who use it."""
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
        """Scalar values of the GGUF's header, as a dict of str to str."""
        self.handle()
        return dict(self._metadata)

    @property
    def arch(self):
        """``general.architecture`` of the GGUF, such as ``"bert"``."""
        return self.metadata.get("general.architecture", "")

    @property
    def desc(self):
        """One line on the architecture, size and type, in llama.cpp's words."""
        cdef char buffer[256]
        c.llama_model_desc(self.handle().ptr, buffer, sizeof(buffer))
        return buffer.decode("utf-8", "replace")

    @property
    def pooling_type(self):
        """The pooling that the GGUF asks for; UNSPECIFIED if it does not say."""
        said = self.metadata.get(f"{self.arch}.pooling_type")
        if said is None or not said.isdecimal() or int(said) > PoolingType.RANK:
            return PoolingType.UNSPECIFIED
        return PoolingType(int(said))

    @property
    def has_rank_head(self):
        """Whether the GGUF holds a classification head, which `PoolingType.RANK` needs."""
        return not self._head_tensors.isdisjoint({"cls.weight", "cls.output.weight"})

    @property
    def is_causal(self):
        """Whether a token sees only those before it, as the GGUF says."""
        return self.metadata.get(f"{self.arch}.attention.causal", "true") == "true"

    @property
    def has_pooler(self):
        """Whether the classification head has a dense layer (``cls.weight``), as BERT's has."""
        return "cls.weight" in self._head_tensors

    @property
    def has_position_table(self):
        """Whether positions are learned one by one, so that none beyond `n_ctx_train` exists."""
        return "position_embd.weight" in self._head_tensors

    @property
    def ffn_types(self):
        """Feed-forward matrices by their type, such as ``{"Q4_K": 12, "Q6_K": 6}``."""
        return dict(self._ffn_types)

    @property
    def n_ctx_train(self):
        """Tokens of the longest text that the model was trained on."""
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
        """Bytes of all weights together."""
        return c.llama_model_size(self.handle().ptr)

    @property
    def n_cls_out(self):
        """Number of scores that the rank head gives a text; 0 without a head."""
        return c.llama_model_n_cls_out(self.handle().ptr) if self.has_rank_head else 0

    @property
    def cls_labels(self):
        """Names of the rank head's scores, a list of str; empty where the GGUF has none."""
        cdef _ModelHandle handle = self.handle()
        labels = []
        cdef const char *label
        for i in range(self.n_cls_out):
            label = c.llama_model_cls_label(handle.ptr, i)
            if label == NULL:
                return []
            labels.append(label.decode("utf-8", "replace"))
        return labels

    def chat_template(self, str name=None):
        """Return the chat template called `name` (None: the default one), or None."""
        cdef _ModelHandle handle = self.handle()
        cdef bytes encoded = b"" if name is None else name.encode()
        cdef const char *chars = NULL
        if name is not None:
            chars = encoded
        cdef const char *template = c.llama_model_chat_template(handle.ptr, chars)
        return None if template == NULL else template.decode("utf-8", "replace")


cdef str _meta_string(_ModelHandle handle, int32_t i, bint value):
    """Return key or value number `i` of the header; the first call only asks for its length."""
    cdef string text
    cdef int32_t n = 0
    for _ in range(2):
        text.resize(n + 1)
        if value:
            n = c.llama_model_meta_val_str_by_index(handle.ptr, i, &text[0], text.size())
        else:
            n = c.llama_model_meta_key_by_index(handle.ptr, i, &text[0], text.size())
    text.resize(max(n, 0))
    return (<bytes>text).decode("utf-8", "replace")


CPU_BACKENDS = ("auto", "llamacrab", "ggml", "int8")


cdef str _choose_backend(wanted, bint suits, bint on_gpu):
    """Return what a model computes with: "ggml", "llamacrab" or "int8"."""
    if wanted == "auto":
        wanted = os.environ.get("LLAMACRAB_CPU_BACKEND") or "auto"
    if wanted == "auto":
        return "llamacrab" if suits and native.prefer_kernels() and not on_gpu else "ggml"
    if wanted not in CPU_BACKENDS:
        raise ModelError(f"cpu_backend must be one of {', '.join(CPU_BACKENDS)}, not {wanted!r}")
    if wanted != "ggml" and native.active_kernels() == NULL:
        raise ModelError(
            f"cpu_backend={wanted!r} needs llamacrab's own kernels, which a build with the "
            "system's libllama does not have"
        )
    return wanted


cdef bint _has_gpu():
    return any(device["type"] in ("GPU", "IGPU") for device in devices())


cdef native.cpu_backend _backend_value(str name):
    if name == "llamacrab":
        return native.cpu_backend.llamacrab
    return native.cpu_backend.int8 if name == "int8" else native.cpu_backend.ggml


cdef object _load_error(str path, str reason):
    """Turn what llama.cpp says of a failed load into the exception that a reader expects."""
    if "unknown model architecture" in reason or "cannot be used as main model" in reason:
        return UnsupportedModelError(f"{path}: {reason}")
    if "unable to allocate" in reason or "failed to allocate" in reason:
        return AllocationError(f"not enough memory to load {path}: {reason}")
    return ModelCorruptError(f"cannot load {path}: {reason}")
