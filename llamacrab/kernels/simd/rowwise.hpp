// What is done to one row after another: norms, conversions, gates.
#pragma once

#include "gemm.hpp"

namespace {

using llamacrab::kernels::norm_args;

// A row as uint8 for VNNI: value = (byte - zero) * scale. The range of bytes is that of the row's
// values and zero, so that rows with few negative values, as GELU makes them, do not waste half of
// it.
LC_INLINE void quantize_row(const float * x, int n, uint8_t * y, float * scale) {
    vf low = {}, high = {}, finite = {};  // 0 * NaN is NaN, which a maximum may lose
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
    const float inverse_scale = range > 0 ? 255.f / range : 0.f;
    const float zero = __builtin_rintf(minus_min * inverse_scale);
    scale[0] = range / 255.f;
    scale[1] = zero;
    i = 0;
#if defined(__AVX512F__)
    for (; i + width <= n; i += width) {
        const __m512i v = _mm512_cvtps_epi32((__m512) (load(x + i) * inverse_scale + zero));
        _mm_storeu_si128((__m128i *) (y + i),
                         _mm512_cvtusepi32_epi8(_mm512_max_epi32(v, _mm512_setzero_si512())));
    }
#endif
    for (; i < n; i++) {
        const float v = __builtin_rintf(x[i] * inverse_scale + zero);
        y[i] = (uint8_t) (v > 255.f ? 255.f : v > 0.f ? v : 0.f);
    }
    for (; i % 4; i++) {
        y[i] = 0;  // pads k, where weights are 0
    }
}

static void norm(const norm_args & a, int row0, int row1) {
    alignas(64) float t[llamacrab::kernels::widest_row];
    for (int row = row0; row < row1; row++) {
        const float * x = a.x + row * a.ldx;
        const float * r = a.residual ? a.residual + row * a.ldr : nullptr;
        const int n = a.n, whole = n / width * width;
        // The sum, then the variance about the mean, each in four parts that do not wait for each
        // other. What is left over is padded with zeros.
        constexpr int many = 4 * width;
        vf s[4] = {};
        int i = 0;
        for (; i + many <= n; i += many) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                vf v = load(x + i + j * width);
                if (r) {
                    v += load(r + i + j * width);
                }
                store(t + i + j * width, v);
                s[j] += v;
            }
        }
        for (; i < n; i += width) {
            const int some = n - i < width ? n - i : width;
            vf v = load_part(x + i, some);
            if (r) {
                v += load_part(r + i, some);
            }
            store(t + i, v);
            s[0] += v;
        }
        float mean = 0, scale = 1;
        if (a.norm) {
            mean = a.rms ? 0.f : reduce_sum((s[0] + s[1]) + (s[2] + s[3])) / n;
            vf sq[4] = {};
            for (i = 0; i + many <= n; i += many) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const vf v = load(t + i + j * width) - mean;
                    sq[j] += v * v;
                }
            }
            float total = reduce_sum((sq[0] + sq[1]) + (sq[2] + sq[3]));
            for (; i < n; i++) {
                total += (t[i] - mean) * (t[i] - mean);
            }
            scale = 1.f / __builtin_sqrtf(total / n + a.eps);
        }
        float * y = a.y ? a.y + row * a.ldy : nullptr;
        uint16_t * b = a.y_bf16 ? a.y_bf16 + row * a.ldy : nullptr;
        for (i = 0; i < whole; i += width) {
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
            if (b) {
                store_bf16(b + i, v);
            }
#endif
            if (a.y_int8) {
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
            if (b) {
                b[i] = round_bf16(v);
            }
        }
        if (a.y_int8) {
            quantize_row(t, n, a.y_int8 + row * a.ldq, a.y_scale + 2 * row);
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
