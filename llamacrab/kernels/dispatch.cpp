// Selects the kernels for this CPU.
#include <cstdlib>
#include <cstring>

#include "kernel_table.hpp"

namespace llamacrab::kernels {

#if defined(LLAMACRAB_X86_KERNELS)
static bool cpu_has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

static bool cpu_has_avx2_vnni() { return cpu_has_avx2() && __builtin_cpu_supports("avxvnni"); }

static bool cpu_has_avx512_vnni() {
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

static bool cpu_has_avx512_bf16() {
    return cpu_has_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
}
#endif

static const kernel_table & select_kernels() {
    const kernel_table * usable[] = {
// the fastest first
#if defined(LLAMACRAB_X86_KERNELS)
        cpu_has_avx512_bf16() ? avx512_bf16_kernels() : nullptr,
        cpu_has_avx512_vnni() ? avx512_vnni_kernels() : nullptr,
        cpu_has_avx2_vnni() ? avx2_vnni_kernels() : nullptr,
        cpu_has_avx2() ? avx2_kernels() : nullptr,
#endif
        generic_kernels(),
    };
    const char * wanted = std::getenv("LLAMACRAB_KERNELS");
    if (wanted && std::strcmp(wanted, "plain") == 0) {
        wanted = "generic";  // its former name
    }
    for (const kernel_table * table : usable) {
        if (wanted && table && std::strcmp(wanted, table->name) == 0) {
            return *table;
        }
    }
    for (const kernel_table * table : usable) {
        if (table) {
            return *table;
        }
    }
    return *generic_kernels();
}

const kernel_table & active_kernels() {
    static const kernel_table & selected = select_kernels();
    return selected;
}

}  // namespace llamacrab::kernels
