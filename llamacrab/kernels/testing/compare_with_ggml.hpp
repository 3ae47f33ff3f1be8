// For tests: small graphs on random data, computed by this backend and by ggml's.
#pragma once

#include <string>
#include <vector>

namespace llamacrab::kernels {

// Return the normalised mean squared difference of the two results, or -1 where the backend does
// not take every node. `kind` and the numbers are explained in compare_with_ggml.cpp.
double check_kernels(const std::string & kind, const std::vector<int> & numbers);

}  // namespace llamacrab::kernels
