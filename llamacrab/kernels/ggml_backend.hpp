// What the rest of the backend asks about weights.
#pragma once

#include "ggml-backend-impl.h"
#include "weight_packing.hpp"

namespace llamacrab::kernels {

// Whether a tensor lies in one of the backend's buffers of packed weights.
bool is_packed_weight(const ggml_tensor * weight);

// How such a tensor is laid out there.
weight_layout layout_of(const ggml_tensor * weight);

}  // namespace llamacrab::kernels
