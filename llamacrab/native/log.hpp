// llama.cpp's log, made safe for Python: whole lines, per thread, and never the GIL unless a line is
// wanted. The callback is process-wide and may run on any thread, ggml's own included.
#pragma once

#include <atomic>
#include <string>

#include "llama.h"

namespace llamacrab {

using log_sink = void (*)(int level, const char * line);

struct log_state {
    std::atomic<int>      threshold{GGML_LOG_LEVEL_ERROR + 1};  // lines below it never reach the sink
    std::atomic<log_sink> sink{nullptr};
};

struct log_thread {
    int         level = GGML_LOG_LEVEL_NONE;
    std::string line;    // the unfinished line
    std::string errors;  // finished error lines since log_take_errors()
    bool        muted = false;  // what this thread says now is expected, and nobody's concern
    bool        doubting = true;  // whether its doubts about a context are anybody's concern
};

inline log_state & log_shared() {
    static log_state state;
    return state;
}

inline log_thread & log_local() {
    static thread_local log_thread state;
    return state;
}

inline void log_callback(ggml_log_level level, const char * text, void *) noexcept try {
    auto & shared = log_shared();
    auto & local  = log_local();
    if (local.muted) {
        return;
    }
    if (level != GGML_LOG_LEVEL_CONT) {
        local.level = level;
        local.line.clear();
    }
    const bool wanted = local.level >= shared.threshold.load(std::memory_order_relaxed);
    if (!wanted && local.level < GGML_LOG_LEVEL_ERROR) {
        return;
    }
    local.line += text;
    if (local.line.empty() || local.line.back() != '\n') {
        return;
    }
    local.line.pop_back();
    if (local.level >= GGML_LOG_LEVEL_ERROR && local.errors.size() < 4096) {
        local.errors += local.errors.empty() ? "" : "; ";
        local.errors += local.line;
    }
    const auto says     = [&](const char * part) { return local.line.find(part) != std::string::npos; };
    const bool expected = !local.doubting && (says("> n_ctx_train") || says("model default pooling_type is"));
    if (auto sink = shared.sink.load(); wanted && sink && !expected) {
        // The sink runs Python, which may log again on this thread: give it a line of its own.
        const std::string line = std::move(local.line);
        local.line.clear();
        sink(local.level, line.c_str());
    }
    local.line.clear();
} catch (...) {
    // No memory for a log line: it is lost, the work is not.
}

// The error lines that llama.cpp has said on this thread since the last call.
inline std::string log_take_errors() {
    std::string taken;
    taken.swap(log_local().errors);
    return taken;
}

// An abort that we asked for is no error, though llama.cpp logs it as one.
inline void log_mute(bool muted) { log_local().muted = muted; }

// Whether llama.cpp's warnings about the sizes and the pooling of a context pass: it gives them for every
// context anew, and for more cells than one text can use.
inline void log_doubts(bool pass) { log_local().doubting = pass; }

inline void log_install(log_sink sink) {
    log_shared().sink = sink;
    llama_log_set(log_callback, nullptr);
}

inline void log_set_threshold(int level) {
    log_shared().threshold = level;
}

}  // namespace llamacrab
