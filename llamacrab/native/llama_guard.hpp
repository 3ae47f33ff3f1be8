// llama.cpp asserts on numbers of a GGUF that contradict each other, which would end the process.
// While it loads a model, plans a context, or computes with one thread, it works on the calling
// thread only, and from there an assertion can leave as an exception, as its own errors do. The
// frames that it crosses are C++, or C with the unwind tables that compilers write on Linux and
// macOS. Elsewhere it still ends the process: one that fails on a thread of ggml's, or with other
// threads waiting for it, has no way out.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

#include "llama.h"

namespace llamacrab {

inline bool & asserts_throw() {
    static thread_local bool value = false;
    return value;
}

inline void on_assert(const char * message) {
    if (asserts_throw()) {
        const std::string whole = message;  // begins with the path of llama.cpp's source
        throw std::runtime_error("gave up at " +
                                 whole.substr(whole.rfind('/', whole.find(": ")) + 1));
    }
    std::fprintf(stderr, "%s\n", message);
}

inline void asserts_install() { ggml_set_abort_callback(on_assert); }

class throwing_asserts {
    const bool before = asserts_throw();

  public:
    throwing_asserts() { asserts_throw() = true; }
    ~throwing_asserts() { asserts_throw() = before; }
};

inline llama_context * make_context(llama_model * model, llama_context_params params) {
    const throwing_asserts scope;
    return llama_init_from_model(model, params);
}

}  // namespace llamacrab
