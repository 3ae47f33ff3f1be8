#include "scheduler.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <optional>
#include <string_view>

#include "llama_guard.hpp"
#include "log.hpp"

namespace llamacrab {

namespace {

constexpr size_t kept_packs = 4096;

double seconds_between(std::chrono::steady_clock::time_point a,
                       std::chrono::steady_clock::time_point b) {
    return std::chrono::duration<double>(b - a).count();
}

failure make_failure(failure_kind kind, int32_t code, std::string message) {
    failure what;
    what.kind = kind;
    what.code = code;
    what.message = std::move(message);
    return what;
}

const llama_token * ids_of(const item & i) { return i.chunk->tokens.data() + i.first; }

uint64_t hash_of(const item & i) {
    const auto * bytes = reinterpret_cast<const char *>(ids_of(i));
    return std::hash<std::string_view>{}({bytes, size_t(i.n_tokens) * sizeof(llama_token)});
}

bool same_ids(const item & a, const item & b) {
    return a.n_tokens == b.n_tokens && std::equal(ids_of(a), ids_of(a) + a.n_tokens, ids_of(b));
}

bool begins_with(const item & i, const token_vector & ids) {
    return !ids.empty() && size_t(i.n_tokens) > ids.size() &&
           std::equal(ids.begin(), ids.end(), ids_of(i));
}

// Whether texts of two jobs may rest on the same shared ids.
bool share(const item & a, const item & b) {
    return a.n_shared && b.n_shared && (a.owner == b.owner || a.owner->shared == b.owner->shared);
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

}  // namespace

// ---------------------------------------------------------------------------------------- waiter

waiter::waiter() : lock(PyThread_allocate_lock()) {
    if (!lock) {
        throw std::bad_alloc();
    }
    PyThread_acquire_lock(lock, WAIT_LOCK);
}

waiter::~waiter() {
    wake();  // a lock is freed open
    PyThread_free_lock(lock);
}

void waiter::wake() {
    if (!woken.exchange(true)) {
        PyThread_release_lock(lock);
    }
}

bool waiter::sleep(int64_t microseconds) {
    if (PyThread_acquire_lock_timed(lock, microseconds, /*intr_flag=*/1) != PY_LOCK_ACQUIRED) {
        return false;
    }
    // A wake that comes before this line is not lost: the thread that slept checks the state
    // afterwards.
    woken = false;
    return true;
}

// ---------------------------------------------------------------------------------------- worker

struct scheduler::worker {
    int32_t number;
    llama_model * model = nullptr;
    llama_context * context = nullptr;
    llama_context_params params;
    int32_t pack_tokens = 0;  // the most that this place takes, beside the scheduler's bounds
    size_t pack_texts = 0;
    llama_context * renewed = nullptr;  // a context that replaced the first one: ours to free
    llama_batch batch;
    std::vector<item *> pack;
    std::vector<failure> results;  // one for each text of the pack
    worker_stats stats;            // [mutex]
    pack_record record;            // of this pack
    token_vector shared;           // ids that the context's memory holds, under its last seq_id
    size_t n_used = 0;             // sequences that its memory holds besides
    bool tainted = false;          // its memory may hold NaN, or no longer `shared`
    bool spoil = false;            // an injected fault: take its rows for NaN
    std::atomic<bool> abort{false};
    std::thread thread;

    worker(int32_t n, llama_model * m, llama_context * ctx, llama_context_params how)
        : number(n),
          model(m),
          context(ctx),
          params(how),
          batch(llama_batch_init(int32_t(llama_n_batch(ctx)), 0, 1)) {
        watch();
    }

    ~worker() {
        llama_batch_free(batch);
        free_renewed();
    }

    void free_renewed() {
        if (renewed) {
            llama_free(renewed);
        }
        renewed = nullptr;
    }

    void watch() {
        const auto on_abort = [](void * data) {
            const bool stop = static_cast<worker *>(data)->abort;
            log_mute(stop);
            return stop;
        };
        llama_set_abort_callback(context, on_abort, this);
    }

