// Packs weights in the layouts that the kernels read.
#pragma once

#include "ggml.h"
#include "kernel_table.hpp"

namespace llamacrab::kernels {

// Whether matrices of a type can be packed.
bool is_packable(ggml_type type);

// The layout of a tensor in a buffer of packed weights. Vectors, and matrices of types without a
// kernel, stay unpacked.
weight_layout choose_layout(const ggml_tensor * weight, bool allow_int8);

size_t packed_bytes(const ggml_tensor * weight, weight_layout layout);

// Pack rows [row0, row1) of a weight; `from` holds them in ggml's layout.
void pack_rows(const ggml_tensor * weight, weight_layout layout, const void * from, int64_t row0,
               int64_t row1, void * to);

// Back to ggml's layout. What packing rounded stays rounded.
void unpack_rows(const ggml_tensor * weight, weight_layout layout, const void * from, int64_t row0,
                 int64_t row1, void * to);

// The scales and the sums of the columns of a packed int8 matrix.
const float * int8_scales(const ggml_tensor * weight, const void * data);
const float * int8_sums(const ggml_tensor * weight, const void * data);

}  // namespace llamacrab::kernels
