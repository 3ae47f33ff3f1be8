// The interface of the kernels: a ggml backend that is registered once. A model uses it if it is
// loaded inside a `loading_for` scope that asks for it.
#pragma once

namespace llamacrab::kernels {

enum class cpu_backend : int { ggml, llamacrab, int8 };

// The kernels in use, such as "avx512_bf16"; null if this build has none.
const char * active_name();

// Whether they multiply 8-bit matrices: if not, `int8` computes as `llamacrab` does.
bool have_int8();

// Whether they are faster than ggml's, so that a model should use them by default.
bool preferred_over_ggml();

// Whether they multiply bf16, and so round other types but f32 to it.
bool have_bf16();

// Whether they multiply matrices of a ggml_type.
bool can_pack(int type);

// Register the backend with ggml. Call it once, before any model is loaded.
void install();

// While it lives, this thread loads models for the given backend.
class loading_for {
    const int before;
    const int int8_before;

  public:
    // Matrices that were packed in 8 bits since it was made.
    int n_int8_matrices() const;

    explicit loading_for(cpu_backend wanted);
    ~loading_for();
    loading_for(const loading_for &) = delete;
    loading_for & operator=(const loading_for &) = delete;
};

// While it lives, graphs that this thread computes with these kernels may use n threads beyond
// those of their context.
class extra_threads {
    const int before;

  public:
    explicit extra_threads(int n);
    ~extra_threads();
    extra_threads(const extra_threads &) = delete;
    extra_threads & operator=(const extra_threads &) = delete;

    static int allowed();
};

}  // namespace llamacrab::kernels
