#include "weight_packing.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../native/thread_pool.hpp"
#include "rotation.hpp"

namespace llamacrab::kernels {

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static size_t panels(const ggml_tensor * w) {
    return round_up(w->ne[1], panel_width) / panel_width;
}

// Only matrices of feed-forward networks, two thirds of a layer's work, may be 8 bits. Attention
// multiplies the rounding errors of queries, keys and values, which costs more than it saves.
static bool can_be_int8(const ggml_tensor * w) {
    return std::strstr(w->name, "ffn") && w->ne[0] % 4 == 0 && w->ne[0] >= 64 &&
           w->ne[0] <= widest_row && w->ne[1] >= 64;
}

bool is_packable(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q2_K:
        case GGML_TYPE_Q3_K:
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
        case GGML_TYPE_Q6_K:
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_IQ4_XS: return true;
        default: return false;
    }
}

weight_layout choose_layout(const ggml_tensor * w, bool allow_int8) {
    if (w->ne[1] < 2 || w->ne[2] != 1 || w->ne[3] != 1 || !ggml_is_contiguous(w) ||
        !is_packable(w->type)) {
        return weight_layout::unpacked;
    }
    if (allow_int8 && active_kernels().int8 && can_be_int8(w)) {
        return weight_layout::int8_panels;
    }
    if (w->type == GGML_TYPE_F32) {
        return weight_layout::f32_panels;
    }
    const bool needs_pairs = active_kernels().has_bf16();
    return needs_pairs && w->ne[0] % 2 != 0 ? weight_layout::unpacked
                                            : active_kernels().usual_layout;
}

static size_t matrix_bytes(const ggml_tensor * w, weight_layout layout) {
    switch (layout) {
        case weight_layout::f32_panels: return panels(w) * panel_width * w->ne[0] * 4;
        case weight_layout::bf16_panels: return panels(w) * panel_width * round_up(w->ne[0], 2) * 2;
        case weight_layout::int16_panels: return panels(w) * int16_panel_bytes((int) w->ne[0]);
        case weight_layout::int8_panels:
            return panels(w) * panel_width * int8_padded((int) w->ne[0]);
        default: return ggml_nbytes(w);
    }
}

size_t packed_bytes(const ggml_tensor * w, weight_layout layout) {
    const size_t columns =
        layout == weight_layout::int8_panels ? 2 * panels(w) * panel_width * sizeof(float) : 0;
    return matrix_bytes(w, layout) + columns;
}

const float * int8_scales(const ggml_tensor * w, const void * data) {
    return (const float *) ((const char *) data + matrix_bytes(w, weight_layout::int8_panels));
}

const float * int8_sums(const ggml_tensor * w, const void * data) {
    return int8_scales(w, data) + panels(w) * panel_width;
}

static void to_floats(const ggml_tensor * w, const char * row, float * out) {
    if (w->type == GGML_TYPE_F32) {
        std::memcpy(out, row, w->ne[0] * sizeof(float));
    } else if (w->type == GGML_TYPE_F16) {
        active_kernels().from_f16((const uint16_t *) row, out, w->ne[0]);
    } else {
        ggml_get_type_traits(w->type)->to_float(row, out, w->ne[0]);
    }
}

// Where a column of a block of k begins in packed int16 weights: its pairs, and its scale.
struct int16_place {
    size_t pairs, scale;  // in bytes
};

static int16_place place_of(int k, int64_t column, int block) {
    const size_t full_block = int16_block * panel_width * 2 + panel_width * sizeof(float);
    const size_t begin = column / panel_width * int16_panel_bytes(k) + block * full_block;
    const int n = std::min(int16_padded(k) - block * int16_block, int16_block);
    const size_t place = column % panel_width;
    return {begin + place * 4, begin + (size_t) n * panel_width * 2 + place * sizeof(float)};
}

// The scale of a block of a column: as fine as the sum of its absolute values allows. NaN if a
// value is not finite, so that results are NaN, as with floats.
static float int16_scale(const float * values, int n) {
    constexpr int lanes = 8;  // so that the compiler uses vectors
    float max[lanes] = {}, sum[lanes] = {};
    for (int i = 0; i < n; i += lanes) {
        for (int j = 0; j < lanes; j++) {
            const float value = i + j < n ? std::fabs(values[i + j]) : 0;
            max[j] = max[j] > value ? max[j] : value;
            sum[j] += value;
        }
    }
    const float total = std::accumulate(sum, sum + lanes, 0.0f);
    if (!std::isfinite(total)) {
        return NAN;
    }
    // Rounding may add a half to each value.
    return std::max(*std::max_element(max, max + lanes) / INT16_MAX,
                    total / (int16_weight_sum - int16_block / 2 - 1));
}

