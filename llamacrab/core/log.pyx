# llama.cpp's log goes to the Python logger "llamacrab". The native part is native/log.hpp.

_logger = logging.getLogger("llamacrab")
# Lines are shown only if the application has configured logging.
_logger.addHandler(logging.NullHandler())

# llama.cpp's INFO becomes DEBUG: it is over a hundred lines per model, about each tensor.
_LOG_LEVELS = {
    c.GGML_LOG_LEVEL_DEBUG: logging.DEBUG,
    c.GGML_LOG_LEVEL_INFO: logging.DEBUG,
    c.GGML_LOG_LEVEL_WARN: logging.WARNING,
    c.GGML_LOG_LEVEL_ERROR: logging.ERROR,
}


cdef void _log_sink(int level, const char *line) noexcept with gil:
    try:
        _logger.log(_LOG_LEVELS[level], "%s", line.decode("utf-8", "replace"))
    except KeyboardInterrupt:
        _thread.interrupt_main()  # raises it again in the main thread, outside of C++
    except BaseException:
        # An exception of a handler must not pass through C++. It cannot be logged either.
        pass


def sync_log_level():
    """Tell the native code the level of the logger ``llamacrab``.

    Lines below the level are dropped without the GIL. This is called when a model or a context is
    created. Call it after you have changed the level at another time.
    """
    for native_level, level in _LOG_LEVELS.items():
        if _logger.isEnabledFor(level):
            native.log_set_threshold(native_level)
            return
    _close_log()


@atexit.register
def _close_log():
    # Also at interpreter exit: after that, no native thread may take the GIL.
    native.log_set_threshold(c.GGML_LOG_LEVEL_ERROR + 1)


cdef str _native_errors():
    """Return the errors that llama.cpp has logged on this thread since the last call."""
    return native.log_take_errors().decode("utf-8", "replace") or "llama.cpp gave no reason"
