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
    """Owns a llama_model. Whoever needs the weights holds it, so they outlive `Model.close`."""

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
    cdef frozenset _head_tensors
    cdef readonly str cpu_backend  #: "ggml", "llamacrab" or "int8"

    def __init__(self, path, *, int n_gpu_layers=-1, int main_gpu=0, split_mode=SplitMode.LAYER,
                 device=None, bint use_mmap=True, bint use_mlock=False, bint check_tensors=False,
                 cpu_backend="auto"):
        self.path = os.fspath(path)
        sync_log_level()
        self._head_tensors, suits = _read_header(self.path)
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
        try:
            with nogil:
                handle.ptr = native.load_model(chars, params, backend)
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


cdef tuple _read_header(str path):
    """Return the tensors that shape how a model may be used, and whether our kernels suit it.

    llama.h does not tell whether a model has a rank head or a table of positions, and both decide
    what must be refused before llama.cpp asserts or returns something else.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise ModelNotFoundError(f"no model file at {path}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if magic != b"GGUF":
        raise ModelFormatError(f"{path} is not a GGUF: it starts with {magic!r}, not b'GGUF'")
    cdef c.gguf_init_params params
    params.no_alloc = True
    cdef bytes name = os.fsencode(path)
    cdef const char *chars = name
    cdef c.gguf_context *header
    c.log_take_errors()
    with nogil:
        header = c.gguf_init_from_file(chars, params)
    if header == NULL:
        raise ModelCorruptError(f"the header of {path} is damaged: {_native_errors()}")
    try:
        if (fault := _fault_in(header)) is not None:
            raise ModelCorruptError(f"the header of {path} is damaged: {fault}")
        names = {
            c.gguf_get_tensor_name(header, i).decode("utf-8", "replace")
            for i in range(c.gguf_get_n_tensors(header))
        }
        suits = _suits_kernels(header)
    finally:
        c.gguf_free(header)
    return frozenset(names & {"cls.weight", "cls.output.weight", "position_embd.weight"}), suits


# Encoders, whose whole graph the kernels take, or all but a few small nodes of it.
_KERNEL_ARCHS = frozenset({
    b"bert", b"nomic-bert", b"nomic-bert-moe", b"jina-bert-v2", b"jina-bert-v3", b"modern-bert",
    b"neo-bert", b"eurobert",
})


cdef bint _suits_kernels(const c.gguf_context *header):
    """Return whether our kernels are faster for a model, and lose nothing of its weights.

    Those of f16 would be rounded to bf16; other types stay with ggml's code, and split the graph.
    """
    cdef int64_t i, key = c.gguf_find_key(header, b"general.architecture")
    if key < 0 or c.gguf_get_kv_type(header, key) != c.GGUF_TYPE_STRING:
        return False
    if c.gguf_get_val_str(header, key) not in _KERNEL_ARCHS:
        return False
    for i in range(c.gguf_get_n_tensors(header)):
        kind = c.gguf_get_tensor_type(header, i)
        if (c.gguf_get_tensor_name(header, i).startswith(b"blk.")
                and kind not in (c.GGML_TYPE_F32, c.GGML_TYPE_BF16, c.GGML_TYPE_Q8_0)):
            return False
    return True


CPU_BACKENDS = ("auto", "llamacrab", "ggml", "int8")


cdef str _choose_backend(wanted, bint suits, bint on_gpu):
    """Return what a model computes with: "ggml", "llamacrab" or "int8"."""
    if wanted == "auto":
        wanted = os.environ.get("LLAMACRAB_CPU_BACKEND") or "auto"
    if wanted == "auto":
        return "llamacrab" if suits and native.kernels_worthwhile() and not on_gpu else "ggml"
    if wanted not in CPU_BACKENDS:
        raise ModelError(f"cpu_backend must be one of {', '.join(CPU_BACKENDS)}, not {wanted!r}")
    if wanted != "ggml" and native.kernels_name() == NULL:
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


cdef object _fault_in(const c.gguf_context *header):
    """Return what is wrong in a header that llama.cpp would assert on or crash with, or None."""
    cdef int64_t i, key = c.gguf_find_key(header, b"general.architecture")
    cdef bytes arch = b""
    if key >= 0 and c.gguf_get_kv_type(header, key) == c.GGUF_TYPE_STRING:
        arch = c.gguf_get_val_str(header, key)
    key = c.gguf_find_key(header, arch + b".block_count")
    if key >= 0 and c.gguf_get_kv_type(header, key) == c.GGUF_TYPE_UINT32:
        n_layers = c.gguf_get_val_u32(header, key)
        if not 1 <= n_layers <= 512:  # LLAMA_MAX_LAYERS
            return f"it says that the model has {n_layers} layers"
    if (fault := _contradiction_in(header, arch)) is not None:
        return fault
    for name in (b"layer_norm_epsilon", b"layer_norm_rms_epsilon"):
        key = c.gguf_find_key(header, arch + b".attention." + name)
        if key >= 0 and c.gguf_get_kv_type(header, key) == c.GGUF_TYPE_FLOAT32:
            epsilon = c.gguf_get_val_f32(header, key)
            if not epsilon >= 0:
                return f"{name.decode()} is {epsilon}"
    key = c.gguf_find_key(header, b"tokenizer.ggml.tokens")
    if (key >= 0 and c.gguf_get_kv_type(header, key) == c.GGUF_TYPE_ARRAY
            and c.gguf_get_arr_type(header, key) == c.GGUF_TYPE_STRING):
        seen = set()
        for i in range(c.gguf_get_arr_n(header, key)):
            token = <bytes>c.gguf_get_arr_str(header, key, i)
            if token and token in seen:
                return f"the vocabulary holds the token {token.decode('utf-8', 'replace')!r} twice"
            seen.add(token)
    for i in range(c.gguf_get_n_tensors(header)):
        if c.GGML_TYPE_I8 <= <int>c.gguf_get_tensor_type(header, i) <= c.GGML_TYPE_F64:
            name = c.gguf_get_tensor_name(header, i).decode("utf-8", "replace")
            return f"the tensor {name} holds integers or doubles, which llama.cpp does not multiply"
    return None


cdef object _contradiction_in(const c.gguf_context *header, bytes arch):
    """Return which numbers llama.cpp would assert on once it computes, or None.

    Those that it asserts on earlier become exceptions by themselves: native/llama_guard.hpp.
    """
    cdef int64_t n_rot = _number(header, arch + b".rope.dimension_count", -1)
    cdef int64_t n_embd = _number(header, arch + b".embedding_length", 0)
    cdef int64_t n_out = _number(header, arch + b".embedding_length_out", n_embd)
    cdef int64_t n_heads = _number(header, arch + b".attention.head_count", 0)
    cdef int64_t head = _number(header, arch + b".attention.key_length", 0)
    cdef int64_t n_layers = _number(header, arch + b".block_count", 0)
    if arch == b"modern-bert":
        # Unsaid, the first is 0 and the second the first. A list could hold a 0 anywhere, and no
        # model of this family has one.
        for name, unsaid in ((b"head_count", 0), (b"head_count_kv", 1)):
            name = arch + b".attention." + name
            if _number(header, name, 0 if c.gguf_find_key(header, name) >= 0 else unsaid) == 0:
                return f"{name.decode()} is 0 or no number"
    if head == 0 and n_heads > 0:
        head = n_embd // n_heads
    if n_rot != -1 and head > 0 and not (0 < n_rot <= head and n_rot % 2 == 0):
        return f"positions rotate {n_rot} of a head's {head} values"
    if n_out > n_embd and (arch == b"gemma-embedding"
                           or c.gguf_find_tensor(header, b"dense_2.weight") < 0):
        return f"rows have {n_out} values, but no matrix makes them of {n_embd}"
    # Both need layers of two kinds, as the mask of one that no layer uses gets no memory.
    cdef int64_t every = 1
    if arch == b"gemma-embedding":
        every = _number(header, arch + b".attention.sliding_window_pattern", 6)
    elif arch == b"modern-bert" and _number(header, arch + b".attention.sliding_window", 0) > 0:
        every = min(2, _number(header, arch + b".attention.sliding_window_pattern", 3))
    else:
        return None
    if not 2 <= every <= n_layers:
        return f"of {n_layers} layers, all or none look at a window only"
    return None


cdef int64_t _number(const c.gguf_context *header, bytes name, int64_t default):
    """Return a number of the header, `default` where there is none."""
    cdef int64_t key = c.gguf_find_key(header, name)
    if key < 0 or c.gguf_get_kv_type(header, key) != c.GGUF_TYPE_UINT32:
        return default
    return c.gguf_get_val_u32(header, key)


cdef object _load_error(str path, str reason):
    """Turn what llama.cpp says of a failed load into the exception that a reader expects."""
    if "unknown model architecture" in reason or "cannot be used as main model" in reason:
        return UnsupportedModelError(f"{path}: {reason}")
    if "unable to allocate" in reason or "failed to allocate" in reason:
        return AllocationError(f"not enough memory to load {path}: {reason}")
    return ModelCorruptError(f"cannot load {path}: {reason}")