// Pack columns [column0, column1), all of one panel; `rows` has a row of the weight for each.
static void pack_int16(int k, const float * rows, int64_t column0, int64_t column1, void * to) {
    for (int block = 0; block < int16_blocks(k); block++) {
        const int n = std::min(k - block * int16_block, int16_block);
        for (int64_t column = column0; column < column1; column++) {
            const float * values = rows + (column - column0) * k + block * int16_block;
            const float scale = int16_scale(values, n), inverse = scale > 0 ? 1 / scale : 0;
            const int16_place place = place_of(k, column, block);
            std::memcpy((char *) to + place.scale, &scale, sizeof scale);
            int32_t whole[int16_block + 1] = {};
            for (int i = 0; i < n && inverse > 0; i++) {
                const float shifted = values[i] * inverse + 12582912.0f;  // 1.5 * 2^23: rounds
                std::memcpy(whole + i, &shifted, sizeof shifted);
            }
            auto * pairs = (int32_t *) ((char *) to + place.pairs);
            for (int i = 0; i < n; i += 2) {
                const uint32_t low = whole[i] & 0xffff, high = whole[i + 1] & 0xffff;
                pairs[i / 2 * panel_width] = (int32_t) (low | high << 16);
            }
        }
    }
}

static float int16_value(const void * from, int k, int64_t column, int i) {
    const int16_place place = place_of(k, column, i / int16_block);
    const auto * pairs = (const int16_t *) ((const char *) from + place.pairs);
    float scale;
    std::memcpy(&scale, (const char *) from + place.scale, sizeof scale);
    const int at = i % int16_block;
    return pairs[at / 2 * 2 * panel_width + at % 2] * scale;
}

// The scale of a column of bytes.
static float int8_scale(const float * row, int64_t k) {
    float max = 0, max_sum = 0;
    for (int64_t i = 0; i < k; i++) {
        max = std::max(max, std::fabs(row[i]));
    }
    if (active_kernels().int8_in_int16) {
        // Two neighbouring quadruples give two sums, each of a pair of either.
        const auto absolute = [&](int64_t i) { return i < k ? std::fabs(row[i]) : 0.0f; };
        for (int64_t i = 0; i < k; i += 8) {
            for (const int64_t j : {i, i + 2}) {
                const float sum = absolute(j) + absolute(j + 1) + absolute(j + 4) + absolute(j + 5);
                max_sum = std::max(max_sum, sum);
            }
        }
    }
    return std::max(max / 127, max_sum / (int8_weight_sum - 2));  // rounding may add 4 halves
}

static void pack_int8(const ggml_tensor * w, float * row, int64_t column, void * to) {
    const int64_t k = w->ne[0];
    const size_t padded_k = int8_padded((int) k);
    rotate(row, (int) k);
    for (int64_t i = 0; i < k; i++) {
        row[i] /= rotation_of((int) k);  // activations are rotated without scaling
        if (!std::isfinite(row[i])) {
            throw std::runtime_error(std::string("a weight of ") + w->name + " is not finite");
        }
    }
    const float scale = int8_scale(row, k), inverse_scale = scale > 0 ? 1 / scale : 0;
    int8_t * panel =
        (int8_t *) to + column / panel_width * panel_width * padded_k + column % panel_width * 4;
    int64_t sum = 0;
    for (int64_t i = 0; i < k; i++) {
        const int q = (int) std::lrint(row[i] * inverse_scale);
        sum += q;
        panel[i / 4 * 4 * panel_width + i % 4] = (int8_t) q;
    }
    const_cast<float *>(int8_scales(w, to))[column] = scale;
    const_cast<float *>(int8_sums(w, to))[column] = scale * sum;
}

static void pack_column(const ggml_tensor * w, weight_layout layout, const char * source,
                        float * row, int64_t column, char * to) {
    const int64_t k = w->ne[0];
    const size_t panel = column / panel_width, place = column % panel_width;
    if (layout == weight_layout::int8_panels) {
        return pack_int8(w, row, column, to);
    }
    if (layout == weight_layout::f32_panels) {
        float * out = (float *) to + panel * panel_width * k + place;
        for (int64_t i = 0; i < k; i++) {
            out[i * panel_width] = row[i];
        }
        return;
    }
    const auto * bits = (const uint16_t *) source;
    uint16_t * out = (uint16_t *) to + panel * panel_width * round_up(k, 2) + place * 2;
    for (int64_t i = 0; i < k; i++) {
        out[i / 2 * 2 * panel_width + i % 2] =
            w->type == GGML_TYPE_BF16 ? bits[i] : ggml_fp32_to_bf16(row[i]).bits;
    }
}

