// A job: the texts of one call on their way through the scheduler.
//
// The scheduler's mutex guards everything that is marked [mutex]. Nothing here depends on
// llama.cpp.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tokens.hpp"

namespace llamacrab {

struct job;
struct chunk;

enum class failure_kind {
    none,
    decode,     // llama_decode returned an error
    no_room,    // the context's memory has no room for the tokens
    no_memory,  // an allocation failed
    numerical,  // the row is not finite, or all zero
    thrown,     // an exception of llama.cpp, or a failed assertion
    closed,
    cancelled,
};

struct failure {
    failure_kind kind = failure_kind::none;
    int32_t code = 0;    // the result of llama_decode
    int64_t index = -1;  // number of the text in its job
    std::string message;
};

inline failure make_failure(failure_kind kind, int32_t code, std::string message) {
    failure what;
    what.kind = kind;
    what.code = code;
    what.message = std::move(message);
    return what;
}

// One text.
struct item {
    job * owner = nullptr;
    int64_t index = 0;  // number of the text in its job
    size_t first = 0;   // where its ids start in the chunk's tokens
    int32_t n_tokens = 0;
    int32_t n_shared = 0;  // leading ids that are the job's `shared`: all of them or none
    float * row = nullptr;
    int32_t n_rows = 0;               // number of token rows to write; 0: one pooled row
    uint64_t hash = 0;                // of its ids, if equal texts are computed once
    item * next_duplicate = nullptr;  // [mutex] next text of the job with the same ids
    struct chunk * chunk = nullptr;

    const int32_t * ids() const;
};

// Texts that were admitted together. It is freed when the last of them is finished.
struct chunk {
    token_vector tokens;
    std::vector<item> items;
    size_t n_left = 0;  // [mutex] texts that are not finished
};

inline const int32_t * item::ids() const { return chunk->tokens.data() + first; }

// Wakes one thread.
class waiter {
  public:
    waiter();
    ~waiter();
    waiter(const waiter &) = delete;
    waiter & operator=(const waiter &) = delete;
    void wake();
    // Sleep until `wake` is called (true), or until a signal arrives or `microseconds` have passed
    // (false). A negative number means no limit.
    bool sleep(int64_t microseconds);

  private:
    void * lock;  // a PyThread_type_lock, held until `wake` releases it
    std::atomic<bool> woken{false};
};

// What each row is divided by.
enum class norm_kind {
    none,   // nothing
    p,      // the p-norm, p >= 1
    max,    // the largest absolute value
    int16,  // the largest absolute value, scaled to 32760: llama.cpp's embd_normalize = 0
};

struct job {
    norm_kind norm = norm_kind::none;
    double p = 2;              // for norm_kind::p
    int32_t width = 0;         // leading numbers of a row that are wanted
    bool dedup = true;         // compute equal texts once
    bool may_be_zero = false;  // otherwise a row of zeros is a failure
    token_vector shared;       // the shared prefix, if it is computed once
    uint8_t * done = nullptr;  // set to 1 for each text that has its row; may be null

    std::deque<item *> waiting;     // [mutex]
    int64_t waiting_tokens = 0;     // [mutex]
    int64_t n_open = 0;             // [mutex] texts that are admitted and not finished
    bool sealed = false;            // [mutex] no more texts will come
    bool linked = false;            // [mutex] is in the queue's list of jobs
    bool cancelled = false;         // [mutex]
    failure first_failure;          // [mutex]
    int64_t n_done = 0;             // [mutex] texts that have their row
    bool watched = false;           // [mutex] wake the caller after each pack, for progress
    void * on_done_data = nullptr;  // [mutex] returned by next_finished(), unless null
    bool reported = false;          // [mutex] was passed to next_finished()
    std::unordered_multimap<uint64_t, item *> in_flight;  // [mutex] by hash, one of equal texts
    waiter event;                                         // the state of this job has changed

    bool has_failed() const { return cancelled || first_failure.kind != failure_kind::none; }
    // No text is left, and none will come.
    bool is_over() const { return n_open == 0 && (sealed || has_failed()); }
};

}  // namespace llamacrab
