// A table of kernels. Compiled once per instruction set, with LLAMACRAB_KERNEL_TABLE naming the
// function that returns it.
#include "attention.hpp"
#include "rowwise.hpp"

namespace llamacrab::kernels {

const kernel_table * LLAMACRAB_KERNEL_TABLE() {
    static constexpr kernel_table table = {
#if defined(__AVX512BF16__)
        "avx512_bf16", weight_layout::bf16_panels,
        true,          false,
#elif defined(__AVX512VNNI__)
        "avx512_vnni", weight_layout::int16_panels,
        true,          false,
#elif defined(__AVXVNNI__)
        "avx2_vnni", weight_layout::int16_panels,
        true,        false,
#elif defined(__AVX2__)
        "avx2",    weight_layout::int16_panels,
        true,      true,
#else
        "generic", weight_layout::int16_panels,
        false,     false,
#endif
        tile,          linear,
        norm,          attention_scratch,
        attention,     rope,
        to_bf16,       to_f16,
        widen_f16,     to_int16,
        add,           mul,
        gate,
    };
    return &table;
}

}  // namespace llamacrab::kernels
