#include <Python.h>

#include "job.hpp"

#include <new>
#include <type_traits>

namespace llamacrab {

// A thread sleeps on a PyThread lock, because such a lock can be released without the GIL, and a
// signal interrupts the wait for it.
static_assert(std::is_same_v<PyThread_type_lock, void *>);

waiter::waiter() : lock(PyThread_allocate_lock()) {
    if (!lock) {
        throw std::bad_alloc();
    }
    PyThread_acquire_lock(lock, WAIT_LOCK);
}

waiter::~waiter() {
    wake();  // a lock must not be held when it is freed
    PyThread_free_lock(lock);
}

void waiter::wake() {
    if (!woken.exchange(true)) {
        PyThread_release_lock(lock);
    }
}

bool waiter::sleep(int64_t microseconds) {
    if (PyThread_acquire_lock_timed(lock, microseconds, /*intr_flag=*/1) != PY_LOCK_ACQUIRED) {
        return false;
    }
    // A call of `wake` before this line is not lost: the caller checks the state afterwards.
    woken = false;
    return true;
}

}  // namespace llamacrab
