// The scheduler: one queue, one worker thread a context. Nothing here holds the GIL.
//
// A call into Python becomes a `job`: texts, already token ids, each with the place where its row
// goes. Workers take packs of texts, of one job or of many, decode them, and write the rows.
// Callers that wait do so on a PyThread lock: it can be released without the GIL, and a signal
// interrupts it.
//
// One mutex guards all that is marked [mutex]; it is held to take a pack and to finish one, never
// while decoding.
#pragma once

#include <Python.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "llama.h"
#include "tokenization.hpp"

namespace llamacrab {

class scheduler;
struct job;

enum class failure_kind { none, decode, no_memory, numerical, thrown, closed, cancelled };

struct failure {
    failure_kind kind = failure_kind::none;
    int32_t code = 0;    // what llama_decode returned
    int64_t index = -1;  // which text of the job
    std::string message;
};

struct item {
    job * owner = nullptr;
    int64_t index = 0;
    size_t first = 0;  // place of its ids in the chunk's tokens
    int32_t n_tokens = 0;
    int32_t n_shared =
        0;  // of its first ids, those that are its job's `shared`; all or none of them
    float * row = nullptr;
    int32_t n_rows = 0;               // rows of tokens to write; 0: the one pooled row
    uint64_t hash = 0;                // of its ids, where equal texts are computed once
    item * next_duplicate = nullptr;  // [mutex] the next text of the job with the same ids
    struct chunk * chunk = nullptr;
};

// Texts that were admitted together; freed when the last of them is finished.
struct chunk {
    token_vector tokens;
    std::vector<item> items;
    size_t n_left = 0;  // [mutex]
};

// Wakes one thread. The lock is taken while nothing has happened, and released by `wake`.
class waiter {
  public:
    waiter();
    ~waiter();
    waiter(const waiter &) = delete;
    waiter & operator=(const waiter &) = delete;
    void wake();
    // Sleep until woken (true), or until a signal or `microseconds` (negative: none) have come.
    bool sleep(int64_t microseconds);

  private:
    PyThread_type_lock lock;
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
    double p = 2;       // for norm_kind::p
    int32_t width = 0;  // floats of a row that are wanted, from the first
    bool dedup = true;
    bool may_be_zero = false;  // else a row of zeros is a failure, as NaN is
    token_vector shared;  // ids with which most texts begin: computed once, where that is right
    uint8_t * done = nullptr;  // set to 1 for each text that has its row; may be null

    std::deque<item *> waiting;     // [mutex]
    int64_t waiting_tokens = 0;     // [mutex]
    int64_t n_open = 0;             // [mutex] admitted and not finished
    bool sealed = false;            // [mutex] no more texts will come
    bool linked = false;            // [mutex] in the scheduler's list
    bool cancelled = false;         // [mutex]
    failure first_failure;          // [mutex]
    int64_t n_done = 0;             // [mutex] texts that have their row
    bool watched = false;           // [mutex] wake the caller at every pack, for progress
    void * on_done_data = nullptr;  // [mutex] handed back by next_finished(), where not null
    bool reported = false;          // [mutex] handed to next_finished
    std::unordered_multimap<uint64_t, item *> in_flight;  // [mutex] first of each equal texts
    waiter event;                                         // something of this job has changed
};

struct pack_record {
    int32_t worker = 0;
    int32_t n_texts = 0;
    int32_t n_tokens = 0;
    double seconds = 0;       // from taking it to its last row
    double wait_seconds = 0;  // of the worker, for it
    double decode_seconds = 0;
    double copy_seconds = 0;
    int64_t queued_tokens = 0;  // when it had ended
};

struct worker_stats {
    int64_t n_packs = 0;
    int64_t n_texts = 0;
    int64_t n_tokens = 0;
    double wait_seconds = 0;
    double decode_seconds = 0;
    double copy_seconds = 0;
};

struct limits {
    int32_t pack_tokens = 0;  // tokens that a pack aims at; a longer text is a pack of its own
    int32_t pack_min =
        0;  // a pack is cut to no fewer tokens to share the rest out; half, if any idle
    int64_t queue_tokens = 0;  // tokens that may wait before a producer does
};

// For tests: make the next decodes fail as the real thing could.
enum class fault_kind { none, decode_error, no_memory, throws, not_finite };

class scheduler {
  public:
    explicit scheduler(limits bounds);
    ~scheduler();

