#include "team.hpp"

#include <system_error>

namespace llamacrab::kernels {

void team::share(int n_threads, int n_items, const std::function<void(int, int)> & work) {
    if (n_threads < 2 || n_items < 2) {
        for (int i = 0; i < n_items; i++) {
            work(i, 0);
        }
        return;
    }
    if ((int) threads.size() != n_threads - 1) {
        dismiss();
        stop = false;
        try {
            while ((int) threads.size() < n_threads - 1) {
                threads.emplace_back(
                    [this, n = (int) threads.size() + 1, now = round] { serve(n, now); });
            }
        } catch (const std::system_error &) {
            // The system gives no more: those that there are share the work.
        }
    }
    {
        const std::lock_guard<std::mutex> lock(mutex);
        job = &work;
        items = n_items;
        busy = (int) threads.size();
        next.store(0, std::memory_order_relaxed);
        round++;
    }
    wake.notify_all();
    take(work, 0);
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [this] { return busy == 0; });
}

void team::take(const std::function<void(int, int)> & work, int thread) {
    for (int i = next.fetch_add(1); i < items; i = next.fetch_add(1)) {
        work(i, thread);
    }
}

void team::serve(int thread, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
        wake.wait(lock, [&] { return stop || round != seen; });
        if (stop) {
            return;
        }
        seen = round;
        const auto & work = *job;
        lock.unlock();
        take(work, thread);
        lock.lock();
        if (--busy == 0) {
            done.notify_one();
        }
    }
}

void team::dismiss() {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        stop = true;
    }
    wake.notify_all();
    for (auto & thread : threads) {
        thread.join();
    }
    threads.clear();
}

}  // namespace llamacrab::kernels
