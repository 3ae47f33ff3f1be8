// Failed assertions of llama.cpp as exceptions.
//
// llama.cpp asserts on a GGUF whose numbers contradict each other. By default, that ends the
// process. While it loads a model, plans a context, or computes with one thread, it runs on the
// calling thread only. There, a failed assertion can throw, as its own errors do. The stack frames
// in between are C++, or C with the unwind tables that compilers write on Linux and macOS. If an
// assertion fails on a thread of ggml, or while other threads wait for this one, the process still
// ends.
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
        const std::string text = message;  // starts with the path of llama.cpp's source
        throw std::runtime_error("gave up at " + text.substr(text.rfind('/', text.find(": ")) + 1));
    }
    std::fprintf(stderr, "%s\n", message);
}

inline void asserts_install() { ggml_set_abort_callback(on_assert); }

// While an object of this class exists, assertions that fail on this thread throw.
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
