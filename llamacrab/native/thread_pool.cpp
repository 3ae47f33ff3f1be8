#include "thread_pool.hpp"

#include <algorithm>
#include <atomic>
#include <system_error>

namespace llamacrab {

thread_pool::~thread_pool() {
    {
        std::lock_guard<std::mutex> hold(mutex);
        stopping = true;
    }
    wanted.notify_all();
    for (std::thread & helper : helpers) {
        helper.join();
    }
}

void thread_pool::run(size_t n_threads, const std::function<void(int)> & work) {
    task mine{work};
    size_t n_wanted = 0;
    if (n_threads > 1) {
        std::lock_guard<std::mutex> hold(mutex);
        start(n_threads - 1);
        n_wanted = std::min(n_threads - 1, helpers.size());
        tasks.insert(tasks.end(), n_wanted, &mine);
    }
    // After the lock is released: a helper that wakes up takes it at once.
    for (size_t i = 0; i < n_wanted; i++) {
        wanted.notify_one();
    }
    work(0);
    if (n_wanted == 0) {
        return;
    }
    // The work is done: a helper that has not begun is no longer wanted.
    std::unique_lock<std::mutex> hold(mutex);
    tasks.erase(std::remove(tasks.begin(), tasks.end(), &mine), tasks.end());
    returned.wait(hold, [&] { return mine.n_running == 0; });
}

void thread_pool::parallel_for(int n_items, int n_threads,
                               const std::function<void(int, int)> & work) {
    std::atomic<int> next{0};
    run((size_t) std::max(1, std::min(n_threads, n_items)), [&](int thread) {
        for (int i = next.fetch_add(1); i < n_items; i = next.fetch_add(1)) {
            work(i, thread);
        }
    });
}

void thread_pool::start(size_t n_helpers) {
    try {
        while (helpers.size() < std::min(n_helpers, max_helpers)) {
            helpers.emplace_back([this] { help(); });
        }
    } catch (const std::system_error &) {
        // The system has no more threads: fewer will do.
    }
}

void thread_pool::help() {
    std::unique_lock<std::mutex> hold(mutex);
    for (;;) {
        wanted.wait(hold, [&] { return stopping || !tasks.empty(); });
        if (stopping) {
            return;
        }
        task & mine = *tasks.front();
        tasks.pop_front();
        const int thread = ++mine.n_joined;
        mine.n_running += 1;
        hold.unlock();
        mine.work(thread);
        hold.lock();
        if (--mine.n_running == 0) {
            returned.notify_all();
        }
    }
}

}  // namespace llamacrab