    // Leave a context whose state an exception has put in doubt; keep it where there is no other.
    void renew() noexcept {
        tainted = true;
        try {
            if (llama_context * fresh = make_context(model, params)) {
                free_renewed();
                context = renewed = fresh;
                watch();
            }
        } catch (...) {
            // The memory that lacked for the pack may lack for a context as well.
        }
    }
};

// ------------------------------------------------------------------------------------- life cycle

scheduler::scheduler(limits b) : bounds(b) {}

scheduler::~scheduler() { close(); }

void scheduler::add_worker(llama_model * model, llama_context * context,
                           llama_context_params params, int32_t pack_tokens, int32_t pack_texts) {
    auto made = std::make_unique<worker>(int32_t(workers.size()), model, context, params);
    worker & w = *made;
    w.pack_tokens = pack_tokens;
    w.pack_texts = size_t(pack_texts);
    {
        std::lock_guard<std::mutex> hold(mutex);
        workers.push_back(std::move(made));
    }
    w.thread = std::thread([this, &w] { run(w); });
}

void scheduler::close() {
    {
        std::lock_guard<std::mutex> hold(mutex);
        stopping = true;
        while (!jobs.empty()) {
            fail(*jobs.front(), make_failure(failure_kind::closed, 0, "closed"));
        }
        for (auto & w : workers) {
            w->abort = true;
        }
        wake_producers();
        work.notify_all();
    }
    for (auto & w : workers) {
        if (w->thread.joinable()) {
            w->thread.join();
        }
        w->free_renewed();  // now, while the model is sure to be there
    }
    std::lock_guard<std::mutex> hold(mutex);
    drained = true;
    reports.notify_all();
    quiet.notify_all();
}

// ------------------------------------------------------------------------------------- admission

bool scheduler::has_room(job & j, int64_t n_tokens, bool wait) {
    std::lock_guard<std::mutex> hold(mutex);
    const bool over = stopping || j.cancelled || j.first_failure.kind != failure_kind::none;
    const auto mine =
        std::find_if(blocked.begin(), blocked.end(), [&](place & p) { return p.owner == &j; });
    if (over || (mine != blocked.end() && mine->called)) {
        leave_place(j);
        if (over) {
            wake_producers();
        }
        return true;  // a job that is over need not wait to hear it from admit()
    }
    if (mine != blocked.end()) {
        return false;
    }
    // A small text must not pass a large one that waits: it might never find the queue empty
    // enough.
    const int64_t taken = n_waiting_tokens + n_granted_tokens;
    if ((blocked.empty() || blocked.back().called) &&
        (taken == 0 || taken + n_tokens <= bounds.queue_tokens)) {
        return true;
    }
    if (wait) {
        blocked.push_back({&j, n_tokens, false});
    }
    return false;
}

void scheduler::give_up_place(job & j) {
    std::lock_guard<std::mutex> hold(mutex);
    leave_place(j);
    wake_producers();
}

void scheduler::leave_place(job & j) {
    const auto mine =
        std::find_if(blocked.begin(), blocked.end(), [&](place & p) { return p.owner == &j; });
    if (mine != blocked.end()) {
        n_granted_tokens -= mine->called ? mine->n_tokens : 0;
        blocked.erase(mine);
    }
}

bool scheduler::admit(job & j, std::unique_ptr<chunk> texts) {
    // Long texts first: they are packs of their own, and what is left at the end packs finely.
    auto & items = texts->items;
    for (item & i : items) {
        i.chunk = texts.get();
    }
    std::stable_sort(items.begin(), items.end(),
                     [](const item & a, const item & b) { return a.n_tokens > b.n_tokens; });
    for (item & i : items) {
        i.hash = j.dedup ? hash_of(i) : 0;
        i.n_shared = begins_with(i, j.shared) ? int32_t(j.shared.size()) : 0;
    }
    std::lock_guard<std::mutex> hold(mutex);
    if (stopping) {
        fail(j, make_failure(failure_kind::closed, 0, "closed"));
    }
    if (j.cancelled || j.first_failure.kind != failure_kind::none) {
        wake_producers();  // the room that has_room() gave it is free again
        return false;
    }
    if (items.empty()) {
        return true;
    }
    texts->n_left = items.size();
    j.n_open += int64_t(items.size());
    for (item & i : items) {
        if (j.dedup) {
            const auto [begin, end] = j.in_flight.equal_range(i.hash);
            const auto twin =
                std::find_if(begin, end, [&](auto & kept) { return same_ids(*kept.second, i); });
            if (twin != end) {
                i.next_duplicate = twin->second->next_duplicate;
                twin->second->next_duplicate = &i;
                continue;
            }
            j.in_flight.emplace(i.hash, &i);
        }
        j.waiting.push_back(&i);
        j.waiting_tokens += i.n_tokens;
        n_waiting_tokens += i.n_tokens;
        n_waiting_texts += 1;
    }
    if (!j.linked && !j.waiting.empty()) {
        j.linked = true;
        jobs.push_back(&j);
    }
    texts.release();   // finish_item frees it
    wake_producers();  // where equal texts take less room than it was given
    if (n_waiting_tokens > bounds.pack_min / 2) {
        work.notify_all();
    } else {
        work.notify_one();
    }
    return true;
}

bool scheduler::seal(job & j, void * on_done_data) {
    std::lock_guard<std::mutex> hold(mutex);
    j.sealed = true;
    // After close(), the thread that waits in next_finished() may have left. Before, it has not:
    // the jobs that end are reported before `drained` is set.
    if (!drained) {
        j.on_done_data = on_done_data;
    }
    settle(j);
    return !drained;
}

// ------------------------------------------------------------------------------------- the end

bool scheduler::is_over(const job & j) const {
    return j.n_open == 0 && (j.sealed || j.cancelled || j.first_failure.kind != failure_kind::none);
}

bool scheduler::finished(job & j) {
    std::lock_guard<std::mutex> hold(mutex);
    return is_over(j);
}

int64_t scheduler::n_done(job & j) {
    std::lock_guard<std::mutex> hold(mutex);
    return j.n_done;
}

void scheduler::settle(job & j) {
    if (!is_over(j)) {
        return;
    }
    if (j.on_done_data && !j.reported) {
        j.reported = true;
        ended.push_back(j.on_done_data);
        reports.notify_one();
    }
    j.event.wake();
}

void scheduler::fail(job & j, failure what) {
    if (j.first_failure.kind == failure_kind::none) {
        j.first_failure = std::move(what);
    }
    drop_waiting(j);
    settle(j);
    j.event.wake();  // a producer that waits for room need not wait any longer
}

void scheduler::cancel(job & j) {
    std::lock_guard<std::mutex> hold(mutex);
    j.cancelled = true;
    leave_place(j);
    fail(j, make_failure(failure_kind::cancelled, 0, "cancelled"));
    for (auto & w : workers) {
        stop_if_unwanted(*w);
    }
}

void scheduler::stop_if_unwanted(worker & w) {
    const auto unwanted = [](const item * i) { return i->owner->cancelled; };
    if (!w.pack.empty() && std::all_of(w.pack.begin(), w.pack.end(), unwanted)) {
        w.abort = true;
    }
}

void scheduler::drop_waiting(job & j) {
    n_waiting_tokens -= j.waiting_tokens;
    n_waiting_texts -= int64_t(j.waiting.size());
    std::deque<item *> dropped;
    dropped.swap(j.waiting);
    j.waiting_tokens = 0;
    if (j.linked) {
        j.linked = false;
        jobs.erase(std::find(jobs.begin(), jobs.end(), &j));
    }
    for (item * i : dropped) {
        finish_item(*i, j.first_failure);
    }
    wake_producers();
}

void scheduler::await_quiet(job & j) {
    std::unique_lock<std::mutex> hold(mutex);
    quiet.wait(hold, [&] { return j.n_open == 0; });
    leave_place(j);
    wake_producers();
}

failure scheduler::failure_of(job & j) {
    std::lock_guard<std::mutex> hold(mutex);
    return j.first_failure;
}

void * scheduler::next_finished() {
    std::unique_lock<std::mutex> hold(mutex);
    reports.wait(hold, [&] { return drained || !ended.empty(); });
    if (ended.empty()) {
        return nullptr;
    }
    void * on_done_data = ended.front();
    ended.pop_front();
    return on_done_data;
}

void scheduler::wake_producers() {
    for (place & p : blocked) {
        const int64_t taken = n_waiting_tokens + n_granted_tokens;
        if (p.called) {
            continue;
        }
        if (!stopping && taken > 0 && taken + p.n_tokens > bounds.queue_tokens) {
            return;
        }
        p.called = true;
        n_granted_tokens += p.n_tokens;
        p.owner->event.wake();
    }
}

// ------------------------------------------------------------------------------------- packing

void scheduler::take_pack(worker & w) {
    w.pack.clear();
    w.abort = false;
    // No pack takes more than a worker's share of what waits, so that at the end of a job all
    // workers finish together; but packs too small would pay their fixed cost too often. Where
    // another worker has nothing to do, a smaller pack makes the texts ready sooner and costs
    // nothing.
    const auto n_workers = int64_t(workers.size());
    const int64_t share = (n_waiting_tokens + n_workers - 1) / n_workers;
    const int64_t least = n_idle ? bounds.pack_min / 2 : bounds.pack_min;
    const int64_t most = std::min(bounds.pack_tokens, w.pack_tokens);
    int64_t room = std::min(std::max(share, least), most);

    // Every job heads a pack in its turn, so that a bulk job does not starve a single text. A job
    // whose next text did not fit keeps its place at the front.
    std::vector<job *> passed;
    for (size_t turns = jobs.size(); turns > 0 && room > 0 && w.pack.size() < w.pack_texts;
         --turns) {
        job * j = jobs.front();
        jobs.pop_front();
        const size_t before = w.pack.size();
        take_from(*j, w, room);
        if (j->waiting.empty()) {
            j->linked = false;
        } else if (w.pack.size() == before) {
            passed.push_back(j);
        } else {
            jobs.push_back(j);
        }
    }
    jobs.insert(jobs.begin(), passed.begin(), passed.end());
    wake_producers();
}

void scheduler::take_from(job & j, worker & w, int64_t & room) {
    while (!j.waiting.empty() && w.pack.size() < w.pack_texts) {
        item * next = j.waiting.front();
        if (!w.pack.empty() && !share(*next, *w.pack.front())) {
            next->n_shared = 0;  // a pack rests on the shared ids of its first text, or on none
        }
        const int32_t cost = next->n_tokens - next->n_shared;
        if (cost > room && !w.pack.empty()) {
            next->n_shared = begins_with(*next, j.shared) ? int32_t(j.shared.size()) : 0;
            return;
        }
        j.waiting.pop_front();
        j.waiting_tokens -= next->n_tokens;
        n_waiting_tokens -= next->n_tokens;
        n_waiting_texts -= 1;
        room -= cost;
        w.pack.push_back(next);
    }
}

// ------------------------------------------------------------------------------------- computing

void scheduler::run(worker & w) {
    for (;;) {
        const auto idle_since = clock::now();
        {
            std::unique_lock<std::mutex> hold(mutex);
            n_idle += 1;
            work.wait(hold, [&] { return stopping || !jobs.empty(); });
            n_idle -= 1;
            if (stopping) {
                return;
            }
            take_pack(w);
            w.record = pack_record();
            w.record.wait_seconds = seconds_between(idle_since, clock::now());
        }
        const auto started = clock::now();
        compute(w);
        finish(w, seconds_between(started, clock::now()));
    }
}

void scheduler::compute(worker & w) {
    w.results.assign(w.pack.size(), failure());
    compute_some(w, 0, w.pack.size());
    if (w.pack.size() == 1) {
        return;
    }
    // One text must not fail its neighbours, and a NaN of one reaches the rows of all where rows
    // are products with zeros: each that has failed is computed alone, and fails or not by itself.
    for (size_t k = 0; k < w.pack.size(); ++k) {
        if (w.results[k].kind == failure_kind::none) {
            continue;
        }
        if (w.abort) {
            w.results[k] = make_failure(failure_kind::cancelled, 0, "aborted");
        } else {
            compute_some(w, k, 1);
        }
    }
}

// Compute `n` texts of the pack together. Nothing is thrown: each has its result.
void scheduler::compute_some(worker & w, size_t first, size_t n) {
    const auto results = w.results.begin() + ptrdiff_t(first);
    const auto give_up = [&](failure_kind kind, const char * message) {
        std::fill_n(results, n, make_failure(kind, kind == failure_kind::thrown ? -3 : 0, message));
        w.renew();
    };
    try {
        const item * const * items = &w.pack[first];
        const failure together = decode(w, items, n);
        std::fill_n(results, n, together);
        if (together.kind != failure_kind::none) {
            w.tainted = true;
            return;
        }
        int32_t first_token = 0;
        const auto started = clock::now();
        for (size_t k = 0; k < n; ++k) {
            results[ptrdiff_t(k)] = copy_row(w, *items[k], int32_t(k), first_token);
            w.tainted |= results[ptrdiff_t(k)].kind != failure_kind::none;
            first_token += items[k]->n_tokens;
        }
        w.record.copy_seconds += seconds_between(started, clock::now());
    } catch (const std::bad_alloc &) {
        give_up(failure_kind::no_memory, "out of memory");
    } catch (const std::exception & error) {
        give_up(failure_kind::thrown, error.what());
    } catch (...) {
        give_up(failure_kind::thrown, "unknown exception");
    }
}

namespace {

// Add the tokens [first, n_tokens) of a text to a batch.
void add_to(llama_batch & batch, const llama_token * ids, int32_t first, int32_t n_tokens,
            size_t seq_id) {
    for (int32_t pos = first; pos < n_tokens; ++pos) {
        const int32_t at = batch.n_tokens++;
        batch.token[at] = ids[pos];
        batch.pos[at] = pos;
        batch.n_seq_id[at] = 1;
        batch.seq_id[at][0] = llama_seq_id(seq_id);
        batch.logits[at] = 1;  // llama.cpp wants every token as an output for embeddings
    }
}

}  // namespace

failure scheduler::decode(worker & w, const item * const * items, size_t n) {
    const auto started = clock::now();
    llama_batch & batch = w.batch;
    // On this thread alone an assertion of llama.cpp can be caught, as any other exception.
    std::optional<throwing_asserts> scope;
    if (w.params.n_threads_batch == 1) {
        scope.emplace();
    }
    const fault_kind injected = next_fault();
    if (injected == fault_kind::throws) {
        throw std::runtime_error("injected");
    }
    if (injected == fault_kind::no_memory) {
        throw std::bad_alloc();
    }
    w.spoil = injected == fault_kind::not_finite;
    log_take_errors();
    int32_t code = prepare_memory(w, items, n);
    batch.n_tokens = 0;
    for (size_t seq_id = 0; seq_id < n; ++seq_id) {
        add_to(batch, ids_of(*items[seq_id]), items[seq_id]->n_shared, items[seq_id]->n_tokens,
               seq_id);
    }
    if (code == 0) {
        code = injected == fault_kind::decode_error ? -3 : llama_decode(w.context, batch);
    }
    llama_synchronize(w.context);
    log_mute(false);
    w.record.decode_seconds += seconds_between(started, clock::now());
    if (code == 0) {
        return failure();
    }
    if (w.abort) {
        return make_failure(failure_kind::cancelled, code, "aborted");
    }
    if (code == 1) {
        return make_failure(failure_kind::decode, code,
                            "the context's memory has no room for these tokens");
    }
    return make_failure(failure_kind::decode, code, log_take_errors());
}

// Empty the memory of a causal model of the texts before, and have it hold what these share: ids
// that all texts of a call begin with are computed once, and every text goes on from them. Returns
// what llama_decode did.
int32_t scheduler::prepare_memory(worker & w, const item * const * items, size_t n) {
    const llama_memory_t memory = llama_get_memory(w.context);
    if (!memory) {
        return 0;
    }
    if (w.tainted) {
        // The values too, not their places only: attention multiplies what it does not see by zero.
        llama_memory_clear(memory, /*data=*/true);
        w.shared.clear();
        w.tainted = false;
    }
    static const token_vector none;
    const token_vector & shared = items[0]->n_shared ? items[0]->owner->shared : none;
    const auto keeper = llama_seq_id(llama_n_seq_max(w.context) - 1);
    if (shared.empty() || shared != w.shared) {
        llama_memory_clear(memory, false);
        w.shared.clear();
        w.batch.n_tokens = 0;
        add_to(w.batch, shared.data(), 0, int32_t(shared.size()), size_t(keeper));
        if (const int32_t code = shared.empty() ? 0 : llama_decode(w.context, w.batch)) {
            return code;
        }
        w.shared = shared;
    } else {
        for (size_t seq_id = 0; seq_id < w.n_used; ++seq_id) {
            llama_memory_seq_rm(memory, llama_seq_id(seq_id), -1, -1);
        }
    }
    w.n_used = n;
    for (size_t seq_id = 0; seq_id < n; ++seq_id) {
        if (items[seq_id]->n_shared) {
            llama_memory_seq_cp(memory, keeper, llama_seq_id(seq_id), -1, -1);
        }
    }
    return 0;
}

failure scheduler::copy_row(worker & w, const item & i, int32_t seq_id, int32_t first_token) const {
    const int32_t n_rows = std::max(i.n_rows, 1);
    for (int32_t k = 0; k < n_rows; ++k) {
        const float * row = i.n_rows ? llama_get_embeddings_ith(w.context, first_token + k)
                                     : llama_get_embeddings_seq(w.context, seq_id);
        if (!row) {
            return make_failure(failure_kind::decode, 0, "llama.cpp has no row for this text");
        }
        const job & j = *i.owner;
        const double l2 = l2_norm(row, j.width);
        if (!std::isfinite(l2) || w.spoil) {
            return make_failure(failure_kind::numerical, 0, "NaN or infinite");
        }
        if (l2 == 0 && !j.may_be_zero) {
            return make_failure(failure_kind::numerical, 0, "all zero");
        }
        const float scale = scale_of(row, j, l2);
        float * into = i.row + size_t(k) * j.width;
        for (int32_t e = 0; e < j.width; ++e) {
            into[e] = row[e] * scale;
        }
    }
    return failure();
}

void scheduler::finish(worker & w, double seconds) {
    std::lock_guard<std::mutex> hold(mutex);
    pack_record & record = w.record;
    record.worker = w.number;
    record.n_texts = int32_t(w.pack.size());
    record.seconds = seconds;
    record.queued_tokens = n_waiting_tokens;
    for (const item * i : w.pack) {
        record.n_tokens += i->n_tokens - i->n_shared;
    }
    packs.push_back(record);
    n_packs += 1;
    if (packs.size() > kept_packs) {
        packs.pop_front();
    }
    w.stats.n_packs += 1;
    w.stats.n_texts += record.n_texts;
    w.stats.n_tokens += record.n_tokens;
    w.stats.wait_seconds += record.wait_seconds;
    w.stats.decode_seconds += record.decode_seconds;
    w.stats.copy_seconds += record.copy_seconds;
    std::vector<item *> done;
    done.swap(w.pack);
    for (size_t k = 0; k < done.size(); ++k) {
        finish_item(*done[k], w.results[k]);
    }
    quiet.notify_all();
}

void scheduler::finish_item(item & first, const failure & what) {
    job & j = *first.owner;
    if (j.dedup) {
        const auto [begin, end] = j.in_flight.equal_range(first.hash);
        const auto kept =
            std::find_if(begin, end, [&](auto & entry) { return entry.second == &first; });
        if (kept != end) {
            j.in_flight.erase(kept);
        }
    }
    const bool ok = what.kind == failure_kind::none;
    if (!ok) {
        failure named = what;
        named.index = first.index;
        if (named.kind == failure_kind::cancelled && stopping) {
            named.kind = failure_kind::closed;
        }
        if (j.first_failure.kind == failure_kind::none) {
            j.first_failure = std::move(named);
        }
    }
    const float * const row = first.row;
    const size_t n = size_t(std::max(first.n_rows, 1)) * j.width;
    for (item * i = &first; i;) {
        item * next = i->next_duplicate;
        if (ok) {
            if (i->row != row) {
                std::memcpy(i->row, row, n * sizeof(float));
            }
            if (j.done) {
                j.done[i->index] = 1;
            }
            j.n_done += 1;
        }
        j.n_open -= 1;
        if (--i->chunk->n_left == 0) {
            delete i->chunk;
        }
        i = next;
    }
    if (!ok && !j.waiting.empty()) {
        drop_waiting(j);
    }
    settle(j);
    if (j.watched) {
        j.event.wake();
    }
}

// ------------------------------------------------------------------------------------- the rest

void scheduler::set_limits(limits b) {
    std::lock_guard<std::mutex> hold(mutex);
    bounds = b;
    wake_producers();
}

limits scheduler::get_limits() {
    std::lock_guard<std::mutex> hold(mutex);
    return bounds;
}

int64_t scheduler::queued_tokens() {
    std::lock_guard<std::mutex> hold(mutex);
    return n_waiting_tokens;
}

int64_t scheduler::queued_texts() {
    std::lock_guard<std::mutex> hold(mutex);
    return n_waiting_texts;
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
    const auto fresh = ptrdiff_t(std::min<int64_t>(n_packs - n_seen, int64_t(packs.size())));
    n_seen = n_packs;
    return {packs.end() - fresh, packs.end()};
}

void scheduler::add_tokenize_seconds(double seconds) {
    std::lock_guard<std::mutex> hold(mutex);
    seconds_tokenizing += seconds;
}

double scheduler::tokenize_seconds() {
    std::lock_guard<std::mutex> hold(mutex);
    return seconds_tokenizing;
}

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
