// The queue of the scheduler alone, without threads, llama.cpp or Python. tests/test_queue.py
// compiles this with llamacrab/native/queue.cpp and runs each test by its name.
#include "../../llamacrab/native/queue.hpp"

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

using namespace llamacrab;

// ------------------------------------------------------------------------------------- waiters

static std::map<const waiter *, int> n_wakes;

namespace llamacrab {
waiter::waiter() : lock(nullptr) {}
waiter::~waiter() { n_wakes.erase(this); }
void waiter::wake() { n_wakes[this] += 1; }
bool waiter::sleep(int64_t) { return true; }
}  // namespace llamacrab

// ------------------------------------------------------------------------------------- checks

static int n_failed = 0;

template <class A, class B>
static void check_equal(const A & found, const B & expected, const char * what, int line) {
    if (!(found == expected)) {
        std::printf("line %d: %s\n", line, what);
        n_failed += 1;
    }
}

#define CHECK(condition) check_equal(bool(condition), true, #condition, __LINE__)
#define CHECK_EQUAL(found, expected) \
    check_equal(found, expected, #found " is not " #expected, __LINE__)

static std::map<std::string, void (*)()> tests;

#define TEST(name)                                                                       \
    static void name();                                                                  \
    static const bool name##_added = [] { return tests.emplace(#name, name).second; }(); \
    static void name()

// ------------------------------------------------------------------------------------- helpers

using lengths = std::vector<int>;
using texts_of_ids = std::vector<token_vector>;

// A call: a job with one row of two numbers for each of its texts.
struct call {
    job j;
    std::vector<float> rows;
    std::vector<uint8_t> done;
    int64_t n_added = 0;

    explicit call(size_t n_texts, bool dedup = false) : rows(2 * n_texts), done(n_texts) {
        j.width = 2;
        j.dedup = dedup;
        j.done = done.data();
    }

    std::unique_ptr<chunk> make(const texts_of_ids & texts) {
        auto made = std::make_unique<chunk>();
        for (const token_vector & ids : texts) {
            item text;
            text.owner = &j;
            text.index = n_added++;
            text.first = made->tokens.size();
            text.n_tokens = int32_t(ids.size());
            text.row = &rows[2 * size_t(text.index)];
            made->tokens.insert(made->tokens.end(), ids.begin(), ids.end());
            made->items.push_back(text);
        }
        return made;
    }

    bool admit(text_queue & queue, const texts_of_ids & texts) {
        auto made = make(texts);
        text_queue::prepare(j, *made);
        return queue.admit(j, std::move(made));
    }

    // Texts of these lengths, no two of them equal.
    bool admit(text_queue & queue, const lengths & sizes) {
        texts_of_ids texts;
        for (const int n : sizes) {
            texts.push_back(
                token_vector(size_t(n), 1000 + int32_t(n_added + int64_t(texts.size()))));
        }
        return admit(queue, texts);
    }
};

struct worker {
    text_queue & queue;
    worker_limits bounds{1 << 20, 256};
    std::vector<item *> pack;

    std::vector<item *> & take(size_t n_workers = 1, bool any_idle = false) {
        queue.take_pack(bounds, n_workers, any_idle, pack);
        return pack;
    }

    lengths take_lengths(size_t n_workers = 1, bool any_idle = false) {
        lengths sizes;
        for (const item * text : take(n_workers, any_idle)) {
            sizes.push_back(text->n_tokens);
        }
        return sizes;
    }

    // Write the index of each text into its row, and end it.
    void finish(failure_kind kind = failure_kind::none) {
        for (item * text : pack) {
            text->row[0] = text->row[1] = float(text->index + 1);
            queue.finish(*text, make_failure(kind, 0, "what happened"));
        }
        pack.clear();
    }
};

static limits bounds(int32_t pack_tokens, int32_t pack_min = 0, int64_t queue_tokens = 1 << 20) {
    return {pack_tokens, pack_min, queue_tokens};
}

// ------------------------------------------------------------------------------------- packs

TEST(a_pack_holds_the_longest_texts_first_and_no_more_tokens_than_its_limit) {
    text_queue queue(bounds(10));
    worker w{queue};
    call a(6);
    CHECK(a.admit(queue, lengths{2, 7, 3, 1, 4, 5}));
    CHECK_EQUAL(w.take_lengths(), (lengths{7}));  // 5 does not fit, and 3 may not overtake it
    w.finish();
    CHECK_EQUAL(w.take_lengths(), (lengths{5, 4}));
    w.finish();
    CHECK_EQUAL(w.take_lengths(), (lengths{3, 2, 1}));
    w.finish();
    CHECK(!queue.has_texts());
    CHECK_EQUAL(a.rows, (std::vector<float>{1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6}));
    CHECK_EQUAL(a.done, std::vector<uint8_t>(6, 1));
}

TEST(a_text_longer_than_a_pack_is_a_pack_of_its_own) {
    text_queue queue(bounds(10));
    worker w{queue};
    call a(3);
    a.admit(queue, lengths{1, 50, 2});
    CHECK_EQUAL(w.take_lengths(), (lengths{50}));
    w.finish();
    CHECK_EQUAL(w.take_lengths(), (lengths{2, 1}));
    w.finish();
}

TEST(a_pack_holds_no_more_texts_and_tokens_than_the_worker_takes) {
    text_queue queue(bounds(100));
    worker w{queue, {7, 2}};
    call a(5);
    a.admit(queue, lengths{3, 3, 3, 1, 1});
    CHECK_EQUAL(w.take_lengths(), (lengths{3, 3}));
    w.finish();
    w.bounds = {3, 2};
    CHECK_EQUAL(w.take_lengths(), (lengths{3}));
    w.finish();
    w.bounds = {7, 1};
    CHECK_EQUAL(w.take_lengths(), (lengths{1}));
    w.finish();
    w.take();
    w.finish();
    CHECK(!queue.has_texts());
}

TEST(workers_share_what_waits_but_not_in_packs_below_the_smallest) {
    for (const bool any_idle : {false, true}) {
        text_queue queue(bounds(1000, 8));
        worker w{queue};
        call a(44);
        a.admit(queue, lengths(44, 1));
        CHECK_EQUAL(w.take(4, any_idle).size(), 11u);  // a quarter
        w.finish();
        CHECK_EQUAL(w.take(4, any_idle).size(), 9u);
        w.finish();
        CHECK_EQUAL(w.take(4, any_idle).size(), any_idle ? 6u : 8u);
        w.finish();
        CHECK_EQUAL(w.take(8, any_idle).size(), any_idle ? 4u : 8u);
        w.finish();
        while (queue.has_texts()) {
            w.take();
            w.finish();
        }
    }
}

// ------------------------------------------------------------------------------------- turns

TEST(jobs_take_turns_so_that_a_bulk_job_does_not_delay_a_single_text) {
    text_queue queue(bounds(4));
    worker w{queue};
    call bulk(100), single(1);
    bulk.admit(queue, lengths(100, 4));
    w.take();
    w.finish();
    single.admit(queue, lengths{4});
    bool found = false;
    for (int n = 0; n < 2; ++n) {
        found = found || w.take()[0]->owner == &single.j;
        w.finish();
    }
    CHECK(found);
    queue.cancel(bulk.j);
}

TEST(a_long_text_among_short_ones_of_other_jobs_keeps_its_turn) {
    text_queue queue(bounds(10));
    worker w{queue};
    call small(60), large(1), other(60);
    small.admit(queue, lengths(60, 3));
    large.admit(queue, lengths{9});
    // The first pack is the first job's, and has room for 1 token: the long text stays in front.
    CHECK_EQUAL(w.take_lengths(), (lengths{3, 3, 3}));
    w.finish();
    other.admit(queue, lengths(60, 3));
    CHECK_EQUAL(w.take_lengths(), (lengths{9}));
    w.finish();
    CHECK(large.done[0]);
    queue.cancel(small.j);
    queue.cancel(other.j);
}

TEST(texts_of_several_jobs_share_a_pack) {
    text_queue queue(bounds(10));
    worker w{queue};
    call a(1), b(1), c(1);
    a.admit(queue, lengths{3});
    b.admit(queue, lengths{4});
    c.admit(queue, lengths{3});
    CHECK_EQUAL(w.take_lengths(), (lengths{3, 4, 3}));
    w.finish();
    CHECK(a.done[0] && b.done[0] && c.done[0]);
}

// ------------------------------------------------------------------------------------- duplicates

TEST(equal_texts_of_a_job_are_computed_once_also_when_the_first_is_in_a_pack) {
    text_queue queue(bounds(100));
    worker w{queue};
    call a(5, /*dedup=*/true);
    a.admit(queue, texts_of_ids{{1, 2, 3}, {4, 5}, {1, 2, 3}});
    CHECK_EQUAL(queue.n_texts(), 2);
    CHECK_EQUAL(queue.n_tokens(), 5);
    CHECK_EQUAL(w.take_lengths(), (lengths{3, 2}));
    a.admit(queue, texts_of_ids{{4, 5}});  // equal to one that is being computed
    CHECK(!queue.has_texts());
    w.finish();
    CHECK_EQUAL(a.rows, (std::vector<float>{1, 1, 2, 2, 1, 1, 2, 2, 0, 0}));
    CHECK_EQUAL(a.done, (std::vector<uint8_t>{1, 1, 1, 1, 0}));
    CHECK_EQUAL(a.j.n_done, 4);
    a.admit(queue, texts_of_ids{{4, 5}});  // the others are finished, so it is computed
    CHECK_EQUAL(w.take_lengths(), (lengths{2}));
    w.finish();
    queue.seal(a.j);
    CHECK(a.j.is_over());
    CHECK(a.j.in_flight.empty());
}

TEST(texts_that_begin_alike_or_are_of_other_jobs_are_no_duplicates) {
    text_queue queue(bounds(100));
    worker w{queue};
    call a(3, /*dedup=*/true), b(1, /*dedup=*/true), c(2, /*dedup=*/false);
    a.admit(queue, texts_of_ids{{1, 2, 3}, {1, 2}, {1, 2, 4}});
    b.admit(queue, texts_of_ids{{1, 2, 3}});
    c.admit(queue, texts_of_ids{{7}, {7}});
    CHECK_EQUAL(queue.n_texts(), 6);
    w.take();
    CHECK_EQUAL(w.pack.size(), 6u);
    w.finish();
}

TEST(texts_with_equal_hashes_are_no_duplicates_unless_their_ids_are_equal) {
    text_queue queue(bounds(100));
    call a(5, /*dedup=*/true);
    // In the chunk's tokens, {1, 2} is followed by 3.
    auto made = a.make({{1, 2, 3}, {1, 2, 4}, {1, 2, 4}, {1, 2}, {3}});
    text_queue::prepare(a.j, *made);
    for (item & text : made->items) {
        text.hash = 7;
    }
    queue.admit(a.j, std::move(made));
    CHECK_EQUAL(queue.n_texts(), 4);
    queue.cancel(a.j);
}

TEST(a_text_that_fails_fails_its_duplicates_and_what_waits_of_its_job_only) {
    text_queue queue(bounds(3));
    worker w{queue};
    call a(5, /*dedup=*/true), b(1);
    a.admit(queue, texts_of_ids{{8}, {1, 2, 3}, {1, 2, 3}, {9}});
    b.admit(queue, texts_of_ids{{5}});
    CHECK_EQUAL(w.take_lengths(), (lengths{3}));
    w.finish(failure_kind::numerical);
    CHECK_EQUAL(a.done, std::vector<uint8_t>(5, 0));
    CHECK(a.j.first_failure.kind == failure_kind::numerical);
    CHECK_EQUAL(a.j.first_failure.index, 1);
    CHECK(a.j.is_over());
    CHECK(!a.admit(queue, texts_of_ids{{5}}));
    CHECK_EQUAL(queue.n_texts(), 1);
    CHECK_EQUAL(w.take_lengths(), (lengths{1}));
    w.finish();
    CHECK(b.done[0]);
}

// ------------------------------------------------------------------------------------- prefixes

TEST(a_shared_prefix_costs_nothing_in_packs_whose_first_text_has_it) {
    text_queue queue(bounds(6));
    worker w{queue};
    call a(5);
    a.j.shared = {1, 2, 3, 4};
    // Without the prefix: 2, 2, 2, 3 (another beginning), 4 (the prefix and nothing else).
    a.admit(
        queue,
        texts_of_ids{
            {1, 2, 3, 4, 7, 7}, {1, 2, 3, 4, 8, 8}, {1, 2, 3, 4, 9, 9}, {1, 2, 3, 4}, {5, 6, 7}});
    w.take();
    CHECK_EQUAL(w.pack.size(), 3u);
    for (const item * text : w.pack) {
        CHECK_EQUAL(text->n_shared, 4);
    }
    w.finish();
    CHECK_EQUAL(w.take_lengths(), (lengths{4}));
    CHECK_EQUAL(w.pack[0]->n_shared, 0);
    w.finish();
    w.take();
    w.finish();
}

TEST(a_text_gets_its_prefix_back_if_it_does_not_fit_into_a_pack_without) {
    text_queue queue(bounds(8));
    worker w{queue};
    call plain(1), a(1);
    plain.admit(queue, lengths{5});
    a.j.shared = {1, 2, 3, 4};
    a.admit(queue, texts_of_ids{{1, 2, 3, 4, 5}});
    CHECK_EQUAL(w.take_lengths(), (lengths{5}));  // beside a text without it, 5 tokens are too many
    w.finish();
    w.take();
    CHECK_EQUAL(w.pack[0]->n_shared, 4);
    w.finish();
}

// ------------------------------------------------------------------------------------- room

TEST(producers_get_room_in_the_order_in_which_they_came) {
    text_queue queue(bounds(4, 0, 10));
    worker w{queue};
    call first(4), large(1), small(1);
    CHECK(queue.has_room(first.j, 8, true));
    first.admit(queue, lengths{2, 2, 2, 2});
    CHECK(!queue.has_room(large.j, 9, true));
    // There is room for 2, but whoever came first is served first.
    CHECK(!queue.has_room(small.j, 2, true));
    CHECK(!queue.has_room(small.j, 2, true));  // it asks again, and keeps its place
    w.take();
    w.finish();
    CHECK_EQUAL(n_wakes[&large.j.event], 0);  // 4 wait, 9 more do not fit
    CHECK_EQUAL(n_wakes[&small.j.event], 0);
    w.take();
    CHECK_EQUAL(n_wakes[&large.j.event], 1);
    CHECK_EQUAL(n_wakes[&small.j.event], 0);  // 9 are reserved
    w.finish();
    CHECK(queue.has_room(large.j, 9, true));
    large.admit(queue, lengths{9});
    CHECK_EQUAL(n_wakes[&small.j.event], 0);
    w.take();
    CHECK_EQUAL(n_wakes[&small.j.event], 1);
    CHECK(queue.has_room(small.j, 2, true));
    w.finish();
}

TEST(a_text_larger_than_the_queue_fits_into_an_empty_one) {
    text_queue queue(bounds(4, 0, 10));
    worker w{queue};
    call a(2), b(1);
    CHECK(queue.has_room(a.j, 50, true));
    a.admit(queue, lengths{50});
    CHECK(!queue.has_room(b.j, 1, false));
    w.take();
    CHECK(queue.has_room(b.j, 1, false));
    w.finish();
}

TEST(who_does_not_wait_for_room_takes_no_place) {
    text_queue queue(bounds(4, 0, 4));
    worker w{queue};
    call a(1), b(1), c(1);
    a.admit(queue, lengths{4});
    CHECK(!queue.has_room(b.j, 4, false));
    w.take();
    CHECK_EQUAL(n_wakes[&b.j.event], 0);
    CHECK(queue.has_room(c.j, 4, false));
    w.finish();
}

TEST(a_place_that_is_given_up_lets_the_next_producer_in) {
    text_queue queue(bounds(4, 0, 10));
    worker w{queue};
    call a(1), large(1), small(1);
    a.admit(queue, lengths{4});
    CHECK(!queue.has_room(large.j, 9, true));
    CHECK(!queue.has_room(small.j, 2, true));
    queue.give_up_place(large.j);
    CHECK_EQUAL(n_wakes[&small.j.event], 1);
    // What is reserved is not given to others, and is free again once it is given up.
    CHECK(!queue.has_room(large.j, 5, false));
    queue.give_up_place(small.j);
    CHECK(queue.has_room(large.j, 6, false));
    queue.cancel(a.j);
}

TEST(a_larger_queue_wakes_those_who_fit_then) {
    text_queue queue(bounds(4, 0, 4));
    call a(1), b(1);
    a.admit(queue, lengths{4});
    CHECK(!queue.has_room(b.j, 4, true));
    queue.set_limits(bounds(4, 0, 8));
    CHECK_EQUAL(n_wakes[&b.j.event], 1);
    CHECK(queue.has_room(b.j, 4, true));
    queue.cancel(a.j);
}

TEST(duplicates_take_no_room) {
    text_queue queue(bounds(4, 0, 6));
    worker w{queue};
    call a(3, /*dedup=*/true), b(1);
    a.admit(queue, texts_of_ids{{1, 2, 3}, {1, 2, 3}, {1, 2, 3}});
    CHECK_EQUAL(queue.n_tokens(), 3);
    CHECK(queue.has_room(b.j, 3, false));
    CHECK(!queue.has_room(b.j, 4, false));
    w.take();
    CHECK_EQUAL(queue.n_tokens(), 0);
    CHECK_EQUAL(queue.n_texts(), 0);
    w.finish();
}

// ------------------------------------------------------------------------------------- endings

TEST(a_cancelled_job_leaves_the_queue_and_lets_others_in) {
    text_queue queue(bounds(4, 0, 12));
    worker w{queue};
    call a(4), waiting(1);
    a.admit(queue, lengths{4, 4, 4});
    CHECK(!queue.has_room(waiting.j, 12, true));
    CHECK_EQUAL(w.take_lengths(), (lengths{4}));
    queue.cancel(a.j);
    CHECK_EQUAL(queue.n_tokens(), 0);
    CHECK_EQUAL(queue.n_texts(), 0);
    CHECK(!queue.has_texts());
    CHECK_EQUAL(n_wakes[&waiting.j.event], 1);
    CHECK_EQUAL(a.j.n_open, 1);  // the one in the pack: its row belongs to the worker
    CHECK(!a.j.is_over());
    w.finish();
    CHECK(a.j.is_over());
    CHECK(a.j.first_failure.kind == failure_kind::cancelled);
    CHECK_EQUAL(a.done, (std::vector<uint8_t>{1, 0, 0, 0}));
    CHECK(!a.admit(queue, lengths{1}));
    CHECK(queue.has_room(a.j, 100, true));  // it need not wait to be refused
}

TEST(a_job_that_ends_is_reported_once) {
    text_queue queue(bounds(4));
    worker w{queue};
    call a(1), b(1), silent(1);
    int data = 0;
    for (call * one : {&a, &b, &silent}) {
        one->j.on_done_data = one == &silent ? nullptr : &data;
        one->admit(queue, lengths{1});
    }
    w.take();
    w.finish();
    CHECK(!queue.has_finished());  // more texts may come
    queue.seal(a.j);
    CHECK(queue.has_finished());
    queue.seal(a.j);
    queue.seal(silent.j);
    queue.cancel(b.j);
    CHECK(queue.take_finished() == &data);
    CHECK(queue.take_finished() == &data);
    CHECK(!queue.has_finished());
}

TEST(a_job_that_is_sealed_ends_with_its_last_text) {
    text_queue queue(bounds(1));
    worker w{queue};
    call a(2);
    int data = 0;
    a.j.on_done_data = &data;
    a.admit(queue, lengths{1, 1});
    queue.seal(a.j);
    w.take();
    w.finish();
    CHECK(!queue.has_finished());
    CHECK_EQUAL(n_wakes[&a.j.event], 0);
    w.take();
    w.finish();
    CHECK(queue.has_finished());
    CHECK_EQUAL(n_wakes[&a.j.event], 1);
}

TEST(a_job_that_is_watched_wakes_its_caller_at_every_text) {
    text_queue queue(bounds(1));
    worker w{queue};
    call a(3), b(3);
    a.j.watched = true;
    a.admit(queue, lengths{1, 1, 1});
    b.admit(queue, lengths{1, 1, 1});
    for (int n = 0; n < 6; ++n) {
        w.take();
        w.finish();
    }
    CHECK_EQUAL(n_wakes[&a.j.event], 3);
    CHECK_EQUAL(n_wakes[&b.j.event], 0);
    queue.seal(b.j);
    CHECK_EQUAL(n_wakes[&b.j.event], 1);
}

TEST(a_queue_that_closes_fails_what_waits_and_admits_no_more) {
    text_queue queue(bounds(4, 0, 8));
    worker w{queue};
    call a(2), b(1), late(1), waiting(1);
    a.admit(queue, lengths{4, 4});
    CHECK(!queue.has_room(waiting.j, 8, true));
    w.take();
    queue.close();
    CHECK(queue.closed());
    CHECK_EQUAL(n_wakes[&waiting.j.event], 1);
    CHECK(a.j.first_failure.kind == failure_kind::closed);
    w.finish(failure_kind::cancelled);
    CHECK(a.j.is_over());
    CHECK(!late.admit(queue, lengths{1}));
    CHECK(late.j.first_failure.kind == failure_kind::closed);
    CHECK_EQUAL(queue.n_texts(), 0);
}

TEST(a_pack_that_is_aborted_as_the_queue_closes_says_closed) {
    text_queue queue(bounds(4));
    worker w{queue};
    call a(1);
    a.admit(queue, lengths{4});
    w.take();
    queue.close();
    w.finish(failure_kind::cancelled);
    CHECK(a.j.first_failure.kind == failure_kind::closed);
}

int main(int argc, char ** argv) {
    const auto wanted = argc == 2 ? tests.find(argv[1]) : tests.end();
    if (wanted == tests.end()) {
        std::printf("usage: queue TEST\n");
        return 2;
    }
    wanted->second();
    return n_failed ? 1 : 0;
}
