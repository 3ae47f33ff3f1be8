// The queue: which texts are computed next, and in which pack.
//
// Everything that the scheduler decides is decided here: the order of admission, which texts are
// duplicates, what a pack contains, and how many tokens may wait. There are no threads here and no
// llama.cpp: the scheduler holds its mutex during each call, except prepare().
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "job.hpp"

namespace llamacrab {

struct limits {
    int32_t pack_tokens = 0;   // tokens per pack; a longer text is a pack of its own
    int32_t pack_min = 0;      // smallest pack that is made to share work among workers; half of
                               // that, if a worker is idle
    int64_t queue_tokens = 0;  // tokens that may wait before a producer must
};

// What a worker can take at once.
struct worker_limits {
    int32_t pack_tokens = 0;
    size_t pack_texts = 0;
};

class text_queue {
  public:
    explicit text_queue(limits bounds) : bounds(bounds) {}

    // Sort and hash the texts of a chunk for admit(). Their owner, index, first, n_tokens and row
    // must be set.
    static void prepare(job & j, chunk & texts);
    // Add texts to a job. Returns false, and adds nothing, if the queue is closed or the job has
    // failed or was cancelled.
    bool admit(job & j, std::unique_ptr<chunk> texts);
    // Whether `n_tokens` more may be admitted now. If not and `wait` is true, the job gets a place
    // behind the producers that wait already. It is woken when there is room; then it must ask
    // again, or give its place up.
    bool has_room(job & j, int64_t n_tokens, bool wait);
    void give_up_place(job & j);
    // No more texts will come.
    void seal(job & j);
    // Drop what waits of a job. Texts in a running pack are finished by finish().
    void cancel(job & j);
    // Fail all jobs that wait, and admit no more.
    void close();

    // Fill `pack` with the texts that a worker should compute next.
    void take_pack(const worker_limits & worker, size_t n_workers, bool any_idle,
                   std::vector<item *> & pack);
    // End a text of a pack, and its duplicates: their row was written, or `what` went wrong.
    void finish(item & text, const failure & what);

    bool closed() const { return is_closed; }
    bool has_texts() const { return !jobs.empty(); }
    int64_t n_tokens() const { return n_waiting_tokens; }
    int64_t n_texts() const { return n_waiting_texts; }
    const limits & get_limits() const { return bounds; }
    void set_limits(const limits & bounds);

    // The `on_done_data` of jobs that have ended, each once.
    bool has_finished() const { return !finished.empty(); }
    void * take_finished();

  private:
    // A producer that waits for room. Those with a reservation come before those without.
    struct place {
        job * owner;
        int64_t n_tokens;
        bool reserved;  // the room is kept for it, and it was woken
    };

    std::deque<place>::iterator find_place(const job & j);
    bool fits(int64_t n_tokens) const;
    void leave_place(job & j);
    void wake_producers();
    bool add_to_duplicates(job & j, item & text);
    int64_t pack_room(const worker_limits & worker, size_t n_workers, bool any_idle) const;
    void take_from(job & j, const worker_limits & worker, int64_t & room,
                   std::vector<item *> & pack);
    void fail(job & j, failure what);
    void drop_waiting(job & j);
    void note_failure(const item & text, const failure & what) const;
    void report_if_over(job & j);

    limits bounds;
    std::deque<job *> jobs;       // jobs with waiting texts, the next to serve first
    std::deque<place> producers;  // those that wait for room, in the order in which they came
    std::deque<void *> finished;  // what take_finished() returns
    int64_t n_waiting_tokens = 0;
    int64_t n_waiting_texts = 0;
    int64_t n_reserved_tokens = 0;
    bool is_closed = false;
};

}  // namespace llamacrab
