// llama.cpp's log, made safe for Python: whole lines, per thread, and never the GIL unless a line
// is wanted. The callback is process-wide and may run on any thread, ggml's own included.
#pragma once

#include <algorithm>
#include <atomic>
#include <iterator>
#include <string>

#include "llama.h"

namespace llamacrab {

using log_sink = void (*)(int level, const char * line);

struct log_state {
    std::atomic<int> threshold{GGML_LOG_LEVEL_ERROR + 1};  // lines below it never reach the sink
    std::atomic<log_sink> sink{nullptr};
};

struct log_thread {
    int level = GGML_LOG_LEVEL_NONE;
    std::string line;              // the unfinished line
    std::string errors;            // finished error lines since log_take_errors()
    bool muted = false;            // what this thread logs now is expected, and dropped
    bool context_warnings = true;  // whether warnings about a context are logged
};

// Warnings about generating text, which is not done here. They are logged as DEBUG.
constexpr const char * log_demoted[] = {
    // Every BERT's: its SEP, which stands for EOS, does not end a generation.
    "special_eos_id is not in special_eog_ids",
    // Every XLM-R's: a newline is only looked for to fill in code.
    "model vocab missing newline token",
    // Every Gemma 2's, once for each context: it could not go back to an earlier turn of a chat.
    "using full-size SWA cache",
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
    auto & local = log_local();
    if (local.muted) {
        return;
    }
    if (level != GGML_LOG_LEVEL_CONT) {
        local.level = level;
        local.line.clear();
    }
    const auto wanted = [&](int at) {
        return at >= shared.threshold.load(std::memory_order_relaxed);
    };
    if (!wanted(local.level) && local.level < GGML_LOG_LEVEL_ERROR) {
        return;
    }
    local.line += text;
    if (local.line.empty() || local.line.back() != '\n') {
        return;
    }
    local.line.pop_back();
    // The sink runs Python, which may log again on this thread: give it a line of its own.
    const std::string line = std::move(local.line);
    local.line.clear();
    int said = local.level;
    if (said >= GGML_LOG_LEVEL_ERROR && local.errors.size() < 4096) {
        local.errors += local.errors.empty() ? "" : "; ";
        local.errors += line;
    }
    const auto says = [&](const char * part) { return line.find(part) != std::string::npos; };
    if (!local.context_warnings &&
        (says("> n_ctx_train") || says("model default pooling_type is"))) {
        return;
    }
    if (said == GGML_LOG_LEVEL_WARN &&
        std::any_of(std::begin(log_demoted), std::end(log_demoted), says)) {
        said = GGML_LOG_LEVEL_DEBUG;
    }
    if (auto sink = shared.sink.load(); sink && wanted(said)) {
        sink(said, line.c_str());
    }
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

// Whether llama.cpp's warnings about the sizes and the pooling of a context pass: it gives them for
// every context, and for more cells than one text can use.
inline void log_context_warnings(bool pass) { log_local().context_warnings = pass; }

inline void log_install(log_sink sink) {
    log_shared().sink = sink;
    llama_log_set(log_callback, nullptr);
}

inline void log_set_threshold(int level) { log_shared().threshold = level; }

}  // namespace llamacrab
