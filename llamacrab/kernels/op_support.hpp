// Which nodes this backend computes, and predicates that the planner uses too.
#pragma once

#include "ggml.h"
#include "kernel_table.hpp"

namespace llamacrab::kernels {

// Whether this backend computes a node.
bool can_compute(const ggml_tensor * node);

// Whether a tensor is contiguous and of type float32.
bool is_dense_f32(const ggml_tensor * t);

// Whether `row` is one row, as wide as the rows of `like`.
bool is_row(const ggml_tensor * row, const ggml_tensor * like);

// The activation of the kernels that equals an operation of ggml, or `none`.
activation activation_of(ggml_unary_op op);
activation activation_of(ggml_glu_op op);

// Whether a node is the transposed copy of a matrix, as pooling by mean uses it.
bool is_transposed_copy(const ggml_tensor * t);

}  // namespace llamacrab::kernels
