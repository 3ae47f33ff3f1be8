// The choice of a kernel set.
#include "kernel_table.hpp"

#include <cstdlib>
#include <cstring>

namespace llamacrab::kernels {

#if !defined(LLAMACRAB_X86_SETS)
const kernel_table * avx2_kernels() { return nullptr; }
const kernel_table * avx512_bf16_kernels() { return nullptr; }
#endif

static bool runs_avx2() {
#if defined(LLAMACRAB_X86_SETS)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

static bool runs_avx512_bf16() {
#if defined(LLAMACRAB_X86_SETS)
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

static const kernel_table & choose() {
    const struct {
        const char * name;
        bool runs;
        const kernel_table * (*set)();
    } known[] = {
        {"avx512_bf16", runs_avx512_bf16(), avx512_bf16_kernels},
        {"avx2", runs_avx2(), avx2_kernels},
        {"plain", true, plain_kernels},
    };
    const char * wanted = std::getenv("LLAMACRAB_KERNELS");
    for (const auto & one : known) {
        if (wanted && std::strcmp(wanted, one.name) == 0 && one.runs) {
            return *one.set();
        }
    }
    for (const auto & one : known) {
        if (one.runs) {
            return *one.set();
        }
    }
    return *plain_kernels();
}

const kernel_table & active_kernels() {
    static const kernel_table & chosen = choose();
    return chosen;
}

}  // namespace llamacrab::kernels
