#include "decoder.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "llama_guard.hpp"
#include "log.hpp"

namespace llamacrab {

static_assert(std::is_same_v<llama_token, int32_t>);

namespace {

using clock = std::chrono::steady_clock;

double seconds_since(clock::time_point start) {
    return std::chrono::duration<double>(clock::now() - start).count();
}

// Call a function that returns a failure, and turn its exceptions into failures.
template <class F>
failure caught(F && call) {
    try {
        return call();
    } catch (const std::bad_alloc &) {
        return make_failure(failure_kind::no_memory, 0, "out of memory");
    } catch (const std::exception & error) {
        return make_failure(failure_kind::thrown, -3, error.what());
    } catch (...) {
        return make_failure(failure_kind::thrown, -3, "unknown exception");
    }
}

double l2_norm(const float * row, int32_t n) {
    double sum = 0;
    for (int32_t i = 0; i < n; ++i) {
        sum += double(row[i]) * row[i];
    }
    return std::sqrt(sum);
}

double max_norm(const float * row, int32_t n) {
    double max = 0;
    for (int32_t i = 0; i < n; ++i) {
        max = std::max(max, std::abs(double(row[i])));
    }
    return max;
}

double p_norm(const float * row, int32_t n, double p) {
    const double max = max_norm(row, n);
    double sum = 0;
    for (int32_t i = 0; i < n; ++i) {
        sum +=
            std::pow(std::abs(row[i]) / max, p);  // divided by the maximum, so no power underflows
    }
    return max * std::pow(sum, 1 / p);
}

// The factor that normalizes a row of length `l2`.
float scale_of(const float * row, const job & j, double l2) {
    switch (j.norm) {
        case norm_kind::none: return 1;
        case norm_kind::p: return float(1 / (j.p == 2 ? l2 : p_norm(row, j.width, j.p)));
        case norm_kind::max: return float(1 / max_norm(row, j.width));
        case norm_kind::int16: return float(1 / (max_norm(row, j.width) / 32760));
    }
    return 1;
}

// Architectures whose graph ends in the tensor `result_norm`, which has the rows that are pooled,
// and the LM head, and whose memory takes a ubatch in the order of its tokens. (Read in
// src/models/*.cpp of llama.cpp. Encoders, gemma-embedding and llama-embed have no head; lfm2
// leaves it out by itself.)
constexpr const char * headless_architectures[] = {
    "gemma", "gemma2", "gemma3", "llama", "mistral3", "olmo2", "phi3", "qwen2", "qwen3", "smollm3",
};

std::string metadata(const llama_model * model, const std::string & key) {
    char value[64] = "";
    llama_model_meta_val_str(model, key.c_str(), value, sizeof value);
    return value;
}

bool may_go_headless(const llama_model * model, const llama_context_params & params) {
    const std::string arch = metadata(model, "general.architecture");
    const auto begin = std::begin(headless_architectures), end = std::end(headless_architectures);
    if (std::find(begin, end, arch) == end || !params.kv_unified) {
        return false;
    }
    // Dense layers come after pooling.
    if (!metadata(model, arch + ".dense_2_feat_out").empty() ||
        !metadata(model, arch + ".dense_3_feat_out").empty() ||
        llama_model_n_embd_out(model) != llama_model_n_embd(model)) {
        return false;
    }
    switch (params.pooling_type) {
        case LLAMA_POOLING_TYPE_NONE:
        case LLAMA_POOLING_TYPE_MEAN:
        case LLAMA_POOLING_TYPE_CLS:
        case LLAMA_POOLING_TYPE_LAST: return true;
        default: return false;
    }
}

// llama.cpp keeps room for a row of logits for each output, and copies them, computed or not. So
// where every token is an output, few go into a call.
int32_t outputs_with_room(int32_t n_vocab) {
    constexpr int32_t least = 32, most_bytes = 64 << 20;
    return std::max(least, int32_t(most_bytes / sizeof(float) / n_vocab));
}

}  // namespace

void token_batch::add(const int32_t * ids, int32_t n_tokens, int32_t first_pos, int32_t seq_id,
                      output_tokens outputs) {
    for (int32_t i = 0; i < n_tokens; ++i) {
        const int32_t at = batch.n_tokens++;
        batch.token[at] = ids[i];
        batch.pos[at] = first_pos + i;
        batch.n_seq_id[at] = 1;
        batch.seq_id[at][0] = seq_id;
        // With `embeddings`, llama.cpp requires every token as an output.
        batch.logits[at] = outputs == output_tokens::all ||
                           (outputs == output_tokens::first && i == 0) ||
                           (outputs == output_tokens::last && i == n_tokens - 1);
    }
}

// ------------------------------------------------------------------------------------- context

std::unique_ptr<decoder> decoder::make(llama_model * model, llama_context_params params,
                                       bool headless) {
    std::unique_ptr<decoder> made(new decoder(model, params));
    if (headless && may_go_headless(model, params)) {
        made->headless = true;
        made->params_with_head = params;
        made->params.embeddings = false;
        made->params.cb_eval_user_data = made.get();
        made->params.cb_eval = [](ggml_tensor * tensor, bool ask, void * data) {
            return static_cast<decoder *>(data)->take_rows(tensor, ask);
        };
        made->n_part = int32_t(params.n_ubatch);
        made->params.n_outputs_max = params.n_seq_max;
        if (made->wanted_outputs() == output_tokens::all) {
            const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
            made->n_part = std::min(made->n_part, outputs_with_room(n_vocab));
            made->params.n_outputs_max = std::max(uint32_t(made->n_part), params.n_seq_max);
        }
    }
    made->ctx = make_context(model, made->params);
    if (!made->ctx) {
        return nullptr;
    }
    made->n_part = std::min(made->n_part, int32_t(llama_n_ubatch(made->ctx)));
    made->watch_abort();
    return made;
}

decoder::~decoder() { llama_free(ctx); }

void decoder::watch_abort() {
    const auto on_abort = [](void * data) {
        const bool stop = static_cast<decoder *>(data)->abort;
        log_mute(stop);
        return stop;
    };
    llama_set_abort_callback(ctx, on_abort, this);
}

// Replace the context after an exception, which leaves its state in doubt. If there can be no other
// context, the old one stays.
void decoder::renew() noexcept {
    tainted = true;
    try {
        if (llama_context * fresh = make_context(model, params)) {
            llama_free(ctx);
            ctx = fresh;
            watch_abort();
        }
    } catch (...) {
        // If there was no memory for the pack, there may be none for a context.
    }
}

// Replace a headless context by one that computes the LM head, for good.
void decoder::compute_heads_from_now_on() {
    llama_context * fresh = make_context(model, params_with_head);
    if (!fresh) {
        throw std::bad_alloc();
    }
    llama_free(ctx);
    ctx = fresh;
    params = params_with_head;
    headless = false;
    shared.clear();
    tainted = true;
    watch_abort();
}

// ------------------------------------------------------------------------------------- decoding

// Run code that decodes and returns the result of llama_decode.
template <class F>
failure decoder::attempt(F && call) {
    return caught([&] {
        // With one thread, a failed assertion of llama.cpp can be caught like any other exception.
        std::optional<throwing_asserts> scope;
        if (params.n_threads_batch == 1) {
            scope.emplace();
        }
        log_take_errors();
        const int32_t code = call();
        llama_synchronize(ctx);
        log_mute(false);
        return failure_of(code);
    });
}

failure decoder::failure_of(int32_t code) const {
    if (code == 0) {
        return failure();
    }
    if (abort) {
        return make_failure(failure_kind::cancelled, code, "aborted");
    }
    if (code == 1) {
        return make_failure(failure_kind::no_room, code,
                            "the context's memory has no room for these tokens");
    }
    return make_failure(failure_kind::decode, code, log_take_errors());
}

failure decoder::decode(const token_batch & batch) {
    return attempt([&] { return llama_decode(ctx, batch.batch); });
}

void decoder::clear_memory() {
    if (const llama_memory_t memory = llama_get_memory(ctx)) {
        llama_memory_clear(memory, /*data=*/false);
    }
    shared.clear();
}

// ------------------------------------------------------------------------------------- packs

void decoder::compute(token_batch & batch, const item * const * texts, size_t n_texts,
                      fault_kind fault, failure * results, decode_seconds & seconds) {
    const auto fail_all = [&](const failure & what) {
        std::fill_n(results, n_texts, what);
        tainted = true;
        if (what.kind == failure_kind::thrown || what.kind == failure_kind::no_memory) {
            renew();
        }
    };
    auto started = clock::now();
    const failure decoded = attempt([&] {
        switch (fault) {
            case fault_kind::throws: throw std::runtime_error("injected");
            case fault_kind::no_memory: throw std::bad_alloc();
            case fault_kind::decode_error: return -3;
            default: break;
        }
        refused = headless && fault == fault_kind::no_hidden_rows;
        const int32_t code = refused ? 0 : decode_texts(batch, texts, n_texts);
        if (code || !refused) {
            return code;
        }
        compute_heads_from_now_on();
        return decode_texts(batch, texts, n_texts);
    });
    seconds.decoding += seconds_since(started);
    if (decoded.kind != failure_kind::none) {
        fail_all(decoded);
        return;
    }
    started = clock::now();
    const failure copied = caught([&] {
        int32_t first_token = 0;
        for (size_t k = 0; k < n_texts; ++k) {
            results[k] = fault == fault_kind::not_finite
                             ? make_failure(failure_kind::numerical, 0, "NaN or infinite")
                             : copy_rows(*texts[k], int32_t(k), first_token);
            tainted |= results[k].kind != failure_kind::none;
            first_token += texts[k]->n_tokens;
        }
        return failure();
    });
    seconds.copying += seconds_since(started);
    if (copied.kind != failure_kind::none) {
        fail_all(copied);
    }
}

// Fill the batch and decode it. Returns the result of llama_decode.
int32_t decoder::decode_texts(token_batch & batch, const item * const * texts, size_t n_texts) {
    if (const int32_t code = prepare_memory(batch, texts, n_texts)) {
        return code;
    }
    batch.clear();
    for (size_t k = 0; k < n_texts; ++k) {
        const item & text = *texts[k];
        batch.add(text.ids() + text.n_shared, text.n_tokens - text.n_shared, text.n_shared,
                  int32_t(k), wanted_outputs());
    }
    return decode_batch(batch);
}

// Decode a batch. If the LM head is left out, `hidden` has its rows then, or `refused` is set.
// Returns the result of llama_decode.
int32_t decoder::decode_batch(const token_batch & batch) {
    if (!headless) {
        return llama_decode(ctx, batch.batch);
    }
    n_hidden = 0;
    // Each call is one ubatch, which must be one graph with as many rows as it has outputs. So
    // llama.cpp has not split it in another way, and the rows are in order.
    for (int32_t first = 0; first < batch.n_tokens() && !refused; first += n_part) {
        llama_batch part = batch.batch;
        part.n_tokens = std::min(n_part, batch.n_tokens() - first);
        part.token += first;
        part.pos += first;
        part.n_seq_id += first;
        part.seq_id += first;
        part.logits += first;
        n_expected = std::count(part.logits, part.logits + part.n_tokens, 1);
        hidden.resize((n_hidden + n_expected) * llama_model_n_embd(model));
        taken = false;
        if (const int32_t code = llama_decode(ctx, part)) {
            return code;
        }
        refused |= !taken;
    }
    return 0;
}

// llama.cpp asks this about each node of a graph (`ask`), and calls it with the ones that it wanted
// after they were computed. Returns false to end the graph.
bool decoder::take_rows(ggml_tensor * tensor, bool ask) {
    const bool is_logits = std::strcmp(tensor->name, "result_output") == 0;
    constexpr float mark = 12345;
    if (ask && !taken) {
        return std::strcmp(tensor->name, "result_norm") == 0;
    }
    if (ask) {
        // Only the part of the graph on one device has ended. Devices skip nodes without this flag.
        tensor->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
        if (!watch_heads || !is_logits || ggml_is_empty(tensor)) {
            return false;
        }
        ggml_backend_tensor_set(tensor, &mark, 0, sizeof mark);
        return true;
    }
    if (taken && is_logits) {
        float first = 0;
        ggml_backend_tensor_get(tensor, &first, 0, sizeof first);
        n_heads += first != mark;
        return true;
    }
    const int64_t width = llama_model_n_embd(model);
    if (taken || tensor->type != GGML_TYPE_F32 || !ggml_is_contiguous(tensor) ||
        tensor->ne[0] != width || ggml_nelements(tensor) != width * n_expected) {
        refused = true;
        return true;
    }
    if (n_expected) {
        ggml_backend_tensor_get(tensor, hidden.data() + n_hidden * width, 0, ggml_nbytes(tensor));
    }
    n_hidden += n_expected;
    n_headless += 1;
    taken = true;
    return false;
}

// Remove the texts of the last pack from the memory of a causal model. If the texts of this pack
// share a prefix, compute it once and let every text continue from a copy of it. Returns the result
// of llama_decode.
int32_t decoder::prepare_memory(token_batch & batch, const item * const * texts, size_t n_texts) {
    const llama_memory_t memory = llama_get_memory(ctx);
    if (!memory) {
        return 0;
    }
    if (tainted) {
        // Clear the values too: attention multiplies values that a text must not see by zero, which
        // leaves NaN as NaN.
        llama_memory_clear(memory, /*data=*/true);
        shared.clear();
        tainted = false;
    }
    static const token_vector no_prefix;
    const token_vector & wanted = texts[0]->n_shared ? texts[0]->owner->shared : no_prefix;
    const auto prefix_seq_id = llama_seq_id(llama_n_seq_max(ctx) - 1);
    if (wanted.empty() || wanted != shared) {
        llama_memory_clear(memory, /*data=*/false);
        shared.clear();
        if (!wanted.empty()) {
            batch.clear();
            batch.add(wanted.data(), int32_t(wanted.size()), 0, prefix_seq_id,
                      headless ? output_tokens::none : output_tokens::all);
            if (const int32_t code = decode_batch(batch)) {
                return code;
            }
            shared = wanted;
        }
    } else {
        for (size_t seq_id = 0; seq_id < n_used; ++seq_id) {
            llama_memory_seq_rm(memory, llama_seq_id(seq_id), -1, -1);
        }
    }
    n_used = n_texts;
    for (size_t k = 0; k < n_texts; ++k) {
        if (texts[k]->n_shared) {
            llama_memory_seq_cp(memory, prefix_seq_id, llama_seq_id(k), -1, -1);
        }
    }
    return 0;
}

// The tokens of a text whose rows pooling needs.
output_tokens decoder::wanted_outputs() const {
    if (headless && params.pooling_type == LLAMA_POOLING_TYPE_LAST) {
        return output_tokens::last;
    }
    if (headless && params.pooling_type == LLAMA_POOLING_TYPE_CLS) {
        return output_tokens::first;
    }
    return output_tokens::all;
}

// The k-th row of a text, or null.
const float * decoder::row_of(const item & text, int32_t seq_id, int32_t first_token, int32_t k) {
    if (!headless) {
        return text.n_rows ? token_row(first_token + k) : sequence_row(seq_id);
    }
    const auto width = size_t(llama_model_n_embd(model));
    const size_t first = wanted_outputs() == output_tokens::all ? first_token + k : seq_id;
    const size_t n_rows = params.pooling_type == LLAMA_POOLING_TYPE_MEAN ? text.n_tokens : 1;
    if (first + n_rows > n_hidden) {
        return nullptr;
    }
    const float * row = hidden.data() + first * width;
    if (n_rows == 1) {
        return row;
    }
    mean.assign(row, row + width);
    for (size_t i = 1; i < n_rows; ++i) {
        for (size_t column = 0; column < width; ++column) {
            mean[column] += row[i * width + column];
        }
    }
    for (float & value : mean) {
        value /= float(n_rows);
    }
    return mean.data();
}

// Check the rows of a text, normalize them, and write them to their place.
failure decoder::copy_rows(const item & text, int32_t seq_id, int32_t first_token) {
    const job & j = *text.owner;
    const int32_t n_rows = std::max(text.n_rows, 1);
    for (int32_t k = 0; k < n_rows; ++k) {
        const float * row = row_of(text, seq_id, first_token, k);
        if (!row) {
            return make_failure(failure_kind::decode, 0, "llama.cpp has no row for this text");
        }
        const double l2 = l2_norm(row, j.width);
        if (!std::isfinite(l2)) {
            return make_failure(failure_kind::numerical, 0, "NaN or infinite");
        }
        if (l2 == 0 && !j.may_be_zero) {
            return make_failure(failure_kind::numerical, 0, "all zero");
        }
        const float scale = scale_of(row, j, l2);
        float * into = text.row + size_t(k) * j.width;
        for (int32_t i = 0; i < j.width; ++i) {
            into[i] = row[i] * scale;
        }
    }
    return failure();
}

}  // namespace llamacrab
