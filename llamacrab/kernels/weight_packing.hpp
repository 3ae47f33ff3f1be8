// Weights as the kernels want them: which tensors are packed, how, and where the parts lie.
#pragma once

#include "ggml.h"
#include "kernel_table.hpp"

namespace llamacrab::kernels {

// How a tensor is held in a buffer of packed weights. Vectors, and matrices of types that are not
// taken, stay as they are.
weight_layout choose_layout(const ggml_tensor * weight, bool allow_int8);

size_t packed_bytes(const ggml_tensor * weight, weight_layout layout);

// Pack rows [row0, row1) of a weight; `from` holds them in ggml's layout.
void pack_rows(const ggml_tensor * weight, weight_layout layout, const void * from, int64_t row0,
               int64_t row1, void * to);

// The way back, to ggml's layout; what packing rounded stays rounded.
void unpack_rows(const ggml_tensor * weight, weight_layout layout, const void * from, int64_t row0,
                 int64_t row1, void * to);

// Where a packed int8 matrix keeps the scales of its columns, and the sums.
const float * int8_scales(const ggml_tensor * weight, const void * data);
const float * int8_sums(const ggml_tensor * weight, const void * data);

}  // namespace llamacrab::kernels
