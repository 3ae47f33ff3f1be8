// The planner: turns the nodes of a graph into steps, fusing several nodes into one where it can.
#pragma once

#include <vector>

#include "ggml.h"
#include "kernel_table.hpp"

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
    set_rows,
    convert,
    gather,
    pool,
};

// Memory of the backend's own for an activation in the type that the next step multiplies. A slot
// is a dense copy of a whole contiguous tensor, so the offset of a view is the same in both.
//
// A slot of int8 holds the rows, padded to eight values; then, from a multiple of 64 bytes on, the
// scale and the zero of each row. A slot of int16 holds rows of int16_row() elements.
struct slot {
    size_t bytes = 0;
    int first_step = 0, last_step = 0;  // its memory is in use from one to the other
    size_t offset = 0;                  // in the arena
};

size_t int8_row_bytes(const ggml_tensor * t);
size_t int8_scales_offset(size_t row_bytes, int64_t n_rows);

// The slots of one tensor.
class slots_by_type {
    int numbers[4] = {no_slot, no_slot, no_slot, no_slot};

  public:
    int & operator[](data_type type) { return numbers[(int) type]; }
    int operator[](data_type type) const { return numbers[(int) type]; }
    bool has(data_type type) const { return (*this)[type] != no_slot; }
    bool any() const {
        return has(data_type::f32) || has(data_type::bf16) || has(data_type::int16) ||
               has(data_type::int8);
    }
};

// Where a step reads a matrix: in a slot, or in the memory of a tensor.
struct operand {
    const ggml_tensor * tensor = nullptr;
    int slot = no_slot;
    ptrdiff_t shift = 0;    // elements from the start of the slot to the start of the tensor
    bool gathered = false;  // the slot holds [tokens][heads][values], whatever the tensor's strides

    bool is_f16() const { return slot == no_slot && tensor->type == GGML_TYPE_F16; }
};

// A node, and the nodes after it that were fused into it.
struct step {
    step_kind kind;
    const ggml_tensor * node;  // the first node
    const ggml_tensor * out;   // the last node: what the step computes
    bool write_f32 = false;    // write the result to the memory of `out`
    slots_by_type slots;       // and to these

    operand x, k, v;  // k, v: attention only
    data_type x_type = data_type::f32;
    const ggml_tensor * weight = nullptr;  // linear only
    const ggml_tensor * bias = nullptr;
    activation act = activation::none;
    const ggml_tensor * residual = nullptr;  // linear, norm
    const ggml_tensor * norm = nullptr;      // the node of the norm itself
    const ggml_tensor * norm_weight = nullptr;
    const ggml_tensor * norm_bias = nullptr;

    // Whether a product must be complete before the rest of the step can follow.
    bool has_tail() const { return residual || norm || slots.has(data_type::int8); }
};

struct plan {
    std::vector<step> steps;
    std::vector<slot> slots;
    size_t arena_bytes = 0;
};

plan make_plan(const ggml_cgraph * graph);

}  // namespace llamacrab::kernels
