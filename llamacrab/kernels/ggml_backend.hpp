// What the parts of the backend share.
#pragma once

#include "ggml-backend-impl.h"
#include "weight_packing.hpp"

namespace llamacrab::kernels {

// Whether a tensor lies in one of our buffers of weights, and how.
bool is_ours(const ggml_tensor * weight);
packing packing_in_place(const ggml_tensor * weight);

// Whether this backend computes a node; see executor.cpp.
bool can_compute(const ggml_tensor * node);

}  // namespace llamacrab::kernels
