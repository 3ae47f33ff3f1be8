// Operations that go row by row: norms, conversions, gates.
#pragma once

#include "../rotation.hpp"
#include "gemm.hpp"
#include "quantize.hpp"

namespace {

using llamacrab::kernels::norm_args;
using llamacrab::kernels::rotation_of;
using llamacrab::kernels::widest_rotation;
using llamacrab::kernels::widest_row;

template <int DISTANCE>
LC_INLINE void rotate_lanes(vf & v) {
    vf signs;
    for (int i = 0; i < width; i++) {
        signs[i] = i & DISTANCE ? -1.f : 1.f;
    }
    v = exchange<DISTANCE>(v) + v * signs;
}

// As kernels::rotate, which takes the rows whose blocks are smaller.
LC_INLINE void rotate_row(float * x, int n) {
    if (rotation_of(n) < widest_rotation) {
        return llamacrab::kernels::rotate(x, n);
    }
    constexpr int count = widest_rotation / width;
    for (int i = 0; i < n; i += widest_rotation) {
        vf v[count];
        for (int j = 0; j < count; j++) {
            v[j] = load(x + i + j * width);
            rotate_lanes<1>(v[j]);
            rotate_lanes<2>(v[j]);
            if (width > 4) {
                rotate_lanes<width / 2 < 4 ? 1 : 4>(v[j]);
            }
            if (width > 8) {
                rotate_lanes<width / 2 < 8 ? 1 : 8>(v[j]);
            }
        }
        for (int h = 1; h < count; h *= 2) {
            for (int j = 0; j < count; j++) {
                if (!(j & h)) {
                    const vf a = v[j], b = v[j + h];
                    v[j] = a + b;
                    v[j + h] = a - b;
                }
            }
        }
        for (int j = 0; j < count; j++) {
            store(x + i + j * width, v[j]);
        }
    }
}

// Copy x + residual (or x alone) to t, padded with zeros to whole vectors. Returns the sum.
LC_INLINE float add_residual(const float * x, const float * residual, int n, float * t) {
    constexpr int step = 4 * width;
    vf sums[4] = {};  // four sums that do not wait for each other
    int i = 0;
    for (; i + step <= n; i += step) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vf v = load(x + i + j * width);
            if (residual) {
                v += load(residual + i + j * width);
            }
            store(t + i + j * width, v);
            sums[j] += v;
        }
    }
    for (; i < n; i += width) {
        const int count = n - i < width ? n - i : width;
        vf v = load_part(x + i, count);
        if (residual) {
            v += load_part(residual + i, count);
        }
        store(t + i, v);
        sums[0] += v;
    }
    return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

LC_INLINE float sum_of_squares(const float * t, int n, float mean) {
    constexpr int step = 4 * width;
    vf sums[4] = {};
    int i = 0;
    for (; i + step <= n; i += step) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const vf v = load(t + i + j * width) - mean;
            sums[j] += v * v;
        }
    }
    float total = reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; i++) {
        total += (t[i] - mean) * (t[i] - mean);
    }
    return total;
}

// Write (t - mean) * scale * weight + bias to a row of each output. Keeps it in t if it is to be
// quantized.
LC_INLINE void finish_norm_row(const norm_args & a, int row, float * t, float mean, float scale) {
    const int n = a.n, whole = n / width * width;
    const bool keeps = a.y_int16 || a.y_int8;
    float * y = a.y ? a.y + row * a.ldy : nullptr;
    uint16_t * y_bf16 = a.y_bf16 ? a.y_bf16 + row * a.ldy : nullptr;
    int i = 0;
    for (; i < whole; i += width) {
        vf v = load(t + i);
        if (a.norm) {
            v = (v - mean) * scale;
        }
        if (a.weight) {
            v = v * load(a.weight + i);
        }
        if (a.bias) {
            v = v + load(a.bias + i);
        }
        if (y) {
            store(y + i, v);
        }
#if defined(__AVX512BF16__)
        if (y_bf16) {
            store_bf16(y_bf16 + i, v);
        }
#endif
        if (keeps) {
            store(t + i, v);
        }
    }
    for (; i < n; i++) {
        float v = t[i];
        if (a.norm) {
            v = (v - mean) * scale;
        }
        if (a.weight) {
            v *= a.weight[i];
        }
        if (a.bias) {
            v += a.bias[i];
        }
        t[i] = v;
        if (y) {
            y[i] = v;
        }
        if (y_bf16) {
            y_bf16[i] = round_bf16(v);
        }
    }
}

