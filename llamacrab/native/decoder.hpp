// From token ids to rows, with one llama_context.
//
// This is the only code that calls llama_decode. The scheduler's workers use it, and so does the
// low-level API (`Context` and `Batch`).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "job.hpp"
#include "llama.h"

namespace llamacrab {

// The tokens of a sequence whose rows llama.cpp computes to the end.
enum class output_tokens { all, first, last, none };

// Tokens of one or more sequences, for one call of llama_decode.
class token_batch {
  public:
    explicit token_batch(int32_t capacity) : batch(llama_batch_init(capacity, 0, 1)) {}
    ~token_batch() { llama_batch_free(batch); }
    token_batch(const token_batch &) = delete;
    token_batch & operator=(const token_batch &) = delete;

    void clear() { batch.n_tokens = 0; }
    // Append tokens of a sequence, at the positions from `first_pos`. The batch must have room.
    void add(const int32_t * ids, int32_t n_tokens, int32_t first_pos, int32_t seq_id,
             output_tokens outputs = output_tokens::all);

    int32_t n_tokens() const { return batch.n_tokens; }
    int32_t token(int32_t i) const { return batch.token[i]; }
    int32_t pos(int32_t i) const { return batch.pos[i]; }
    int32_t seq_id(int32_t i) const { return batch.seq_id[i][0]; }

  private:
    friend class decoder;
    llama_batch batch;
};

// For tests: what the next calls of decoder::compute() simulate.
enum class fault_kind { none, decode_error, no_memory, throws, not_finite, no_hidden_rows };

struct decode_seconds {
    double decoding = 0;
    double copying = 0;
};

// Owns a llama_context. One thread at a time may use it, except for `abort`.
class decoder {
  public:
    // Returns null if llama.cpp refuses; log_take_errors() has the reason. If `headless` is set and
    // the model is a decoder that allows it, compute() leaves out the LM head; then decode() gives
    // no rows.
    static std::unique_ptr<decoder> make(llama_model * model, llama_context_params params,
                                         bool headless = false);
    ~decoder();
    decoder(const decoder &) = delete;
    decoder & operator=(const decoder &) = delete;

    // The context. It is another one after compute() has met an exception, or a graph that it
    // cannot compute headless.
    llama_context * context() const { return ctx; }

    // ---- Any batch, and its rows, which are valid until the next call.

    // Compute a batch. Exceptions become failures too.
    failure decode(const token_batch & batch);
    // The pooled row of a sequence, or null.
    const float * sequence_row(int32_t seq_id) const {
        return llama_get_embeddings_seq(ctx, seq_id);
    }
    // The row of a token of the batch, or null.
    const float * token_row(int32_t index) const { return llama_get_embeddings_ith(ctx, index); }
    // Forget all sequences of a causal model.
    void clear_memory();

    // ---- Texts of a pack.

    // Compute `n_texts` texts together and write their rows. Nothing is thrown: `results` says for
    // each text what happened. `batch` must have room for the texts and for their shared prefix.
    void compute(token_batch & batch, const item * const * texts, size_t n_texts, fault_kind fault,
                 failure * results, decode_seconds & seconds);

    // Any thread may set this to stop a running computation. Only CPUs notice.
    std::atomic<bool> abort{false};

    // For tests: graphs that were cut off before the LM head, and if `watch_heads` is set, those
    // whose LM head was computed all the same.
    std::atomic<int64_t> n_headless{0}, n_heads{0};
    std::atomic<bool> watch_heads{false};

  private:
    decoder(llama_model * model, llama_context_params params) : model(model), params(params) {}

    template <class F>
    failure attempt(F && call);
    failure failure_of(int32_t code) const;
    int32_t decode_texts(token_batch & batch, const item * const * texts, size_t n_texts);
    int32_t prepare_memory(token_batch & batch, const item * const * texts, size_t n_texts);
    int32_t decode_batch(const token_batch & batch);
    bool take_rows(ggml_tensor * tensor, bool ask);
    output_tokens wanted_outputs() const;
    const float * row_of(const item & text, int32_t seq_id, int32_t first_token, int32_t k);
    failure copy_rows(const item & text, int32_t seq_id, int32_t first_token);
    void watch_abort();
    void renew() noexcept;
    void compute_heads_from_now_on();

    llama_model * model;
    llama_context * ctx = nullptr;
    llama_context_params params;
    // While the LM head is left out:
    bool headless = false;
    int32_t n_part = 0;  // tokens of a call
    llama_context_params params_with_head{};
    std::vector<float> hidden;  // rows of the output tokens, in the order of the batch
    size_t n_hidden = 0;        // of them, how many are there
    int64_t n_expected = 0;     // rows that the next graph must have
    bool taken = false;         // the running graph's rows were taken
    bool refused = false;       // a graph was not as expected
    std::vector<float> mean;    // row_of() returns it
    // What the context's memory holds because of compute():
    token_vector shared;   // a shared prefix, in the last sequence
    size_t n_used = 0;     // other sequences, from 0
    bool tainted = false;  // possibly NaN, or no longer `shared`
};

}  // namespace llamacrab
