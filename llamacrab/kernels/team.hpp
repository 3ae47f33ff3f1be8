// Threads that share a step of a graph.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace llamacrab::kernels {

class team {
  public:
    ~team() { dismiss(); }

    // Call work(item, thread) for each item in [0, n_items), on up to n_threads threads, this one
    // among them. Work must not throw.
    void share(int n_threads, int n_items, const std::function<void(int, int)> & work);

  private:
    // Take part in every round after `seen`.
    void serve(int thread, uint64_t seen);
    void take(const std::function<void(int, int)> & work, int thread);
    void dismiss();

    std::vector<std::thread> threads;
    std::mutex mutex;
    std::condition_variable wake, done;
    const std::function<void(int, int)> * job = nullptr;  // [mutex]
    int items = 0;                                        // [mutex]
    uint64_t round = 0;                                   // [mutex]
    int busy = 0;                                         // [mutex]
    bool stop = false;                                    // [mutex]
    std::atomic<int> next{0};
};

}  // namespace llamacrab::kernels
