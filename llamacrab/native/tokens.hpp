// Token ids, for code that does not include llama.cpp.
#pragma once

#include <cstdint>
#include <vector>

namespace llamacrab {

using token_vector = std::vector<int32_t>;  // llama.cpp's llama_token is an int32_t

}  // namespace llamacrab
