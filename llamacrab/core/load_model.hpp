// The only function that needs both llama_guard.hpp and the kernels, which are independent.
#pragma once

#include "kernels/kernels.hpp"
#include "native/llama_guard.hpp"

namespace llamacrab {

inline llama_model * load_model(const char * path, llama_model_params params,
                                kernels::cpu_backend backend, int & n_int8_matrices) {
    const throwing_asserts scope;
    const kernels::loading_for loading(backend);
    llama_model * model = llama_model_load_from_file(path, params);
    n_int8_matrices = loading.n_int8_matrices();
    return model;
}

}  // namespace llamacrab
