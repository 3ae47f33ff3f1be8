// Threads that help callers with work that can be shared out: splitting many texts into tokens.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace llamacrab {

class thread_pool {
  public:
    explicit thread_pool(size_t n_helpers) : n_helpers(n_helpers) {}
    ~thread_pool();
    thread_pool(const thread_pool &) = delete;
    thread_pool & operator=(const thread_pool &) = delete;

    // Run `work` on this thread, and at the same time on as many helpers as are free, at most
    // `n_wanted`. Returns when all have returned. `work` must not throw.
    void run(size_t n_wanted, const std::function<void()> & work);

  private:
    struct errand {
        const std::function<void()> & work;
        size_t                        n_running = 0;
    };

    void help();
    void start();  // [mutex]

    const size_t             n_helpers;
    std::mutex               mutex;
    std::condition_variable  wanted;   // helpers: there is an errand, or stop
    std::condition_variable  returned; // run: a helper has returned
    std::deque<errand *>     errands;  // [mutex] one entry for every helper that is wanted
    std::vector<std::thread> helpers;  // [mutex] started when first wanted
    bool                     stopping = false;  // [mutex]
};

}  // namespace llamacrab
