// Finds the texts of a pack in the values of an attention mask.
#pragma once

#include <vector>

#include "ggml.h"
#include "kernel_table.hpp"

namespace llamacrab::kernels {

// Split the rows of an f16 mask [keys, rows] into segments. Rows that see the same keys, such as
// those of one text in a pack, become one segment. Rows that differ, as under a sliding window, are
// grouped a few at a time, with all keys that any of them sees.
std::vector<segment> find_segments(const ggml_tensor * mask, int n_rows, int n_keys);

}  // namespace llamacrab::kernels
