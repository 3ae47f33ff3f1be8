#include "attention_mask.hpp"

#include <algorithm>
#include <cstring>

namespace llamacrab::kernels {

constexpr uint16_t minus_infinity = 0xfc00;  // in f16

// The keys that a row sees.
struct key_range {
    int key0 = 0, key1 = 0;
    bool unmasked = true;
};

static key_range scan_row(const uint16_t * row, int n) {
    key_range r;
    r.key1 = n;
    while (r.key0 < n && row[r.key0] == minus_infinity) {
        r.key0++;
    }
    while (r.key1 > r.key0 && row[r.key1 - 1] == minus_infinity) {
        r.key1--;
    }
    r.unmasked = std::all_of(row + r.key0, row + r.key1, [](uint16_t value) { return value == 0; });
    return r;
}

// Neighbouring rows with the same keys become a segment.
static std::vector<segment> group_equal_rows(const ggml_tensor * mask, int n_rows, int n_keys) {
    // Most rows see the same keys as the row before, which a comparison of bytes finds out fast.
    const std::vector<uint16_t> zeros(n_keys, 0), closed(n_keys, minus_infinity);
    const auto same = [](const uint16_t * a, const std::vector<uint16_t> & b, int n) {
        return std::memcmp(a, b.data(), n * sizeof(uint16_t)) == 0;
    };
    std::vector<segment> segments;
    key_range before;
    for (int i = 0; i < n_rows; i++) {
        const auto * row = (const uint16_t *) ((const char *) mask->data + i * mask->nb[1]);
        key_range now = before;
        if (i == 0 || !before.unmasked || !same(row, closed, before.key0) ||
            !same(row + before.key0, zeros, before.key1 - before.key0) ||
            !same(row + before.key1, closed, n_keys - before.key1)) {
            now = scan_row(row, n_keys);
        }
        const bool equal = i > 0 && now.key0 == before.key0 && now.key1 == before.key1;
        if (equal && now.unmasked == segments.back().unmasked) {
            segments.back().row1 = i + 1;
        } else {
            segments.push_back({i, i + 1, now.key0, now.key1, now.unmasked});
        }
        before = now;
    }
    return segments;
}

// Segments that overlap, but differ, are joined up to this number of rows: enough of them to make
// packing their keys worth its time.
constexpr int max_joined_rows = 48;

static std::vector<segment> join_short(const std::vector<segment> & segments) {
    std::vector<segment> joined;
    for (const segment & s : segments) {
        if (!joined.empty()) {
            segment & last = joined.back();
            const bool overlap = s.key0 < last.key1 && last.key0 < s.key1;
            const bool differ = s.key0 != last.key0 || s.key1 != last.key1;
            if (overlap && differ && s.row1 - last.row0 <= max_joined_rows) {
                last.row1 = s.row1;
                last.key0 = std::min(last.key0, s.key0);
                last.key1 = std::max(last.key1, s.key1);
                last.unmasked = false;
                continue;
            }
        }
        joined.push_back(s);
    }
    return joined;
}

std::vector<segment> find_segments(const ggml_tensor * mask, int n_rows, int n_keys) {
    if (mask == nullptr) {
        return {{0, n_rows, 0, n_keys, true}};
    }
    return join_short(group_equal_rows(mask, n_rows, n_keys));
}

}  // namespace llamacrab::kernels
