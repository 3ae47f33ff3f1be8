// llama.cpp's log, for Python: whole lines, collected per thread. The GIL is taken only for lines
// that are wanted. The callback is process-wide and may run on any thread, including those of ggml.
#pragma once

#include <algorithm>
#include <atomic>
#include <iterator>
#include <string>

#include "llama.h"

namespace llamacrab {

using log_sink = void (*)(int level, const char * line);

struct log_state {
    std::atomic<int> threshold{GGML_LOG_LEVEL_ERROR + 1};  // lower levels do not reach the sink
    std::atomic<log_sink> sink{nullptr};
};

struct log_thread {
    int level = GGML_LOG_LEVEL_NONE;
    std::string line;              // the unfinished line
    std::string errors;            // error lines since log_take_errors()
    bool muted = false;            // drop what this thread logs: it is expected
    bool context_warnings = true;  // whether warnings about a context are logged
};

// Warnings about generating text, which llamacrab does not do. They are logged as DEBUG.
constexpr const char * log_demoted[] = {
    // For every BERT: its SEP, which is used as EOS, does not end a generation.
    "special_eos_id is not in special_eog_ids",
    // For every XLM-R: the newline is only needed to complete code.
    "model vocab missing newline token",
    // For every Gemma 2, once per context: it cannot go back to an earlier turn of a chat.
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
    // The sink runs Python code, which may log on this thread again: pass it a copy of the line.
    const std::string line = std::move(local.line);
    local.line.clear();
    int level_of_line = local.level;
    if (level_of_line >= GGML_LOG_LEVEL_ERROR && local.errors.size() < 4096) {
        local.errors += local.errors.empty() ? "" : "; ";
        local.errors += line;
    }
    const auto contains = [&](const char * part) { return line.find(part) != std::string::npos; };
    if (!local.context_warnings &&
        (contains("> n_ctx_train") || contains("model default pooling_type is"))) {
        return;
    }
    if (level_of_line == GGML_LOG_LEVEL_WARN &&
        std::any_of(std::begin(log_demoted), std::end(log_demoted), contains)) {
        level_of_line = GGML_LOG_LEVEL_DEBUG;
    }
    if (auto sink = shared.sink.load(); sink && wanted(level_of_line)) {
        sink(level_of_line, line.c_str());
    }
} catch (...) {
    // There is no memory for the line. Only the line is lost.
}

// Return the errors that llama.cpp has logged on this thread since the last call.
inline std::string log_take_errors() {
    std::string taken;
    taken.swap(log_local().errors);
    return taken;
}

// llama.cpp logs an abort as an error, also if the scheduler has asked for it.
inline void log_mute(bool muted) { log_local().muted = muted; }

// Whether warnings about the sizes and the pooling of a context are logged. llama.cpp gives them
// for every context, also if there are only more cells than one text can use.
inline void log_context_warnings(bool wanted) { log_local().context_warnings = wanted; }

inline void log_install(log_sink sink) {
    log_shared().sink = sink;
    llama_log_set(log_callback, nullptr);
}

inline void log_set_threshold(int level) { log_shared().threshold = level; }

}  // namespace llamacrab
