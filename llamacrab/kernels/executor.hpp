// Runs the plan of a graph: owns the memory of the slots and the threads, and calls ops.cpp.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "../native/thread_pool.hpp"
#include "fusion.hpp"
#include "ggml-backend.h"
#include "ops.hpp"

namespace llamacrab::kernels {

class executor {
  public:
    ggml_status run(const ggml_cgraph * graph);
    void set_n_threads(int n) { n_threads = n < 1 ? 1 : n; }
    void set_abort(ggml_abort_callback callback, void * data) {
        abort = callback;
        abort_data = data;
    }

  private:
    using row_op = void (*)(const step &, const step_data &, int row0, int row1);

    int max_threads() const;
    void run_step(const step & s);
    void run_rows(const step & s, row_op op);

    step_data data_of(const step & s);
    const void * operand_data(const operand & from, data_type type) const;
    char * slot_data(int slot) const;
    const std::vector<segment> & segments_of(const ggml_tensor * attention);
    const float * angles_of(const ggml_tensor * rope);

    int n_threads = 1;
    ggml_abort_callback abort = nullptr;
    void * abort_data = nullptr;
    plan current;
    aligned_memory arena, scratch;
    thread_pool threads;
    std::vector<std::pair<const ggml_tensor *, std::vector<segment>>> known_masks;
    std::vector<std::pair<const ggml_tensor *, std::vector<float>>> known_angles;
};

}  // namespace llamacrab::kernels
