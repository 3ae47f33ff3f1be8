# Functions for the tests.


def _compare_with_ggml(str kind, dict fields):
    """Compare llamacrab's kernels with ggml's on a small graph.

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
    """Return what is wrong with the interface of the kernels to llama.cpp."""
    return (<bytes>native.complaint_about_backend()).decode()


def _check_thread_pool(list sizes):
    """Return how many items of work a thread pool handled wrongly."""
    cdef vector[int] n_threads = sizes
    cdef int n_wrong
    with nogil:
        n_wrong = native.check_thread_pool(n_threads)
    return n_wrong
