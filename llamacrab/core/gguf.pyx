# The header of a GGUF, which is read before llama.cpp reads the file, and rows of its matrices.

_CONVERT_ADVICE = "`llamacrab convert {} -o model.gguf` makes a GGUF of a model from Hugging Face"


cdef str _advice_for_name(str path):
    """Return advice if `path` looks like a name "owner/model", otherwise an empty string."""
    owner, _, name = path.partition("/")
    if not owner or not name or "/" in name or os.path.isdir(owner) or name.endswith(".gguf"):
        return ""
    return (
        ": nothing is downloaded by name. Download its GGUF, or its folder: "
        + _CONVERT_ADVICE.format("FOLDER")
    )


cdef str _advice_for_folder(str path):
    """Return what to do if `path` is a folder."""
    files = sorted(os.listdir(path))
    ggufs = [name for name in files if name.endswith(".gguf")]
    if ggufs:
        first = os.path.join(path, ggufs[0])
        return f"pass {first}" + (f", the first of its {len(ggufs)} files" if ggufs[1:] else "")
    if "config.json" in files:
        return _CONVERT_ADVICE.format(path)
    return "pass the path of a GGUF file"


cdef tuple _read_header(str path):
    """Return three facts about a model that llama.h does not give.

    These are the tensors that decide how the model may be used (a rank head, a table of positions),
    why llamacrab's kernels do not suit it, and the types of its feed-forward matrices. What a model
    cannot do must be refused before llama.cpp asserts or returns something else.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise ModelNotFoundError(f"no model file at {path}{_advice_for_name(path)}") from None
    except (OSError, ValueError) as error:
        if os.path.isdir(path):  # on Windows this is a PermissionError
            raise ModelError(f"{path} is a folder: {_advice_for_folder(path)}") from None
        raise ModelError(f"cannot read {path}: {error}") from None
    if magic != b"GGUF":
        advice = f". {_CONVERT_ADVICE.format(os.path.dirname(path) or '.')}"
        raise ModelFormatError(
            f"{path} is not a GGUF: it starts with {magic!r}, not b'GGUF'"
            + advice * path.endswith((".safetensors", ".bin"))
        )
    cdef c.gguf_context *header = _open_header(path)
    try:
        if (error := _error_in(header)) is not None:
            raise ModelCorruptError(f"the header of {path} is damaged: {error}")
        names = {
            c.gguf_get_tensor_name(header, i).decode("utf-8", "replace")
            for i in range(c.gguf_get_n_tensors(header))
        }
        doubt = _doubt_about_kernels(header)
        ffn_types = _ffn_types(header)
    finally:
        c.gguf_free(header)
    head_tensors = names & {"cls.weight", "cls.output.weight", "position_embd.weight"}
    return frozenset(head_tensors), doubt, ffn_types


cdef c.gguf_context *_open_header(str path) except NULL:
    """Return the header of a GGUF, which the caller must free."""
    cdef c.gguf_init_params params
    params.no_alloc = True
    cdef bytes name = os.fsencode(path)
    cdef const char *chars = name
    cdef c.gguf_context *header
    native.log_take_errors()
    with nogil:
        header = c.gguf_init_from_file(chars, params)
    if header == NULL:
        raise ModelCorruptError(f"the header of {path} is damaged: {_native_errors()}")
    return header


cdef list _shards(str path):
    """Return the files of a model, given its first one."""
    cdef c.gguf_context *header = _open_header(path)
    cdef int64_t key
    cdef int n_shards = 1
    try:
        key = c.gguf_find_key(header, b"split.count")
        if key >= 0 and c.gguf_get_kv_type(header, key) == c.GGUF_TYPE_UINT16:
            n_shards = c.gguf_get_val_u16(header, key)
    finally:
        c.gguf_free(header)
    # llama.cpp gives shards these names (llama_split_path), and it has just loaded them.
    return [path] + [
        path.replace(f"-00001-of-{n_shards:05}", f"-{i:05}-of-{n_shards:05}")
        for i in range(2, n_shards + 1)
    ]


cdef object _read_rows(list shards, bytes name, rows, int64_t width):
    """Return rows of a matrix as float32, shape (n, width); None if the model lacks the matrix.

    They are read from the file, because llama.h gives no access to weights.
    """
    cdef c.gguf_context *header
    cdef int64_t tensor
    for path in shards:
        header = _open_header(path)
        try:
            tensor = c.gguf_find_tensor(header, name)
            if tensor >= 0:
                return _rows_of(header, path, tensor, rows, width)
        finally:
            c.gguf_free(header)
    return None


cdef object _read_bias(list shards, bytes name, rows):
    """Return values of a vector as float32, shape (n,); zeros if the model lacks the vector."""
    values = _read_rows(shards, name, rows, 1)
    return np.zeros(len(rows), np.float32) if values is None else values[:, 0].copy()


cdef object _rows_of(const c.gguf_context *header, str path, int64_t tensor, rows, int64_t width):
    """Return rows of a tensor of the file at `path`."""
    cdef c.ggml_type kind = c.gguf_get_tensor_type(header, tensor)
    cdef const c.ggml_type_traits *traits = c.ggml_get_type_traits(kind)
    if (kind != c.GGML_TYPE_F32 and traits.to_float == NULL) or width % traits.blck_size:
        raise UnsupportedModelError(
            f"cannot read rows of {width} {c.ggml_type_name(kind).decode()} values from {path}"
        )
    cdef size_t row_size = c.ggml_row_size(kind, width)
    n_rows = c.gguf_get_tensor_size(header, tensor) // row_size
    start = c.gguf_get_data_offset(header) + c.gguf_get_tensor_offset(header, tensor)
    values = np.empty((len(rows), width), dtype=np.float32)
    cdef float[:, ::1] view = values
    cdef bytes data
    cdef const char *source
    cdef Py_ssize_t i
    try:
        with open(path, "rb") as file:
            for i, row in enumerate(rows):
                if not 0 <= row < n_rows:
                    raise InputError(f"there is no row {row} among {n_rows}")
                file.seek(start + row * row_size)
                data = file.read(row_size)
                if len(data) != <Py_ssize_t>row_size:
                    raise ModelCorruptError(f"{path} ends before row {row}")
                source = data
                if kind == c.GGML_TYPE_F32:
                    memcpy(&view[i, 0], source, row_size)
                else:
                    traits.to_float(source, &view[i, 0], width)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    return values


cdef dict _ffn_types(const c.gguf_context *header):
    """Return the number of feed-forward matrices of each type."""
    counts = {}
    for i in range(c.gguf_get_n_tensors(header)):
        name = <bytes>c.gguf_get_tensor_name(header, i)
        if b".ffn_" in name and name.endswith(b".weight") and b"norm" not in name:
            kind = c.ggml_type_name(c.gguf_get_tensor_type(header, i)).decode().upper()
            counts[kind] = counts.get(kind, 0) + 1
    return counts


# Models whose graph the kernels compute completely, or except for a few small nodes.
_KERNEL_ARCHS = frozenset({
    b"bert", b"nomic-bert", b"nomic-bert-moe", b"jina-bert-v2", b"jina-bert-v3", b"modern-bert",
    b"neo-bert", b"eurobert", b"gemma-embedding", b"llama-embed", b"gemma2", b"gemma3", b"llama",
    b"qwen2", b"qwen3",
})


# Types whose products lose nothing where the CPU multiplies bf16, or less than with ggml: f32 stays
# f32, and ggml rounds the activations of q8_0 to 8 bits.
_EXACT_IN_BF16 = frozenset({c.GGML_TYPE_F32, c.GGML_TYPE_BF16, c.GGML_TYPE_Q8_0})

# Quantized weights grow when they are packed: 16 bits each. Up to this size of the matrices in the
# file that is a fair price for the speed.
cdef int64_t _MAX_EXPANDED_BYTES = 1 << 30


cdef str _doubt_about_kernels(const c.gguf_context *header):
    """Return why llamacrab's kernels are not the best choice for a model; "" if they are."""
    cdef int64_t i, key = c.gguf_find_key(header, b"general.architecture")
    cdef int64_t quantized_bytes = 0
    if key < 0 or c.gguf_get_kv_type(header, key) != c.GGUF_TYPE_STRING:
        return "the file names no architecture"
    arch = (<bytes>c.gguf_get_val_str(header, key)).decode("utf-8", "replace")
    if arch.encode() not in _KERNEL_ARCHS:
        return f"the kernels compute only a part of {arch}"
    for i in range(c.gguf_get_n_tensors(header)):
        if not c.gguf_get_tensor_name(header, i).startswith(b"blk."):
            continue
        kind = c.gguf_get_tensor_type(header, i)
        if not native.can_pack(kind):
            # ggml would compute these, and data would go back and forth.
            return f"the kernels do not multiply {c.ggml_type_name(kind).decode()}"
        if native.have_bf16() and kind not in _EXACT_IN_BF16:
            return f"the kernels would round {c.ggml_type_name(kind).decode()} to bf16"
        if kind not in (c.GGML_TYPE_F32, c.GGML_TYPE_F16, c.GGML_TYPE_BF16):
            quantized_bytes += c.gguf_get_tensor_size(header, i)
    if quantized_bytes > _MAX_EXPANDED_BYTES:
        return f"the kernels would expand {quantized_bytes / 2**30:.1f} GiB of quantized weights"
    return ""


