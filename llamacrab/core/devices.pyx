# What a bug report needs to know of this build and this machine.

_DEVICE_TYPES = {
    c.GGML_BACKEND_DEVICE_TYPE_CPU: "CPU",
    c.GGML_BACKEND_DEVICE_TYPE_GPU: "GPU",
    c.GGML_BACKEND_DEVICE_TYPE_IGPU: "IGPU",
    c.GGML_BACKEND_DEVICE_TYPE_ACCEL: "ACCEL",
}


def build_info():
    """Return where the llama.cpp inside comes from and how it was built, a dict of str."""
    return {
        "source": c.LLAMACRAB_LLAMA_SOURCE.decode(),
        "version": c.llama_version().decode(),
        "built_for": c.LLAMACRAB_LLAMA_VERSION.decode(),
        "commit": c.LLAMACRAB_LLAMA_COMMIT.decode(),
        "options": c.LLAMACRAB_LLAMA_OPTIONS.decode(),
    }


def system_info():
    """Return the CPU features compiled in, as llama.cpp lists them."""
    return c.llama_print_system_info().decode("utf-8", "replace").strip(" |")


def kernels():
    """Return the name of the kernels in use, such as "avx512_bf16"; None if there are none."""
    cdef const char *name = native.active_kernels()
    return None if name == NULL else name.decode()


def kernels_preferred():
    """Return whether the kernels in use are faster than ggml's, so that models use them."""
    return native.prefer_kernels()


def kernels_have_int8():
    """Return whether the kernels in use multiply 8-bit matrices, as ``cpu_backend="int8"`` asks."""
    return native.have_int8()


def _compare_with_ggml(str kind, dict fields):
    """Compare the kernels with ggml's on a small graph, for tests.

    `kind` and `fields` are those of a struct in kernels/testing/compare_with_ggml.cpp; a field is
    an int, a list of int or a str. ValueError if a field is unknown or missing.
    """
    cdef string name = kind.encode()
    cdef cppmap[string, native.field_value] values
    cdef native.field_value value
    cdef double difference
    for field, given in fields.items():
        is_word = isinstance(given, str)
        value.word = given.encode() if is_word else b""
        value.numbers = [] if is_word else given if isinstance(given, list) else [given]
        values[field.encode()] = value
    with nogil:
        difference = native.compare_with_ggml(name, values)
    return difference


def _complaint_about_backend():
    """Return what is wrong with how the kernels present themselves to llama.cpp, for tests."""
    return (<bytes>native.complaint_about_backend()).decode()


def _check_thread_pool(list sizes):
    """Return how many items of work a thread pool did wrong, for tests."""
    cdef vector[int] n_threads = sizes
    cdef int n_wrong
    with nogil:
        n_wrong = native.check_thread_pool(n_threads)
    return n_wrong


cdef c.ggml_backend_dev_t find_device(str name) except NULL:
    """Return the device that llama.cpp calls so, whatever the case."""
    cdef c.ggml_backend_dev_t device
    names = []
    for i in range(c.ggml_backend_dev_count()):
        device = c.ggml_backend_dev_get(i)
        if c.ggml_backend_dev_get_type(device) == c.GGML_BACKEND_DEVICE_TYPE_ACCEL:
            continue  # helps the CPU; no place for a model
        its_name = c.ggml_backend_dev_name(device).decode()
        if its_name.lower() == name.lower():
            return device
        names.append(its_name)
    raise DeviceError(
        f"there is no device {name!r}; this build and machine have {', '.join(names)}"
    )


def devices():
    """Return the devices that llama.cpp can use: a list of dicts.

    Keys: name, description, type ("CPU", "GPU", "IGPU" or "ACCEL"), memory_free and memory_total
    (bytes).
    """
    cdef c.ggml_backend_dev_t device
    cdef size_t free, total
    found = []
    for i in range(c.ggml_backend_dev_count()):
        device = c.ggml_backend_dev_get(i)
        free = total = 0
        c.ggml_backend_dev_memory(device, &free, &total)
        found.append({
            "name": c.ggml_backend_dev_name(device).decode(),
            "description": c.ggml_backend_dev_description(device).decode("utf-8", "replace"),
            "type": _DEVICE_TYPES.get(<int>c.ggml_backend_dev_get_type(device), "?"),
            "memory_free": free,
            "memory_total": total,
        })
    return found
