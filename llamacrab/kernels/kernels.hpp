// The kernels as the rest of llamacrab sees them: a ggml backend that is registered once, and that
// a model uses if it is loaded inside a scope that says so.
#pragma once

namespace llamacrab::kernels {

enum class cpu_backend : int { ggml, llamacrab, int8 };

// The kernel set in use, such as "avx512_bf16"; null where this build has none.
const char * active_name();
// Whether the set is faster than ggml's own code, so that a model should use it unasked.
bool preferred_over_ggml();
// Make the backend known to ggml. Called once, before any model is loaded.
void install();

// What models that this thread loads compute with while it lives.
class loading_for {
    const int before;

  public:
    explicit loading_for(cpu_backend wanted);
    ~loading_for();
    loading_for(const loading_for &) = delete;
    loading_for & operator=(const loading_for &) = delete;
};

}  // namespace llamacrab::kernels
