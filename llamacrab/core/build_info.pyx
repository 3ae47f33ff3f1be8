# How this build was made, and which kernels it has.


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
