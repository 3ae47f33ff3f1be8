// A table of kernels. Compiled once per instruction set, with LLAMACRAB_KERNEL_TABLE naming the
// function that returns it.
#include "attention.hpp"
#include "rowwise.hpp"

namespace llamacrab::kernels {

const kernel_table * LLAMACRAB_KERNEL_TABLE() {
    static constexpr kernel_table table = {
#if defined(__AVX512BF16__)
        "avx512_bf16", true,   true,
#elif defined(__AVX2__)
        "avx2", false,  false,
#else
        "generic", false,  false,
#endif
        tile,          linear, norm, attention_scratch, attention, to_bf16, add, mul, gate,
    };
    return &table;
}

}  // namespace llamacrab::kernels