static void norm(const norm_args & a, int row0, int row1) {
    alignas(64) float t[widest_row];
    for (int row = row0; row < row1; row++) {
        const float * residual = a.residual ? a.residual + row * a.ldr : nullptr;
        const float sum = add_residual(a.x + row * a.ldx, residual, a.n, t);
        float mean = 0, scale = 1;
        if (a.norm) {
            mean = a.rms ? 0.f : sum / a.n;
            scale = 1.f / __builtin_sqrtf(sum_of_squares(t, a.n, mean) / a.n + a.eps);
        }
        finish_norm_row(a, row, t, mean, scale);
        if (a.y_int16) {
            to_int16(t, a.y_int16 + row * (size_t) int16_row(a.n), a.n);
        }
        if (a.y_int8) {
            rotate_row(t, a.n);
            quantize_row_int8(t, a.n, a.y_int8 + row * a.ldq, a.y_scale + 2 * row);
        }
    }
}

static void to_bf16(const float * x, uint16_t * y, int64_t n) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + width <= n; i += width) {
        store_bf16(y + i, load(x + i));
    }
#endif
    for (; i < n; i++) {
        y[i] = round_bf16(x[i]);
    }
}

static void to_f16(const float * x, uint16_t * y, int64_t n) {
    int64_t i = 0;
    for (; i + width <= n; i += width) {
        store_f16(y + i, load(x + i));
    }
    for (; i < n; i++) {
        y[i] = round_f16(x[i]);
    }
}

static void widen_f16(const uint16_t * x, float * y, int64_t n) {
    int64_t i = 0;
    for (; i + width <= n; i += width) {
        store(y + i, load_f16(x + i));
    }
    for (; i < n; i++) {
        y[i] = from_f16(x[i]);
    }
}

static void rope(const float * x, const float * cosines, const float * sines, float * y, int n_dims,
                 bool neighbours) {
    const int half = n_dims / 2;
    if (neighbours) {
        for (int i = 0; i < half; i++) {
            const float a = x[2 * i], b = x[2 * i + 1];
            y[2 * i] = a * cosines[i] - b * sines[i];
            y[2 * i + 1] = a * sines[i] + b * cosines[i];
        }
        return;
    }
    int i = 0;
    for (; i + width <= half; i += width) {
        const vf a = load(x + i), b = load(x + i + half);
        const vf cosine = load(cosines + i), sine = load(sines + i);
        store(y + i, a * cosine - b * sine);
        store(y + i + half, a * sine + b * cosine);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[i + half];
        y[i] = a * cosines[i] - b * sines[i];
        y[i + half] = a * sines[i] + b * cosines[i];
    }
}

static void add(const float * a, const float * b, float * y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        y[i] = a[i] + b[i];
    }
}

static void mul(const float * a, const float * b, float * y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        y[i] = a[i] * b[i];
    }
}

template <activation ACT>
LC_INLINE void gate_with(const float * a, const float * b, float * y, uint16_t * y_bf16,
                         int64_t n) {
    int64_t i = 0;
    for (; i + width <= n; i += width) {
        vf v = activate(ACT, load(a + i));
        if (b) {
            v = v * load(b + i);
        }
        if (y) {
            store(y + i, v);
        }
#if defined(__AVX512BF16__)
        if (y_bf16) {
            store_bf16(y_bf16 + i, v);
        }
#endif
    }
    const int rest = (int) (n - i);
    if (rest) {
        vf v = activate(ACT, load_part(a + i, rest));
        if (b) {
            v = v * load_part(b + i, rest);
        }
        for (int j = 0; j < rest; j++) {
            if (y) {
                y[i + j] = v[j];
            }
            if (y_bf16) {
                y_bf16[i + j] = round_bf16(v[j]);
            }
        }
    }
}

static void gate(activation act, const float * a, const float * b, float * y, uint16_t * y_bf16,
                 int64_t n) {
    switch (act) {
        case activation::none: return gate_with<activation::none>(a, b, y, y_bf16, n);
        case activation::gelu: return gate_with<activation::gelu>(a, b, y, y_bf16, n);
        case activation::gelu_erf: return gate_with<activation::gelu_erf>(a, b, y, y_bf16, n);
        case activation::gelu_quick: return gate_with<activation::gelu_quick>(a, b, y, y_bf16, n);
        case activation::silu: return gate_with<activation::silu>(a, b, y, y_bf16, n);
        case activation::relu: return gate_with<activation::relu>(a, b, y, y_bf16, n);
        case activation::tanh: return gate_with<activation::tanh>(a, b, y, y_bf16, n);
        case activation::sigmoid: return gate_with<activation::sigmoid>(a, b, y, y_bf16, n);
    }
}

}  // namespace
