// One kernel set. Compiled once for each instruction set, with LLAMACRAB_KERNELS_FUNCTION naming
// it.
#include "attention.hpp"
#include "rowwise.hpp"

namespace llamacrab::kernels {

const kernel_table * LLAMACRAB_KERNELS_FUNCTION() {
    static constexpr kernel_table table = {
#if defined(__AVX512BF16__)
        "avx512_bf16", true,
#elif defined(__AVX2__)
        "avx2", false,
#else
        "plain", false,
#endif
        tile,          linear, norm, attention_scratch, attention, to_bf16, to_f32, add,
        mul,           unary,  gate,
    };
    return &table;
}

}  // namespace llamacrab::kernels