cdef object _error_in(const c.gguf_context *header):
    """Return what in a header would make llama.cpp assert or crash, or None."""
    cdef int64_t i, key = c.gguf_find_key(header, b"general.architecture")
    cdef bytes arch = b""
    if key >= 0 and c.gguf_get_kv_type(header, key) == c.GGUF_TYPE_STRING:
        arch = c.gguf_get_val_str(header, key)
    key = c.gguf_find_key(header, arch + b".block_count")
    if key >= 0 and c.gguf_get_kv_type(header, key) == c.GGUF_TYPE_UINT32:
        n_layers = c.gguf_get_val_u32(header, key)
        if not 1 <= n_layers <= 512:  # LLAMA_MAX_LAYERS
            return f"the model has {n_layers} layers"
    if (error := _contradiction_in(header, arch)) is not None:
        return error
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
        for i in range(<int64_t>c.gguf_get_arr_n(header, key)):
            token = <bytes>c.gguf_get_arr_str(header, key, i)
            if token and token in seen:
                return f"the vocabulary has the token {token.decode('utf-8', 'replace')!r} twice"
            seen.add(token)
    for i in range(c.gguf_get_n_tensors(header)):
        if c.GGML_TYPE_I8 <= <int>c.gguf_get_tensor_type(header, i) <= c.GGML_TYPE_F64:
            name = c.gguf_get_tensor_name(header, i).decode("utf-8", "replace")
            return f"the tensor {name} has integers or doubles, which llama.cpp does not multiply"
    return None


