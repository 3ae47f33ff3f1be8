// The scheduler: one queue, and one worker thread per context. Nothing here holds the GIL.
//
// A call from Python becomes a `job`. Workers take packs of texts from the queue, of one job or of
// several, compute them, and write the rows. A caller that waits sleeps on its job's `event`.
//
// One mutex guards the queue and everything that is marked [mutex]. It is held to take a pack and
// to finish one, never while decoding.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "decoder.hpp"
#include "job.hpp"
#include "queue.hpp"

namespace llamacrab {

struct pack_record {
    int32_t worker = 0;
    int32_t n_texts = 0;
    int32_t n_tokens = 0;
    double seconds = 0;       // from taking it until its last row is written
    int32_t n_threads = 0;    // that its computation could use
    double wait_seconds = 0;  // that the worker waited for it
    double decode_seconds = 0;
    double copy_seconds = 0;
    int64_t queued_tokens = 0;  // at its end
};

struct worker_stats {
    int64_t n_packs = 0;
    int64_t n_texts = 0;
    int64_t n_tokens = 0;
    double wait_seconds = 0;
    double decode_seconds = 0;
    double copy_seconds = 0;
};

class scheduler {
  public:
    explicit scheduler(limits bounds);
    ~scheduler();

    // Start a worker. The decoder belongs to the caller, who keeps it until close() has returned.
    // The models of all decoders must be the same, except for the device that they are on.
    // While it waits for texts, another worker may use `n_spare_threads` more.
    void add_worker(decoder & computes, int32_t pack_tokens, int32_t pack_texts,
                    int32_t n_spare_threads);
    // Stop all workers, fail all jobs, and return when no worker is left.
    void close();

    // See text_queue.
    bool admit(job & j, std::unique_ptr<chunk> texts);
    bool has_room(job & j, int64_t n_tokens, bool wait);
    void give_up_place(job & j);

    // No more texts will come. When the job has ended, next_finished() returns `on_done_data`,
    // unless it is null. Returns false if next_finished() will not, because all workers have
    // stopped; then the job is over.
    bool seal(job & j, void * on_done_data);
    // Drop what waits of a job, and stop a running pack if all its jobs are cancelled.
    void cancel(job & j);
    // Wait until no worker uses the job's memory any more.
    void await_quiet(job & j);
    bool finished(job & j);
    int64_t n_done(job & j);
    failure failure_of(job & j);

    // Wait for the next job that has ended and has `on_done_data`. Returns null if the scheduler is
    // closed and none is left.
    void * next_finished();

    void set_limits(limits bounds);
    limits get_limits();

    int64_t queued_tokens();
    int64_t queued_texts();
    std::vector<worker_stats> stats();
    std::vector<pack_record> recent_packs();
    // Wait for packs that ended after the first `n_seen`, add their number to it, and return those
    // that are still stored. Returns none if the scheduler is closed and all were returned.
    std::vector<pack_record> next_packs(int64_t & n_seen);
    void add_tokenize_seconds(double seconds);
    double tokenize_seconds();
    // For tests: simulate a fault in `times` decodes, after the next `after` ones.
    void inject(fault_kind kind, int64_t after, int64_t times);

  private:
    struct worker;
    using clock = std::chrono::steady_clock;

    void run(worker & w);
    bool take_pack(worker & w);
    void compute(worker & w);
    void compute_some(worker & w, size_t first, size_t n_texts);
    void finish(worker & w, double seconds);
    void record_pack(worker & w, double seconds);  // [mutex]
    void stop_if_unwanted(worker & w);             // [mutex]
    void report_finished();                        // [mutex]
    fault_kind next_fault();

    std::mutex mutex;
    std::condition_variable work;         // workers wait for texts, or for close()
    std::condition_variable quiet;        // await_quiet, next_packs wait for the end of a pack
    std::condition_variable reports;      // next_finished waits for the end of a job
    text_queue queue;                     // [mutex]
    int64_t n_idle = 0;                   // [mutex] workers that wait for texts
    int32_t n_spare_threads = 0;          // [mutex] of those
    bool drained = false;                 // [mutex] closed, and no worker is left
    std::deque<pack_record> packs;        // [mutex] the last ones
    int64_t n_packs = 0;                  // [mutex] packs that have ended
    double seconds_tokenizing = 0;        // [mutex]
    fault_kind fault = fault_kind::none;  // [mutex]
    int64_t fault_after = 0;              // [mutex]
    int64_t fault_times = 0;              // [mutex]

    std::vector<std::unique_ptr<worker>> workers;
};

}  // namespace llamacrab
