# Native objects belong to the process that created them.

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
    """Stores the process that created it.

    A forked child inherits the memory, but not the threads. So in a child, an owner of native
    memory must not use it, as it would wait for threads that do not exist, and must not free it.
    """

    cdef int pid

    def __cinit__(self):
        self.pid = llamacrab_getpid()

    cdef bint is_foreign(self) noexcept:
        """Return whether this process is a child of the one that created it."""
        return self.pid != llamacrab_getpid()

    cdef int check_process(self, str what) except -1:
        if self.is_foreign():
            raise ForkError(
                f"this {what} was made in process {self.pid}, and its threads do not exist in "
                "this child: make a new one after the fork, or start processes with 'spawn'"
            )
        return 0
