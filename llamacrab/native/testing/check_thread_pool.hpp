// For tests: does a thread pool do all of its work, once?
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "../thread_pool.hpp"

namespace llamacrab {

// Two callers divide work with one pool, again and again, each time with a number of threads out of
// `sizes`. Return how many items were not done exactly once, or on a thread out of range.
inline int check_thread_pool(const std::vector<int> & sizes) {
    thread_pool pool;
    std::vector<int> wrong(2);
    const auto call = [&](int caller) {
        for (int round = 0; round < 200; round++) {
            for (const int size : sizes) {
                std::vector<int> done(round % 9);
                pool.parallel_for((int) done.size(), size, [&](int i, int thread) {
                    done[i] += thread >= 0 && thread < std::max(size, 1) ? 1 : 2;
                });
                wrong[caller] +=
                    std::count_if(done.begin(), done.end(), [](int n) { return n != 1; });
            }
        }
    };
    std::thread other(call, 1);
    call(0);
    other.join();
    return wrong[0] + wrong[1];
}

}  // namespace llamacrab
