# llama.cpp's log -> the Python logger "llamacrab". The native half is native/log.hpp.

_logger = logging.getLogger("llamacrab")
# Quiet by default: lines show only where the application has set up logging.
_logger.addHandler(logging.NullHandler())

# llama.cpp's INFO is over a hundred lines for each model: what it read, tensor by tensor.
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
        _thread.interrupt_main()  # raised again where it can unwind
    except BaseException:
        # A handler that raises must not unwind through C++, nor be asked to log that it did.
        pass


def sync_log_level():
    """Tell the native side which lines the logger ``llamacrab`` wants now.

    Lines below its level are dropped without the GIL. Called whenever a model or a context is made;
    call it yourself after changing the level in between.
    """
    for native, level in _LOG_LEVELS.items():
        if _logger.isEnabledFor(level):
            c.log_set_threshold(native)
            return
    _close_log()


@atexit.register
def _close_log():
    # Also at interpreter exit: from then on no native thread may ask for the GIL.
    c.log_set_threshold(c.GGML_LOG_LEVEL_ERROR + 1)


cdef str _native_errors():
    """Return what llama.cpp has said of its errors on this thread, and forget it."""
    return c.log_take_errors().decode("utf-8", "replace") or "llama.cpp gave no reason"
