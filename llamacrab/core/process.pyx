# Native objects belong to the process that made them.

cdef extern from *:
    """
    #ifdef _WIN32
    #include <process.h>
    #define llamacrab_getpid _getpid
    #else
    #include <unistd.h>
    #define llamacrab_getpid getpid
    #endif
    """
    int llamacrab_getpid() nogil


cdef class _OfProcess:
    """Knows the process that made it: a forked child inherits the memory, but not the threads.

    There, an owner of native memory must neither use what it owns, as it would wait for threads
    that do not exist, nor free it.
    """

    cdef int pid

    def __cinit__(self):
        self.pid = llamacrab_getpid()

    cdef bint is_foreign(self) noexcept:
        """Return whether this is another process, a child of the one that made it."""
        return self.pid != llamacrab_getpid()

    cdef int check_process(self, str what) except -1:
        if self.is_foreign():
            raise ForkError(
                f"this {what} was made in process {self.pid}, and its threads do not exist in "
                "this child: make a new one after the fork, or start processes with 'spawn'"
            )
        return 0
