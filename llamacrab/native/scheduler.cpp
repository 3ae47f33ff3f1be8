#include "scheduler.hpp"

#include <algorithm>
#include <thread>
#include <utility>

#include "../kernels/kernels.hpp"

namespace llamacrab {

namespace {

constexpr size_t max_stored_packs = 4096;

double seconds_between(std::chrono::steady_clock::time_point a,
                       std::chrono::steady_clock::time_point b) {
    return std::chrono::duration<double>(b - a).count();
}

}  // namespace

struct scheduler::worker {
    int32_t number;
    decoder & computes;
    worker_limits bounds;
    int32_t n_spare_threads;
    int32_t n_extra_threads = 0;  // for this pack
    token_batch batch;
    std::vector<item *> pack;
    std::vector<failure> results;  // one for each text of the pack
    decode_seconds seconds;        // of this pack
    pack_record record;            // of this pack
    worker_stats stats;            // [mutex]
    std::thread thread;

    worker(int32_t number, decoder & computes, worker_limits bounds, int32_t n_spare_threads)
        : number(number),
          computes(computes),
          bounds(bounds),
          n_spare_threads(n_spare_threads),
          batch(int32_t(llama_n_batch(computes.context()))) {}
};

// ------------------------------------------------------------------------------------- life cycle

scheduler::scheduler(limits bounds) : queue(bounds) {}

scheduler::~scheduler() { close(); }

void scheduler::add_worker(decoder & computes, int32_t pack_tokens, int32_t pack_texts,
                           int32_t n_spare_threads) {
    auto made =
        std::make_unique<worker>(int32_t(workers.size()), computes,
                                 worker_limits{pack_tokens, size_t(pack_texts)}, n_spare_threads);
    worker & w = *made;
    {
        std::lock_guard<std::mutex> hold(mutex);
        workers.push_back(std::move(made));
    }
    w.thread = std::thread([this, &w] { run(w); });
}

void scheduler::close() {
    {
        std::lock_guard<std::mutex> hold(mutex);
        if (drained) {
            return;  // the decoders may be gone
        }
        queue.close();
        for (auto & w : workers) {
            w->computes.abort = true;
        }
        work.notify_all();
        report_finished();
    }
    for (auto & w : workers) {
        if (w->thread.joinable()) {
            w->thread.join();
        }
    }
    std::lock_guard<std::mutex> hold(mutex);
    drained = true;
    reports.notify_all();
    quiet.notify_all();
}

// ------------------------------------------------------------------------------------- jobs

bool scheduler::has_room(job & j, int64_t n_tokens, bool wait) {
    std::lock_guard<std::mutex> hold(mutex);
    return queue.has_room(j, n_tokens, wait);
}

void scheduler::give_up_place(job & j) {
    std::lock_guard<std::mutex> hold(mutex);
    queue.give_up_place(j);
}

bool scheduler::admit(job & j, std::unique_ptr<chunk> texts) {
    text_queue::prepare(j, *texts);
    std::lock_guard<std::mutex> hold(mutex);
    if (!queue.admit(j, std::move(texts))) {
        report_finished();
        return false;
    }
    if (queue.n_tokens() > queue.get_limits().pack_min / 2) {
        work.notify_all();
    } else {
        work.notify_one();
    }
    return true;
}

bool scheduler::seal(job & j, void * on_done_data) {
    std::lock_guard<std::mutex> hold(mutex);
    // After close(), the thread that calls next_finished() may have ended. Before, it has not: jobs
    // that end are reported before `drained` is set.
    if (!drained) {
        j.on_done_data = on_done_data;
    }
    queue.seal(j);
    report_finished();
    return !drained;
}

bool scheduler::finished(job & j) {
    std::lock_guard<std::mutex> hold(mutex);
    return j.is_over();
}

int64_t scheduler::n_done(job & j) {
    std::lock_guard<std::mutex> hold(mutex);
    return j.n_done;
}

failure scheduler::failure_of(job & j) {
    std::lock_guard<std::mutex> hold(mutex);
    return j.first_failure;
}

void scheduler::cancel(job & j) {
    std::lock_guard<std::mutex> hold(mutex);
    queue.cancel(j);
    report_finished();
    for (auto & w : workers) {
        stop_if_unwanted(*w);
    }
}

void scheduler::stop_if_unwanted(worker & w) {
    const auto unwanted = [](const item * text) { return text->owner->cancelled; };
    if (!w.pack.empty() && std::all_of(w.pack.begin(), w.pack.end(), unwanted)) {
        w.computes.abort = true;
    }
}

void scheduler::await_quiet(job & j) {
    std::unique_lock<std::mutex> hold(mutex);
    quiet.wait(hold, [&] { return j.n_open == 0; });
    queue.give_up_place(j);
}

void * scheduler::next_finished() {
    std::unique_lock<std::mutex> hold(mutex);
    reports.wait(hold, [&] { return drained || queue.has_finished(); });
    return queue.has_finished() ? queue.take_finished() : nullptr;
}

void scheduler::report_finished() {
    if (queue.has_finished()) {
        reports.notify_one();
    }
}

// ------------------------------------------------------------------------------------- workers

void scheduler::run(worker & w) {
    while (take_pack(w)) {
        const auto started = clock::now();
        compute(w);
        finish(w, seconds_between(started, clock::now()));
    }
}

// Wait for texts. Returns false if the scheduler was closed.
bool scheduler::take_pack(worker & w) {
    const auto idle_since = clock::now();
    std::unique_lock<std::mutex> hold(mutex);
    n_idle += 1;
    n_spare_threads += w.n_spare_threads;
    work.wait(hold, [&] { return queue.closed() || queue.has_texts(); });
    n_idle -= 1;
    n_spare_threads -= w.n_spare_threads;
    if (queue.closed()) {
        return false;
    }
    queue.take_pack(w.bounds, workers.size(), n_idle > 0, w.pack);
    w.n_extra_threads = queue.has_texts() ? 0 : n_spare_threads;
    w.computes.abort = false;
    w.seconds = decode_seconds();
    w.record = pack_record();
    w.record.n_threads = llama_n_threads_batch(w.computes.context()) + w.n_extra_threads;
    w.record.wait_seconds = seconds_between(idle_since, clock::now());
    return true;
}

void scheduler::compute(worker & w) {
    const kernels::extra_threads scope(w.n_extra_threads);
    w.results.assign(w.pack.size(), failure());
    compute_some(w, 0, w.pack.size());
    if (w.pack.size() == 1) {
        return;
    }
    // One text must not fail the others, and a NaN in one reaches the rows of all where rows are
    // products with zeros. So each text that has failed is computed again, alone.
    for (size_t k = 0; k < w.pack.size(); ++k) {
        if (w.results[k].kind == failure_kind::none) {
            continue;
        }
        if (w.computes.abort) {
            w.results[k] = make_failure(failure_kind::cancelled, 0, "aborted");
        } else {
            compute_some(w, k, 1);
        }
    }
}

void scheduler::compute_some(worker & w, size_t first, size_t n_texts) {
    w.computes.compute(w.batch, &w.pack[first], n_texts, next_fault(), &w.results[first],
                       w.seconds);
}

void scheduler::finish(worker & w, double seconds) {
    std::lock_guard<std::mutex> hold(mutex);
    record_pack(w, seconds);
    std::vector<item *> done;
    done.swap(w.pack);
    for (size_t k = 0; k < done.size(); ++k) {
        queue.finish(*done[k], w.results[k]);
    }
    report_finished();
    quiet.notify_all();
}

// ------------------------------------------------------------------------------------- statistics

void scheduler::record_pack(worker & w, double seconds) {
    pack_record & record = w.record;
    record.worker = w.number;
    record.n_texts = int32_t(w.pack.size());
    record.seconds = seconds;
    record.decode_seconds = w.seconds.decoding;
    record.copy_seconds = w.seconds.copying;
    record.queued_tokens = queue.n_tokens();
    for (const item * text : w.pack) {
        record.n_tokens += text->n_tokens - text->n_shared;
    }
    packs.push_back(record);
    n_packs += 1;
    if (packs.size() > max_stored_packs) {
        packs.pop_front();
    }
    w.stats.n_packs += 1;
    w.stats.n_texts += record.n_texts;
    w.stats.n_tokens += record.n_tokens;
    w.stats.wait_seconds += record.wait_seconds;
    w.stats.decode_seconds += record.decode_seconds;
    w.stats.copy_seconds += record.copy_seconds;
}

void scheduler::set_limits(limits bounds) {
    std::lock_guard<std::mutex> hold(mutex);
    queue.set_limits(bounds);
}

limits scheduler::get_limits() {
    std::lock_guard<std::mutex> hold(mutex);
    return queue.get_limits();
}

int64_t scheduler::queued_tokens() {
    std::lock_guard<std::mutex> hold(mutex);
    return queue.n_tokens();
}

int64_t scheduler::queued_texts() {
    std::lock_guard<std::mutex> hold(mutex);
    return queue.n_texts();
}

std::vector<worker_stats> scheduler::stats() {
    std::lock_guard<std::mutex> hold(mutex);
    std::vector<worker_stats> all;
    for (const auto & w : workers) {
        all.push_back(w->stats);
    }
    return all;
}

std::vector<pack_record> scheduler::recent_packs() {
    std::lock_guard<std::mutex> hold(mutex);
    return {packs.begin(), packs.end()};
}

std::vector<pack_record> scheduler::next_packs(int64_t & n_seen) {
    std::unique_lock<std::mutex> hold(mutex);
    quiet.wait(hold, [&] { return drained || n_packs > n_seen; });
    const auto n_new = ptrdiff_t(std::min<int64_t>(n_packs - n_seen, int64_t(packs.size())));
    n_seen = n_packs;
    return {packs.end() - n_new, packs.end()};
}

void scheduler::add_tokenize_seconds(double seconds) {
    std::lock_guard<std::mutex> hold(mutex);
    seconds_tokenizing += seconds;
}

double scheduler::tokenize_seconds() {
    std::lock_guard<std::mutex> hold(mutex);
    return seconds_tokenizing;
}

// ------------------------------------------------------------------------------------- for tests

void scheduler::inject(fault_kind kind, int64_t after, int64_t times) {
    std::lock_guard<std::mutex> hold(mutex);
    fault = kind;
    fault_after = after;
    fault_times = times;
}

fault_kind scheduler::next_fault() {
    std::lock_guard<std::mutex> hold(mutex);
    if (fault == fault_kind::none || fault_after-- > 0 || fault_times-- <= 0) {
        return fault_kind::none;
    }
    return fault;
}

}  // namespace llamacrab
