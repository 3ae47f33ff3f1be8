// Rounds rows of activations to integers, with scales. A value that is not finite makes the scale
// NaN, and with it all results of its row.
#pragma once

#include "../kernel_table.hpp"
#include "vec.hpp"

namespace {

using llamacrab::kernels::int16_block;
using llamacrab::kernels::int16_max;
using llamacrab::kernels::int16_padded;

// Below this a row counts as zeros: the inverse of its scale would be infinite.
constexpr float smallest_range = 1e-30f;

// Round n values of one block: value = integer * scale.
LC_INLINE void quantize_block_int16(const float * x, int n, int16_t * y, float * scale) {
    vf max = {}, finite = {};  // 0 * NaN is NaN, which a maximum may lose
    int i = 0;
    for (; i + width <= n; i += width) {
        const vf v = load(x + i);
        max = vmax(max, vabs(v));
        finite += v * 0.f;
    }
    if (i < n) {
        const vf v = load_part(x + i, n - i);
        max = vmax(max, vabs(v));
        finite += v * 0.f;
    }
    const float range = reduce_max(max) + reduce_sum(finite);
    const float inverse_scale = range > smallest_range ? int16_max / range : 0.f;
    const float step = range / int16_max;
    std::memcpy(scale, &step, sizeof step);
    for (i = 0; i < n; i += width) {
        const int count = n - i < width ? n - i : width;
        const vf v = count == width ? load(x + i) : load_part(x + i, count);
        const vi whole = (vi) (v * inverse_scale + 12582912.f);  // 1.5 * 2^23 rounds to integers
        const vh halves = __builtin_convertvector(whole, vh);    // their low 16 bits
        std::memcpy(y + i, &halves, count * sizeof(int16_t));
    }
}

// Round a row, block by block: the integers, a zero that pads them to pairs, the scales.
static void to_int16(const float * x, int16_t * y, int n) {
    float * scales = (float *) (y + int16_padded(n));
    y[int16_padded(n) - 1] = 0;
    for (int i = 0; i < n; i += int16_block) {
        quantize_block_int16(x + i, n - i < int16_block ? n - i : int16_block, y + i, scales++);
    }
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr float int8_max = 255;
#else
constexpr float int8_max = 127;  // so that four products fit in int16
#endif

// Round a row to uint8: value = (byte - zero) * scale. The bytes cover the range of the row's
// values and zero.
LC_INLINE void quantize_row_int8(const float * x, int n, uint8_t * y, float * scale) {
    vf low = {}, high = {}, finite = {};
    int i = 0;
    for (; i + width <= n; i += width) {
        const vf v = load(x + i);
        high = vmax(high, v);
        low = vmax(low, -v);
        finite += v * 0.f;
    }
    float max = reduce_max(high), minus_min = reduce_max(low), zero_sum = reduce_sum(finite);
    for (; i < n; i++) {
        max = x[i] > max ? x[i] : max;
        minus_min = -x[i] > minus_min ? -x[i] : minus_min;
        zero_sum += x[i] * 0.f;
    }
    const float range = max + minus_min + zero_sum;
    const float inverse_scale = range > smallest_range ? int8_max / range : 0.f;
    const float zero = __builtin_rintf(minus_min * inverse_scale);
    scale[0] = range / int8_max;
    scale[1] = zero;
    i = 0;
    for (; i + width <= n; i += width) {
        const vf v = vmin(splat(int8_max), vmax(vf{}, load(x + i) * inverse_scale + zero));
        const vb bytes = __builtin_convertvector((vi) (v + 12582912.f), vb);
        std::memcpy(y + i, &bytes, sizeof bytes);
    }
    for (; i < n; i++) {
        const float v = __builtin_rintf(x[i] * inverse_scale + zero);
        y[i] = (uint8_t) (v > int8_max ? int8_max : v > 0.f ? v : 0.f);
    }
    for (; i % 8; i++) {
        y[i] = 0;  // the weights that pad k are 0 too
    }
}

}  // namespace
