// Threads that help a caller with work that can be divided.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace llamacrab {

// Any thread may call run() or parallel_for(), several at the same time: they share the helpers. A
// call returns as soon as its work is done. It never waits for a helper that has not begun.
class thread_pool {
  public:
    // Helpers are started when they are first needed, up to `max_helpers`.
    explicit thread_pool(size_t max_helpers = SIZE_MAX) : max_helpers(max_helpers) {}
    ~thread_pool();
    thread_pool(const thread_pool &) = delete;
    thread_pool & operator=(const thread_pool &) = delete;

    // Call work(thread) on this thread, as thread 0, and at the same time on as many helpers as are
    // free, at most n_threads - 1. Return when all calls have returned. `work` must not throw.
    void run(size_t n_threads, const std::function<void(int thread)> & work);

    // Call work(item, thread) once for each item in [0, n_items), on at most n_threads threads.
    void parallel_for(int n_items, int n_threads,
                      const std::function<void(int item, int thread)> & work);

  private:
    struct task {
        const std::function<void(int)> & work;
        int n_joined = 0;   // helpers that have begun
        int n_running = 0;  // helpers that have not returned
    };

    void help();
    void start(size_t n_helpers);  // [mutex]

    const size_t max_helpers;
    std::mutex mutex;
    std::condition_variable wanted;    // helpers: there is a task, or stop
    std::condition_variable returned;  // run: a helper has returned
    std::deque<task *> tasks;          // [mutex] one entry for each helper that is wanted
    std::vector<std::thread> helpers;  // [mutex]
    bool stopping = false;             // [mutex]
};

}  // namespace llamacrab
