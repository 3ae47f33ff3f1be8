// Products: micro-kernels of a few rows by 32 columns, and the loop around them.
#pragma once

#include "../kernel_table.hpp"
#include "vec.hpp"

namespace {

using llamacrab::kernels::activation;
using llamacrab::kernels::linear_args;
using llamacrab::kernels::panel_width;
using llamacrab::kernels::weight_layout;

// As many rows as registers allow: 12 rows by 2 vectors of sums take 24 of AVX-512's 32.
#if defined(__AVX512F__)
constexpr int tile = 12;
#else
constexpr int tile = 4;
#endif
constexpr int vectors = panel_width / width;                // per panel
constexpr int vectors_at_once = vectors < 2 ? vectors : 2;  // computed together

// out[i * ldo + 0..31] = sum over k of x[i][k] * w[k][0..31]
template <int NT>
LC_INLINE void product_f32(const float * w, const float * x, size_t ldx, int k, float * out,
                           size_t ldo) {
    for (int first = 0; first < vectors; first += vectors_at_once) {
        vf acc[NT][vectors_at_once] = {};
        for (int i = 0; i < k; i++) {
            const float * row = w + (size_t) i * panel_width + first * width;
            vf b[vectors_at_once];
            for (int j = 0; j < vectors_at_once; j++) {
                b[j] = load(row + j * width);
            }
#pragma GCC unroll 12
            for (int t = 0; t < NT; t++) {
                const vf a = splat(x[t * ldx + i]);
#pragma GCC unroll 2
                for (int j = 0; j < vectors_at_once; j++) {
                    acc[t][j] += a * b[j];
                }
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < NT; t++) {
#pragma GCC unroll 2
            for (int j = 0; j < vectors_at_once; j++) {
                store(out + t * ldo + (first + j) * width, acc[t][j]);
            }
        }
    }
}

// The same with bf16 weights and float activations, for CPUs that cannot multiply bf16.
template <int NT>
LC_INLINE void product_pairs(const uint16_t * w, const float * x, size_t ldx, int k, float * out,
                             size_t ldo) {
    for (int first = 0; first < vectors; first += vectors_at_once) {
        vf acc[NT][vectors_at_once] = {};
        for (int i = 0; i < k; i += 2) {
            const uint16_t * row = w + (size_t) i * panel_width + first * width * 2;
            vf low[vectors_at_once], high[vectors_at_once];
            for (int j = 0; j < vectors_at_once; j++) {
                const vi pairs = load_i(row + j * width * 2);
                low[j] = low_bf16(pairs);
                high[j] = high_bf16(pairs);
            }
            const int second = i + 1 < k ? 1 : 0;  // an odd k is padded: the weight is 0
#pragma GCC unroll 12
            for (int t = 0; t < NT; t++) {
                const vf a = splat(x[t * ldx + i]), b = splat(x[t * ldx + i + second]);
#pragma GCC unroll 2
                for (int j = 0; j < vectors_at_once; j++) {
                    acc[t][j] += a * low[j];
                    acc[t][j] += b * high[j];
                }
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < NT; t++) {
#pragma GCC unroll 2
            for (int j = 0; j < vectors_at_once; j++) {
                store(out + t * ldo + (first + j) * width, acc[t][j]);
            }
        }
    }
}

#if defined(__AVX512BF16__)
// With WIDE false only the first 16 columns. `ahead`, if not null, is prefetched into L2: a line
// for every 8 of k.
template <int NT, bool WIDE = true>
LC_INLINE void product_bf16(const uint16_t * w, const uint16_t * x, size_t ldx, int k, float * out,
                            size_t ldo, const char * ahead = nullptr) {
    __m512 a[NT], b[NT];
#pragma GCC unroll 12
    for (int t = 0; t < NT; t++) {
        a[t] = b[t] = _mm512_setzero_ps();
    }
    for (int i = 0; i < k; i += 2) {
        if (ahead && i % 8 == 0) {
            _mm_prefetch(ahead + (size_t) i * 8, _MM_HINT_T1);
        }
        const __m512bh w0 = (__m512bh) _mm512_loadu_si512(w + (size_t) i * 32);
        const __m512bh w1 = (__m512bh) _mm512_loadu_si512(w + (size_t) i * 32 + 32);
#pragma GCC unroll 12
        for (int t = 0; t < NT; t++) {
            int pair;
            std::memcpy(&pair, x + t * ldx + i, sizeof pair);
            const __m512bh v = (__m512bh) _mm512_set1_epi32(pair);
            a[t] = _mm512_dpbf16_ps(a[t], w0, v);
            if (WIDE) {
                b[t] = _mm512_dpbf16_ps(b[t], w1, v);
            }
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < NT; t++) {
        _mm512_storeu_ps(out + t * ldo, a[t]);
        if (WIDE) {
            _mm512_storeu_ps(out + t * ldo + 16, b[t]);
        }
    }
}
#endif

#if defined(__AVX512VNNI__)
// Sums of uint8 times int8.
template <int NT>
LC_INLINE void product_int8(const int8_t * w, const uint8_t * x, size_t ldx, int k, int32_t * out,
                            const char * ahead) {
    __m512i a[NT], b[NT];
#pragma GCC unroll 12
    for (int t = 0; t < NT; t++) {
        a[t] = b[t] = _mm512_setzero_si512();
    }
    for (int i = 0; i < k; i += 4) {
        if (ahead && i % 16 == 0) {
            _mm_prefetch(ahead + (size_t) i * 4, _MM_HINT_T1);
        }
        const __m512i w0 = _mm512_loadu_si512(w + (size_t) i * 32);
        const __m512i w1 = _mm512_loadu_si512(w + (size_t) i * 32 + 64);
#pragma GCC unroll 12
        for (int t = 0; t < NT; t++) {
            int four;
            std::memcpy(&four, x + t * ldx + i, sizeof four);
            const __m512i v = _mm512_set1_epi32(four);
            a[t] = _mm512_dpbusd_epi32(a[t], v, w0);
            b[t] = _mm512_dpbusd_epi32(b[t], v, w1);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < NT; t++) {
        _mm512_storeu_si512(out + t * panel_width, a[t]);
        _mm512_storeu_si512(out + t * panel_width + 16, b[t]);
    }
}
#endif

template <precision P = precision::f32>
LC_INLINE vf activate(activation act, vf v) {
    switch (act) {
        case activation::gelu: return geluv<P>(v);
        case activation::gelu_erf: return gelu_erfv(v);
        case activation::gelu_quick: return v * sigmoidv<P>(v * 1.702f);
        case activation::silu: return v * sigmoidv<P>(v);
        case activation::relu: return vmax(vf{}, v);
        case activation::tanh: return tanhv(v);
        case activation::sigmoid: return sigmoidv(v);
        default: return v;
    }
}

// Apply scales, bias and activation to the sums of a tile, and write the outputs.
template <activation ACT, precision P>
LC_INLINE void finish_tile(const linear_args & a, float * sums, int rows, int row, int column) {
    const int n = a.m - column < panel_width ? a.m - column : panel_width;
    const bool narrow = n < panel_width;
    alignas(64) float bias[panel_width] = {};
    if (a.bias) {
        std::memcpy(bias, a.bias + column, n * sizeof(float));
    }
    for (int t = 0; t < rows; t++) {
        float * s = sums + t * panel_width;
        vf v[vectors];
        for (int j = 0; j < vectors; j++) {
            if (a.layout == weight_layout::int8_panels) {
                const vf whole = __builtin_convertvector(load_i(s + j * width), vf);
                v[j] = (whole * load(a.w_scale + column + j * width) -
                        load(a.w_sum + column + j * width) * a.x_scale[2 * (row + t) + 1]) *
                       a.x_scale[2 * (row + t)];
            } else {
                v[j] = load(s + j * width);
            }
            v[j] = activate<P>(ACT, v[j] + load(bias + j * width));
        }
        if (narrow) {
            for (int j = 0; j < vectors; j++) {
                store(s + j * width, v[j]);
            }
            if (a.y) {
                std::memcpy(a.y + (row + t) * a.ldy + column, s, n * sizeof(float));
            }
            if (a.y_bf16) {
                for (int j = 0; j < n; j++) {
                    a.y_bf16[(row + t) * a.ldy + column + j] = round_bf16(s[j]);
                }
            }
            continue;
        }
        if (a.y) {
            for (int j = 0; j < vectors; j++) {
                store(a.y + (row + t) * a.ldy + column + j * width, v[j]);
            }
        }
#if defined(__AVX512BF16__)
        if (a.y_bf16) {
            const __m512bh r = _mm512_cvtne2ps_pbh((__m512) v[1], (__m512) v[0]);
            std::memcpy(a.y_bf16 + (row + t) * a.ldy + column, &r, sizeof r);
        }
#endif
    }
}

template <precision P>
LC_INLINE void finish_as(const linear_args & a, float * sums, int rows, int row, int column) {
    switch (a.act) {
        case activation::none: return finish_tile<activation::none, P>(a, sums, rows, row, column);
        case activation::gelu: return finish_tile<activation::gelu, P>(a, sums, rows, row, column);
        case activation::gelu_erf:
            return finish_tile<activation::gelu_erf, P>(a, sums, rows, row, column);
        case activation::gelu_quick:
            return finish_tile<activation::gelu_quick, P>(a, sums, rows, row, column);
        case activation::silu: return finish_tile<activation::silu, P>(a, sums, rows, row, column);
        case activation::relu: return finish_tile<activation::relu, P>(a, sums, rows, row, column);
        case activation::tanh: return finish_tile<activation::tanh, P>(a, sums, rows, row, column);
        case activation::sigmoid:
            return finish_tile<activation::sigmoid, P>(a, sums, rows, row, column);
    }
}

LC_INLINE void finish(const linear_args & a, float * sums, int rows, int row, int column) {
    if (a.y) {
        finish_as<precision::f32>(a, sums, rows, row, column);
    } else {
        finish_as<precision::bf16>(a, sums, rows, row, column);
    }
}

template <int NT>
LC_INLINE void product(const linear_args & a, const char * panel, int row, float * sums,
                       const char * ahead = nullptr) {
    switch (a.layout) {
#if defined(__AVX512VNNI__)
        case weight_layout::int8_panels:
            return product_int8<NT>((const int8_t *) panel, (const uint8_t *) a.x + row * a.ldx,
                                    a.ldx, a.k, (int32_t *) sums, ahead);
#endif
#if defined(__AVX512BF16__)
        case weight_layout::bf16_panels:
            return product_bf16<NT>((const uint16_t *) panel, (const uint16_t *) a.x + row * a.ldx,
                                    a.ldx, a.k, sums, panel_width, ahead);
#else
        case weight_layout::bf16_panels:
            return product_pairs<NT>((const uint16_t *) panel, (const float *) a.x + row * a.ldx,
                                     a.ldx, a.k, sums, panel_width);
#endif
        default:
            return product_f32<NT>((const float *) panel, (const float *) a.x + row * a.ldx, a.ldx,
                                   a.k, sums, panel_width);
    }
}

LC_INLINE size_t panel_bytes(weight_layout layout, int k) {
    switch (layout) {
        case weight_layout::int8_panels: return (size_t) panel_width * ((k + 3) / 4 * 4);
        case weight_layout::bf16_panels: return (size_t) panel_width * ((k + 1) / 2 * 2) * 2;
        default: return (size_t) panel_width * k * 4;
    }
}

static void linear(const linear_args & a, int row0, int row1) {
    alignas(64) float sums[tile * panel_width];
    const size_t bytes = panel_bytes(a.layout, a.k);
    for (int column = 0; column < a.m; column += panel_width) {
        const char * panel = (const char *) a.w + column / panel_width * bytes;
        int row = row0;
        // Prefetch the next panel while this one is multiplied, an eighth with each tile: else the
        // first tile of each panel waits for memory.
        const char * ahead = panel + bytes;
        for (; row + tile <= row1; row += tile, ahead += bytes / 8) {
            product<tile>(a, panel, row, sums, ahead);
            finish(a, sums, tile, row, column);
        }
        while (row < row1) {
            const int left = row1 - row;
            int n = 1;
            if (tile > 8 && left >= 8) {
                product<8>(a, panel, row, sums);
                n = 8;
            } else if (tile > 4 && left >= 4) {
                product<4>(a, panel, row, sums);
                n = 4;
            } else if (left >= 2) {
                product<2>(a, panel, row, sums);
                n = 2;
            } else {
                product<1>(a, panel, row, sums);
            }
            finish(a, sums, n, row, column);
            row += n;
        }
    }
}

}  // namespace
