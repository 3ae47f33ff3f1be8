# How this build was made, and which kernels it has.


def build_info():
    """Return where llama.cpp comes from and how it was built, as a dict of str."""
    return {
        "source": c.LLAMACRAB_LLAMA_SOURCE.decode(),
        "version": c.llama_version().decode(),
        "built_for": c.LLAMACRAB_LLAMA_VERSION.decode(),
        "commit": c.LLAMACRAB_LLAMA_COMMIT.decode(),
        "options": c.LLAMACRAB_LLAMA_OPTIONS.decode(),
    }


def system_info():
    """Return the CPU features that llama.cpp was compiled for, as it lists them."""
    return c.llama_print_system_info().decode("utf-8", "replace").strip(" |")


def kernels():
    """Return the name of the kernel set in use, such as "avx512_bf16", or None."""
    cdef const char *name = native.active_kernels()
    return None if name == NULL else name.decode()


def kernels_have_bf16():
    """Return whether the kernel set multiplies bf16, and so rounds other types but f32 to it."""
    return native.have_bf16()


def kernels_have_int8():
    """Return whether the kernel set can multiply in 8 bits, for ``cpu_backend="int8"``."""
    return native.have_int8()
