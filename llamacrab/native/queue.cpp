#include "queue.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <string_view>

namespace llamacrab {

namespace {

uint64_t hash_of(const item & text) {
    const auto * bytes = reinterpret_cast<const char *>(text.ids());
    return std::hash<std::string_view>{}({bytes, size_t(text.n_tokens) * sizeof(int32_t)});
}

bool same_ids(const item & a, const item & b) {
    return a.n_tokens == b.n_tokens && std::equal(a.ids(), a.ids() + a.n_tokens, b.ids());
}

// Number of leading ids that are the job's shared prefix. A text that is no longer than the prefix
// has none: at least one token must be left to compute.
int32_t n_shared_of(const item & text, const token_vector & shared) {
    const bool begins_with = !shared.empty() && size_t(text.n_tokens) > shared.size() &&
                             std::equal(shared.begin(), shared.end(), text.ids());
    return begins_with ? int32_t(shared.size()) : 0;
}

// Whether two texts, possibly of two jobs, can use the same copy of their shared prefix.
bool share_prefix(const item & a, const item & b) {
    return a.n_shared && b.n_shared && (a.owner == b.owner || a.owner->shared == b.owner->shared);
}

}  // namespace

// ------------------------------------------------------------------------------------- admission

void text_queue::prepare(job & j, chunk & texts) {
    for (item & text : texts.items) {
        text.chunk = &texts;
    }
    // Long texts first: they are packs of their own, and short texts at the end fill packs well.
    std::stable_sort(texts.items.begin(), texts.items.end(),
                     [](const item & a, const item & b) { return a.n_tokens > b.n_tokens; });
    for (item & text : texts.items) {
        text.hash = j.dedup ? hash_of(text) : 0;
        text.n_shared = n_shared_of(text, j.shared);
    }
}

bool text_queue::admit(job & j, std::unique_ptr<chunk> texts) {
    if (is_closed) {
        fail(j, make_failure(failure_kind::closed, 0, "closed"));
    }
    if (j.has_failed()) {
        wake_producers();  // the room that has_room() gave to this job is free again
        return false;
    }
    if (texts->items.empty()) {
        return true;
    }
    texts->n_left = texts->items.size();
    j.n_open += int64_t(texts->items.size());
    for (item & text : texts->items) {
        if (j.dedup && add_to_duplicates(j, text)) {
            continue;
        }
        j.waiting.push_back(&text);
        j.waiting_tokens += text.n_tokens;
        n_waiting_tokens += text.n_tokens;
        n_waiting_texts += 1;
    }
    if (!j.linked && !j.waiting.empty()) {
        j.linked = true;
        jobs.push_back(&j);
    }
    texts.release();   // finish() deletes it
    wake_producers();  // duplicates take less room than this job was given
    return true;
}

// Add a text to those that get the row of an equal text, if there is one in the queue or in a pack.
bool text_queue::add_to_duplicates(job & j, item & text) {
    const auto [begin, end] = j.in_flight.equal_range(text.hash);
    const auto equal =
        std::find_if(begin, end, [&](auto & entry) { return same_ids(*entry.second, text); });
    if (equal == end) {
        j.in_flight.emplace(text.hash, &text);
        return false;
    }
    text.next_duplicate = equal->second->next_duplicate;
    equal->second->next_duplicate = &text;
    return true;
}

void text_queue::seal(job & j) {
    j.sealed = true;
    report_if_over(j);
}

// ------------------------------------------------------------------------------------- room

std::deque<text_queue::place>::iterator text_queue::find_place(const job & j) {
    return std::find_if(producers.begin(), producers.end(),
                        [&](const place & p) { return p.owner == &j; });
}

// A text of any size fits into an empty queue.
bool text_queue::fits(int64_t n_tokens) const {
    const int64_t taken = n_waiting_tokens + n_reserved_tokens;
    return taken == 0 || taken + n_tokens <= bounds.queue_tokens;
}

bool text_queue::has_room(job & j, int64_t n_tokens, bool wait) {
    const bool refused = is_closed || j.has_failed();
    const auto mine = find_place(j);
    if (refused || (mine != producers.end() && mine->reserved)) {
        leave_place(j);
        if (refused) {
            wake_producers();
        }
        return true;  // a job that will be refused hears that from admit(), without waiting
    }
    if (mine != producers.end()) {
        return false;
    }
    // A small text must not overtake a large one that waits: the queue might never be empty enough
    // for the large one.
    const bool first_in_line = producers.empty() || producers.back().reserved;
    if (first_in_line && fits(n_tokens)) {
        return true;
    }
    if (wait) {
        producers.push_back({&j, n_tokens, false});
    }
    return false;
}

void text_queue::give_up_place(job & j) {
    leave_place(j);
    wake_producers();
}

void text_queue::leave_place(job & j) {
    const auto mine = find_place(j);
    if (mine != producers.end()) {
        n_reserved_tokens -= mine->reserved ? mine->n_tokens : 0;
        producers.erase(mine);
    }
}

// Reserve room for producers in the order in which they came, as far as there is room.
void text_queue::wake_producers() {
    for (place & p : producers) {
        if (p.reserved) {
            continue;
        }
        if (!is_closed && !fits(p.n_tokens)) {
            return;
        }
        p.reserved = true;
        n_reserved_tokens += p.n_tokens;
        p.owner->event.wake();
    }
}

void text_queue::set_limits(const limits & b) {
    bounds = b;
    wake_producers();
}

// ------------------------------------------------------------------------------------- packing

// Tokens that the next pack may have.
int64_t text_queue::pack_room(const worker_limits & worker, size_t n_workers, bool any_idle) const {
    // No pack takes more than a worker's share of what waits, so that at the end of a job all
    // workers finish together. But very small packs would pay their fixed cost too often. If
    // another worker is idle, a smaller pack makes the texts ready sooner and costs nothing.
    const auto n = int64_t(n_workers);
    const int64_t share = (n_waiting_tokens + n - 1) / n;
    const int64_t smallest = any_idle ? bounds.pack_min / 2 : bounds.pack_min;
    const int64_t largest = std::min(bounds.pack_tokens, worker.pack_tokens);
    return std::min(std::max(share, smallest), largest);
}

void text_queue::take_pack(const worker_limits & worker, size_t n_workers, bool any_idle,
                           std::vector<item *> & pack) {
    pack.clear();
    int64_t room = pack_room(worker, n_workers, any_idle);
    // Jobs take turns to be first in a pack, so that a bulk job does not delay a single text. A job
    // whose next text did not fit stays in front.
    std::vector<job *> passed_over;
    for (size_t turns = jobs.size(); turns > 0 && room > 0 && pack.size() < worker.pack_texts;
         --turns) {
        job * j = jobs.front();
        jobs.pop_front();
        const size_t before = pack.size();
        take_from(*j, worker, room, pack);
        if (j->waiting.empty()) {
            j->linked = false;
        } else if (pack.size() == before) {
            passed_over.push_back(j);
        } else {
            jobs.push_back(j);
        }
    }
    jobs.insert(jobs.begin(), passed_over.begin(), passed_over.end());
    wake_producers();
}

// Move texts of a job into a pack, in order, as long as they fit. The first text of a pack always
// fits.
void text_queue::take_from(job & j, const worker_limits & worker, int64_t & room,
                           std::vector<item *> & pack) {
    while (!j.waiting.empty() && pack.size() < worker.pack_texts) {
        item * next = j.waiting.front();
        if (!pack.empty() && !share_prefix(*next, *pack.front())) {
            next->n_shared = 0;  // all texts of a pack use the shared prefix of its first, or none
        }
        const int32_t cost = next->n_tokens - next->n_shared;
        if (cost > room && !pack.empty()) {
            next->n_shared = n_shared_of(*next, j.shared);
            return;
        }
        j.waiting.pop_front();
        j.waiting_tokens -= next->n_tokens;
        n_waiting_tokens -= next->n_tokens;
        n_waiting_texts -= 1;
        room -= cost;
        pack.push_back(next);
    }
}

// ------------------------------------------------------------------------------------- ending

void text_queue::finish(item & first, const failure & what) {
    job & j = *first.owner;
    if (j.dedup) {
        const auto [begin, end] = j.in_flight.equal_range(first.hash);
        const auto mine =
            std::find_if(begin, end, [&](auto & entry) { return entry.second == &first; });
        if (mine != end) {
            j.in_flight.erase(mine);
        }
    }
    const bool ok = what.kind == failure_kind::none;
    if (!ok) {
        note_failure(first, what);
    }
    const float * const row = first.row;
    const size_t row_bytes = size_t(std::max(first.n_rows, 1)) * j.width * sizeof(float);
    for (item * text = &first; text;) {
        item * next = text->next_duplicate;
        if (ok) {
            if (text->row != row) {
                std::memcpy(text->row, row, row_bytes);
            }
            if (j.done) {
                j.done[text->index] = 1;
            }
            j.n_done += 1;
        }
        j.n_open -= 1;
        if (--text->chunk->n_left == 0) {
            delete text->chunk;
        }
        text = next;
    }
    if (!ok && !j.waiting.empty()) {
        drop_waiting(j);
    }
    report_if_over(j);
    if (j.watched) {
        j.event.wake();
    }
}

// The first failure of a job is the one that its caller gets.
void text_queue::note_failure(const item & text, const failure & what) const {
    job & j = *text.owner;
    if (j.first_failure.kind != failure_kind::none) {
        return;
    }
    failure named = what;
    named.index = text.index;
    if (named.kind == failure_kind::cancelled && is_closed) {
        named.kind = failure_kind::closed;
    }
    j.first_failure = std::move(named);
}

void text_queue::report_if_over(job & j) {
    if (!j.is_over()) {
        return;
    }
    if (j.on_done_data && !j.reported) {
        j.reported = true;
        finished.push_back(j.on_done_data);
    }
    j.event.wake();
}

void * text_queue::take_finished() {
    void * on_done_data = finished.front();
    finished.pop_front();
    return on_done_data;
}

void text_queue::fail(job & j, failure what) {
    if (j.first_failure.kind == failure_kind::none) {
        j.first_failure = std::move(what);
    }
    drop_waiting(j);
    report_if_over(j);
    j.event.wake();  // a producer that waits for room need not wait any longer
}

void text_queue::drop_waiting(job & j) {
    n_waiting_tokens -= j.waiting_tokens;
    n_waiting_texts -= int64_t(j.waiting.size());
    std::deque<item *> dropped;
    dropped.swap(j.waiting);
    j.waiting_tokens = 0;
    if (j.linked) {
        j.linked = false;
        jobs.erase(std::find(jobs.begin(), jobs.end(), &j));
    }
    for (item * text : dropped) {
        finish(*text, j.first_failure);
    }
    wake_producers();
}

void text_queue::cancel(job & j) {
    j.cancelled = true;
    leave_place(j);
    fail(j, make_failure(failure_kind::cancelled, 0, "cancelled"));
}

void text_queue::close() {
    is_closed = true;
    while (!jobs.empty()) {
        fail(*jobs.front(), make_failure(failure_kind::closed, 0, "closed"));
    }
    wake_producers();
}

}  // namespace llamacrab