cdef object _contradiction_in(const c.gguf_context *header, bytes arch):
    """Return which numbers would make llama.cpp assert when it computes, or None.

    Assertions that fail while it loads become exceptions without this: native/llama_guard.hpp.
    """
    cdef int64_t n_rot = _number(header, arch + b".rope.dimension_count", -1)
    cdef int64_t n_embd = _number(header, arch + b".embedding_length", 0)
    cdef int64_t n_out = _number(header, arch + b".embedding_length_out", n_embd)
    cdef int64_t n_heads = _number(header, arch + b".attention.head_count", 0)
    cdef int64_t head = _number(header, arch + b".attention.key_length", 0)
    cdef int64_t n_layers = _number(header, arch + b".block_count", 0)
    if arch == b"modern-bert":
        # If they are missing, the first is 0 and the second equals the first. A list is refused: it
        # could contain a 0, and no model of this family has one.
        for name, if_missing in ((b"head_count", 0), (b"head_count_kv", 1)):
            name = arch + b".attention." + name
            if _number(header, name, 0 if c.gguf_find_key(header, name) >= 0 else if_missing) == 0:
                return f"{name.decode()} is 0 or not a number"
    if head == 0 and n_heads > 0:
        head = n_embd // n_heads
    if n_rot != -1 and head > 0 and not (0 < n_rot <= head and n_rot % 2 == 0):
        return f"positions rotate {n_rot} of a head's {head} values"
    if n_out > n_embd and (arch == b"gemma-embedding"
                           or c.gguf_find_tensor(header, b"dense_2.weight") < 0):
        return f"rows have {n_out} values, but no matrix makes them of {n_embd}"
    # These models need layers of both kinds: a mask that no layer uses would get no memory.
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
    """Return a number of the header, or `default` if there is none."""
    cdef int64_t key = c.gguf_find_key(header, name)
    if key < 0 or c.gguf_get_kv_type(header, key) != c.GGUF_TYPE_UINT32:
        return default
    return c.gguf_get_val_u32(header, key)