    // Start a worker on a context, which stays the caller's to free, after close(). `params` makes
    // another one of `model`, should this one's state be in doubt. Models may differ in where they
    // lie, and in nothing else; a place may bear no more than `pack_tokens` and `pack_texts` at
    // once.
    void add_worker(llama_model * model, llama_context * context, llama_context_params params,
                    int32_t pack_tokens, int32_t pack_texts);

    // Queue texts of a job. `chunk` must hold items with owner, index, first, n_tokens, row set.
    // Returns false if the scheduler is closed or the job has failed or was cancelled.
    bool admit(job & j, std::unique_ptr<chunk> texts);
    // Whether `n_tokens` more may be queued now. If not, and the job is to wait, it takes a place
    // behind those that wait already, and is woken when it may; it must ask again then, or give the
    // place back.
    bool has_room(job & j, int64_t n_tokens, bool wait);
    void give_up_place(job & j);
    // No more texts will come. `on_done_data`, where not null, is what next_finished() will hand
    // back once the job has ended; returns false where it will not, as all workers have stopped:
    // the job is over then.
    bool seal(job & j, void * on_done_data);
    bool finished(job & j);
    int64_t n_done(job & j);
    // Drop what waits of a job, and abort a running pack that nobody else waits for.
    void cancel(job & j);
    // Block until no worker touches the job's memory any more.
    void await_quiet(job & j);

    failure failure_of(job & j);

    // Wait for the next finished job that has a `on_done_data`; null when closed and none is left.
    void * next_finished();

    void close();

    void set_limits(limits bounds);
    limits get_limits();

    int64_t queued_tokens();
    int64_t queued_texts();
    std::vector<worker_stats> stats();
    std::vector<pack_record> recent_packs();
    // Wait for packs that ended after the first `n_seen`, count them in, and return those of them
    // that are still remembered; none when closed and all have been returned.
    std::vector<pack_record> next_packs(int64_t & n_seen);
    void add_tokenize_seconds(double seconds);
    double tokenize_seconds();
    void inject(fault_kind kind, int64_t after, int64_t times);

  private:
    struct worker;
    // Of a producer that waits for room. Those that are called stand before those that are not.
    struct place {
        job * owner;
        int64_t n_tokens;
        bool called;
    };
    using clock = std::chrono::steady_clock;

    void run(worker & w);
    void take_pack(worker & w);                           // [mutex]
    void take_from(job & j, worker & w, int64_t & room);  // [mutex]
    void compute(worker & w);
    void compute_some(worker & w, size_t first, size_t n);
    failure decode(worker & w, const item * const * items, size_t n);
    int32_t prepare_memory(worker & w, const item * const * items, size_t n);
    failure copy_row(worker & w, const item & i, int32_t seq_id, int32_t first_token) const;
    void finish(worker & w, double seconds);
    void finish_item(item & i, const failure & what);  // [mutex]
    void fail(job & j, failure what);                  // [mutex]
    void drop_waiting(job & j);                        // [mutex]
    bool is_over(const job & j) const;                 // [mutex]
    void settle(job & j);                              // [mutex]
    void wake_producers();                             // [mutex]
    void leave_place(job & j);                         // [mutex]
    void stop_if_unwanted(worker & w);                 // [mutex]
    fault_kind next_fault();

    std::mutex mutex;
    std::condition_variable work;     // workers: something waits, or stop
    std::condition_variable quiet;    // await_quiet, next_packs: a pack has ended, or stop
    std::condition_variable reports;  // next_finished: a job has ended, or stop
    limits bounds;                    // [mutex]
    std::deque<job *> jobs;           // [mutex] those with waiting texts, the next to serve first
    std::deque<place> blocked;     // [mutex] producers that wait for room, the first to come first
    int64_t n_granted_tokens = 0;  // [mutex] of places that are called
    std::deque<void *> ended;  // [mutex] the `on_done_data` of jobs that next_finished will return
    int64_t n_waiting_tokens = 0;              // [mutex]
    int64_t n_waiting_texts = 0;               // [mutex]
    int64_t n_idle = 0;                        // [mutex] workers that wait for texts
    bool stopping = false;                     // [mutex]
    bool drained = false;                      // [mutex] no worker is left
    std::deque<pack_record> packs;             // [mutex] the last ones
    int64_t n_packs = 0;                       // [mutex] that have ended
    double seconds_tokenizing = 0;             // [mutex]
    fault_kind fault = fault_kind::none;       // [mutex]
    int64_t fault_after = 0, fault_times = 0;  // [mutex]

    std::vector<std::unique_ptr<worker>> workers;
};

}  // namespace llamacrab
