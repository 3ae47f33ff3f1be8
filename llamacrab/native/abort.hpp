// GGML_ASSERT ends the process: a GGUF whose numbers contradict each other must not. So ggml is given
// a callback that throws instead. llama.cpp turns what is thrown while it loads a model or makes a
// context into an error line and NULL; from the other calls it comes out as an exception.
//
// The frames that it crosses are C++, or C with the unwind tables that compilers write on Linux and
// macOS. Where nobody catches it, as on a thread of ggml's own, the process ends as it did before.
#pragma once

#include <cstring>
#include <stdexcept>

#include "ggml.h"

namespace llamacrab {

[[noreturn]] inline void throw_assertion(const char * message) {
    // "/folder/file.cpp:12: GGML_ASSERT(...) failed": whose folder it was is nobody's concern.
    const char * end = std::strstr(message, ": ");
    for (const char * at = message; at < end; ++at) {
        if (*at == '/') {
            message = at + 1;
        }
    }
    throw std::runtime_error(message);
}

inline void throw_on_abort() { ggml_set_abort_callback(throw_assertion); }

}  // namespace llamacrab
