#include "weight_packing.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

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

weight_layout choose_layout(const ggml_tensor * w, bool allow_int8) {
    allow_int8 = allow_int8 && active_kernels().int8;
    if (w->ne[1] < 2 || w->ne[2] != 1 || w->ne[3] != 1 || !ggml_is_contiguous(w)) {
        return weight_layout::unpacked;
    }
    switch (w->type) {
        case GGML_TYPE_F32:
            return allow_int8 && can_be_int8(w) ? weight_layout::int8_panels
                                                : weight_layout::f32_panels;
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
            if (allow_int8 && can_be_int8(w)) {
                return weight_layout::int8_panels;
            }
            return w->ne[0] % 2 == 0 ? weight_layout::bf16_panels
                                     : weight_layout::unpacked;  // pairs
        default: return weight_layout::unpacked;
    }
}

static size_t matrix_bytes(const ggml_tensor * w, weight_layout layout) {
    switch (layout) {
        case weight_layout::f32_panels: return panels(w) * panel_width * w->ne[0] * 4;
        case weight_layout::bf16_panels: return panels(w) * panel_width * round_up(w->ne[0], 2) * 2;
        case weight_layout::int8_panels: return panels(w) * panel_width * round_up(w->ne[0], 4);
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
    } else {
        ggml_get_type_traits(w->type)->to_float(row, out, w->ne[0]);
    }
}

static void pack_int8(const ggml_tensor * w, float * row, int64_t column, void * to) {
    const int64_t k = w->ne[0];
    const size_t padded_k = round_up(k, 4);
    float max = 0;
    rotate(row, (int) k);
    for (int64_t i = 0; i < k; i++) {
        row[i] /= rotation_of((int) k);  // activations are rotated without scaling
        const float v = std::fabs(row[i]);
        if (!std::isfinite(v)) {
            throw std::runtime_error(std::string("a weight of ") + w->name + " is not finite");
        }
        max = std::max(max, v);
    }
    const float inverse_scale = max > 0 ? 127 / max : 0, scale = max / 127;
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

void pack_rows(const ggml_tensor * w, weight_layout layout, const void * from, int64_t row0,
               int64_t row1, void * to) {
    const int64_t k = w->ne[0];
    const size_t row_bytes = ggml_row_size(w->type, k);
    std::vector<float> row(k);
    if (row0 == 0) {
        std::memset(to, 0, packed_bytes(w, layout));  // the padding of k and of the last panel
    }
    for (int64_t m = row0; m < row1; m++) {
        const char * source = (const char *) from + (m - row0) * row_bytes;
        const size_t panel = m / panel_width, place = m % panel_width;
        if (layout == weight_layout::bf16_panels && w->type == GGML_TYPE_BF16) {
            const auto * bits = (const uint16_t *) source;
            uint16_t * out = (uint16_t *) to + panel * panel_width * round_up(k, 2) + place * 2;
            for (int64_t i = 0; i < k; i++) {
                out[i / 2 * 2 * panel_width + i % 2] = bits[i];
            }
            continue;
        }
        to_floats(w, source, row.data());
        if (layout == weight_layout::f32_panels) {
            float * out = (float *) to + panel * panel_width * k + place;
            for (int64_t i = 0; i < k; i++) {
                out[i * panel_width] = row[i];
            }
        } else if (layout == weight_layout::bf16_panels) {
            uint16_t * out = (uint16_t *) to + panel * panel_width * round_up(k, 2) + place * 2;
            for (int64_t i = 0; i < k; i++) {
                out[i / 2 * 2 * panel_width + i % 2] = ggml_fp32_to_bf16(row[i]).bits;
            }
        } else {
            pack_int8(w, row.data(), m, to);
        }
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
            if (layout == weight_layout::f32_panels) {
                row[i] = ((const float *) from)[panel * panel_width * k + i * panel_width + place];
            } else if (layout == weight_layout::bf16_panels) {
                const size_t at = panel * panel_width * round_up(k, 2) + i / 2 * 2 * panel_width +
                                  place * 2 + i % 2;
                row[i] = ggml_bf16_to_fp32({((const uint16_t *) from)[at]});
            } else {
                const size_t at = panel * panel_width * round_up(k, 4) + i / 4 * 4 * panel_width +
                                  place * 4 + i % 4;
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
