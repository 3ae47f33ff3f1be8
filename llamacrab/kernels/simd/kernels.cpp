// One kernel set. Compiled once for each instruction set, with LLAMACRAB_SET naming it.
#include "attention.hpp"
#include "rowwise.hpp"

namespace llamacrab {

const kernel_set * LLAMACRAB_SET() {
    static constexpr kernel_set set = {
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
    return &set;
}

}  // namespace llamacrab
