// What a mask lets each query see, read off its values.
#pragma once

#include <vector>

#include "ggml.h"
#include "kernel_table.hpp"

namespace llamacrab::kernels {

// Split the rows of an f16 mask [keys, rows] into segments. Rows that see the same keys, such as
// those of one text among others in a pack, become one; rows that differ, as under a sliding
// window, are taken a few at a time with all keys that any of them sees.
std::vector<segment> segments_of(const ggml_tensor * mask, int n_rows, int n_keys);

}  // namespace llamacrab::kernels
