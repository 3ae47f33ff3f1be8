#include "attention_mask.hpp"

#include <algorithm>
#include <cstring>

namespace llamacrab::kernels {

constexpr uint16_t unseen = 0xfc00;  // minus infinity

struct view {
    int key0 = 0, key1 = 0;
    bool clean = true;
};

static view look(const uint16_t * row, int n) {
    view v;
    v.key1 = n;
    while (v.key0 < n && row[v.key0] == unseen) {
        v.key0++;
    }
    while (v.key1 > v.key0 && row[v.key1 - 1] == unseen) {
        v.key1--;
    }
    v.clean = std::all_of(row + v.key0, row + v.key1, [](uint16_t value) { return value == 0; });
    return v;
}

// Rows that differ and are taken together: enough of them that packing their keys pays.
constexpr int rows_together = 48;

std::vector<segment> segments_of(const ggml_tensor * mask, int n_rows, int n_keys) {
    if (mask == nullptr) {
        return {{0, n_rows, 0, n_keys, true}};
    }
    // Most rows see what the row before them sees, which a comparison of bytes tells fast.
    const std::vector<uint16_t> zeros(n_keys, 0), closed(n_keys, unseen);
    const auto same = [](const uint16_t * a, const std::vector<uint16_t> & b, int n) {
        return std::memcmp(a, b.data(), n * sizeof(uint16_t)) == 0;
    };
    std::vector<segment> found;
    view before;
    for (int i = 0; i < n_rows; i++) {
        const auto * row = (const uint16_t *) ((const char *) mask->data + i * mask->nb[1]);
        view now = before;
        if (i == 0 || !before.clean || !same(row, closed, before.key0) ||
            !same(row + before.key0, zeros, before.key1 - before.key0) ||
            !same(row + before.key1, closed, n_keys - before.key1)) {
            now = look(row, n_keys);
        }
        const bool equal = i > 0 && now.key0 == before.key0 && now.key1 == before.key1;
        if (equal && now.clean == found.back().clean) {
            found.back().row1 = i + 1;
        } else {
            found.push_back({i, i + 1, now.key0, now.key1, now.clean});
        }
        before = now;
    }
    // Join short neighbours that overlap.
    std::vector<segment> joined;
    for (const segment & s : found) {
        if (!joined.empty()) {
            segment & last = joined.back();
            const bool overlap = s.key0 < last.key1 && last.key0 < s.key1;
            const bool differ = s.key0 != last.key0 || s.key1 != last.key1;
            if (overlap && differ && s.row1 - last.row0 <= rows_together) {
                last.row1 = s.row1;
                last.key0 = std::min(last.key0, s.key0);
                last.key1 = std::max(last.key1, s.key1);
                last.clean = false;
                continue;
            }
        }
        joined.push_back(s);
    }
    return joined;
}

}  // namespace llamacrab::kernels
