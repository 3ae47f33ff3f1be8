// A part of a graph, computed: fusion.cpp makes steps of its nodes, executor.cpp runs them.
#pragma once

#include <memory>
#include <vector>

#include "attention_mask.hpp"
#include "ggml_backend.hpp"
#include "team.hpp"

namespace llamacrab::kernels {

constexpr int no_slot = -1;

enum class step_kind {
    linear,
    norm,
    attention,
    gate,
    binary,
    scale,
    get_rows,
    copy,
    rope,
    convert,
    gather,
    pool,
};

// Data of our own, beside the tensors: activations in the type that the next step multiplies. A
// slot is a dense copy of a whole contiguous tensor, so that a view's offset holds for both.
struct slot {
    size_t bytes = 0;
    int first = 0, last = 0;  // the steps between which it must stay
    size_t offset = 0;        // in the arena
};

// Where a step reads a matrix from: a slot, or a tensor's own data.
struct source {
    const ggml_tensor * tensor = nullptr;
    int slot = no_slot;
    ptrdiff_t shift = 0;    // elements from the slot's beginning to the tensor's
    bool gathered = false;  // the slot holds [tokens][heads][values], whatever the tensor's strides
};

// A node, and those after it that were fused into it.
struct step {
    step_kind kind;
    const ggml_tensor * node;            // the first
    const ggml_tensor * out;             // the last: what the step computes
    bool write = false;                  // whether `out` is wanted in its own memory, as float
    int bf16 = no_slot, int8 = no_slot;  // slots that it is wanted in

    source x, k, v;                   // k, v: of attention
    packing x_kind = packing::f32;    // of x, k and v
    const ggml_tensor * w = nullptr;  // linear
    const ggml_tensor * bias = nullptr;
    activation act = activation::none;
    const ggml_tensor * residual = nullptr;  // linear, norm
    const ggml_tensor * norm = nullptr;      // NORM or RMS_NORM, and what follows it
    const ggml_tensor * norm_w = nullptr;
    const ggml_tensor * norm_b = nullptr;

    bool has_tail() const { return residual || norm || int8 != no_slot; }
};

struct plan {
    std::vector<step> steps;
    std::vector<slot> slots;
    size_t arena = 0;  // bytes
};

plan make_plan(const ggml_cgraph * graph);

class graph_runner {
  public:
    ggml_status run(const ggml_cgraph * graph);
    void set_n_threads(int n) { n_threads = n < 1 ? 1 : n; }
    void set_abort(ggml_abort_callback callback, void * data) {
        abort = callback;
        abort_data = data;
    }

  private:
    struct memory {  // grows, aligned, uninitialised
        std::unique_ptr<char[]> block;
        size_t size = 0;
        char * at = nullptr;
        char * grow(size_t bytes);
    };

    void run_step(const step & s);
    void run_linear(const step & s);
    void run_attention(const step & s);
    void run_rows(const step & s, int row0, int row1);

    const void * data_of(const source & from, packing kind) const;
    char * slot_data(int slot) const;
    const std::vector<segment> & segments(const ggml_tensor * mask, int n_rows, int n_keys);

    int n_threads = 1;
    ggml_abort_callback abort = nullptr;
    void * abort_data = nullptr;
    plan current;
    memory arena, scratch;
    team helpers;
    std::vector<std::pair<const ggml_tensor *, std::vector<segment>>> masks;
};

}  // namespace llamacrab::kernels