// Pack columns [column0, column1), all of one panel.
static void pack_panel(const ggml_tensor * w, weight_layout layout, const char * from,
                       int64_t column0, int64_t column1, char * to) {
    const int64_t k = w->ne[0];
    if (column0 % panel_width == 0) {  // for the padding
        const size_t bytes = matrix_bytes(w, layout) / panels(w);
        std::memset(to + column0 / panel_width * bytes, 0, bytes);
    }
    std::vector<float> rows((column1 - column0) * k);
    const auto row = [&](int64_t column) { return rows.data() + (column - column0) * k; };
    for (int64_t column = column0; column < column1; column++) {
        const char * source = from + (column - column0) * ggml_row_size(w->type, k);
        if (layout != weight_layout::bf16_panels || w->type != GGML_TYPE_BF16) {  // they stay
            to_floats(w, source, row(column));
        }
        if (layout != weight_layout::int16_panels) {
            pack_column(w, layout, source, row(column), column, to);
        }
    }
    if (layout == weight_layout::int16_panels) {
        pack_int16((int) k, rows.data(), column0, column1, to);
    }
}

void pack_rows(const ggml_tensor * w, weight_layout layout, const void * from, int64_t row0,
               int64_t row1, void * to) {
    const size_t matrix = matrix_bytes(w, layout);
    if (row0 == 0) {
        std::memset((char *) to + matrix, 0, packed_bytes(w, layout) - matrix);
    }
    const int64_t panel0 = row0 / panel_width, panel1 = (row1 + panel_width - 1) / panel_width;
    std::exception_ptr failure;
    std::mutex mutex;
    const bool is_large = matrix > 1 << 20;  // worth the start of threads
    const int n_threads = is_large ? (int) std::max(1u, std::thread::hardware_concurrency()) : 1;
    thread_pool threads;
    threads.parallel_for((int) (panel1 - panel0), n_threads, [&](int i, int) {
        const int64_t first = std::max(row0, (panel0 + i) * panel_width);
        const int64_t last = std::min(row1, (panel0 + i + 1) * panel_width);
        const auto * rows = (const char *) from + (first - row0) * ggml_row_size(w->type, w->ne[0]);
        try {
            pack_panel(w, layout, rows, first, last, (char *) to);
        } catch (...) {
            const std::lock_guard lock(mutex);
            failure = std::current_exception();
        }
    });
    if (failure) {
        std::rethrow_exception(failure);
    }
}

void unpack_rows(const ggml_tensor * w, weight_layout layout, const void * from, int64_t row0,
                 int64_t row1, void * to) {
    const int64_t k = w->ne[0];
    const size_t row_bytes = ggml_row_size(w->type, k);
    std::vector<float> row(k);
    for (int64_t m = row0; m < row1; m++) {
        const size_t panel = m / panel_width, place = m % panel_width;
        for (int64_t i = 0; i < k; i++) {
            if (layout == weight_layout::int16_panels) {
                row[i] = int16_value(from, (int) k, m, (int) i);
            } else if (layout == weight_layout::f32_panels) {
                row[i] = ((const float *) from)[panel * panel_width * k + i * panel_width + place];
            } else if (layout == weight_layout::bf16_panels) {
                const size_t at = panel * panel_width * round_up(k, 2) + i / 2 * 2 * panel_width +
                                  place * 2 + i % 2;
                row[i] = ggml_bf16_to_fp32({((const uint16_t *) from)[at]});
            } else {
                const size_t at = panel * panel_width * int8_padded((int) k) +
                                  i / 4 * 4 * panel_width + place * 4 + i % 4;
                row[i] = ((const int8_t *) from)[at] * int8_scales(w, from)[m];
            }
        }
        if (layout == weight_layout::int8_panels) {
            rotate(row.data(), (int) k);
        }
        char * out = (char *) to + (m - row0) * row_bytes;
        if (w->type == GGML_TYPE_F32) {
            std::memcpy(out, row.data(), row_bytes);
        } else {
            ggml_get_type_traits(w->type)->from_float_ref(row.data(), out, k);
        }
    }
}

}  // namespace llamacrab::kernels
