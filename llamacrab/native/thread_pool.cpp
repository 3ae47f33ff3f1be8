#include "thread_pool.hpp"

#include <algorithm>
#include <system_error>

namespace llamacrab {

thread_pool::~thread_pool() {
    {
        std::lock_guard<std::mutex> hold(mutex);
        stopping = true;
        wanted.notify_all();
    }
    for (std::thread & helper : helpers) {
        helper.join();
    }
}

void thread_pool::run(size_t n_wanted, const std::function<void()> & work) {
    errand mine{work};
    {
        std::lock_guard<std::mutex> hold(mutex);
        start();
        errands.insert(errands.end(), std::min(n_wanted, helpers.size()), &mine);
        wanted.notify_all();
    }
    work();
    // Nobody waits for a helper that has not come: all is done by now.
    std::unique_lock<std::mutex> hold(mutex);
    errands.erase(std::remove(errands.begin(), errands.end(), &mine), errands.end());
    returned.wait(hold, [&] { return mine.n_running == 0; });
}

void thread_pool::start() {
    try {
        while (helpers.size() < n_helpers) {
            helpers.emplace_back([this] { help(); });
        }
    } catch (const std::system_error &) {
        // The system gives no more threads: fewer will do.
    }
}

void thread_pool::help() {
    std::unique_lock<std::mutex> hold(mutex);
    for (;;) {
        wanted.wait(hold, [&] { return stopping || !errands.empty(); });
        if (stopping) {
            return;
        }
        errand & theirs = *errands.front();
        errands.pop_front();
        theirs.n_running += 1;
        hold.unlock();
        theirs.work();
        hold.lock();
        theirs.n_running -= 1;
        returned.notify_all();
    }
}

}  // namespace llamacrab
