// Products: micro-kernels of a few rows by 32 columns, and the loop around them.
#pragma once

#include "../kernel_table.hpp"
#include "quantize.hpp"
#include "vec.hpp"

namespace {

using llamacrab::kernels::activation;
using llamacrab::kernels::int16_panel_bytes;
using llamacrab::kernels::int16_row;
using llamacrab::kernels::int8_padded;
using llamacrab::kernels::linear_args;
using llamacrab::kernels::panel_width;
using llamacrab::kernels::weight_layout;

// As many rows as registers allow: 12 rows by 2 vectors of sums take 24 of AVX-512's 32.
#if defined(__AVX512F__)
constexpr int tile = 12;
#elif defined(__AVX2__)
constexpr int tile = 6;  // by 2 vectors: 12 of AVX2's 16 registers
#else
constexpr int tile = 4;
#endif
constexpr int vectors = panel_width / width;                // per panel
constexpr int vectors_at_once = vectors < 2 ? vectors : 2;  // computed together
constexpr int chunk_of_k = 32;

// Prefetches weights that come later, some lines with each chunk of k: a burst of them would stall.
struct prefetcher {
    const char *at, *end;
    int lines;  // for each chunk

    inline __attribute__((always_inline)) void next() {
        const char * stop = at + lines * 64 < end ? at + lines * 64 : end;
        for (; at < stop; at += 64) {
            __builtin_prefetch(at, 0, 2);  // into L2: the next block and this one do not fit in L1
        }
    }
};

LC_INLINE prefetcher no_prefetch() { return {nullptr, nullptr, 0}; }

// out[t * ldo + 0..31] = sum over k of x[t][k] * w[k][0..31]. Added to what is there if not
// `begin`.
template <int NT>
LC_INLINE void product_f32(const float * w, const float * x, size_t ldx, int k, float * out,
                           size_t ldo, bool begin = true, prefetcher ahead = no_prefetch()) {
    for (int first = 0; first < vectors; first += vectors_at_once) {
        vf acc[NT][vectors_at_once] = {};
        for (int chunk = 0; chunk < k; chunk += chunk_of_k) {
            ahead.next();
            const int end = k - chunk < chunk_of_k ? k : chunk + chunk_of_k;
            for (int i = chunk; i < end; i++) {
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
        }
#pragma GCC unroll 12
        for (int t = 0; t < NT; t++) {
#pragma GCC unroll 2
            for (int j = 0; j < vectors_at_once; j++) {
                float * to = out + t * ldo + (first + j) * width;
                store(to, begin ? acc[t][j] : load(to) + acc[t][j]);
            }
        }
    }
}

// sums[t][0..31] = the same product of int16 within one block of k, times its scales. Added to what
// is there if not `begin`.
template <int NT>
LC_INLINE void product_int16(const int16_t * w, const float * w_scale, const int16_t * x,
                             const float * x_scale, size_t ldx, int k, float * sums, bool begin,
                             prefetcher ahead) {
    for (int first = 0; first < vectors; first += vectors_at_once) {
        vi acc[NT][vectors_at_once] = {};
        for (int chunk = 0; chunk < k; chunk += chunk_of_k) {
            ahead.next();
            const int end = k - chunk < chunk_of_k ? k : chunk + chunk_of_k;
            for (int i = chunk; i < end; i += 2) {
                vi b[vectors_at_once];
                for (int j = 0; j < vectors_at_once; j++) {
                    b[j] = load_i(w + (size_t) i * panel_width + (first + j) * width * 2);
                }
#pragma GCC unroll 12
                for (int t = 0; t < NT; t++) {
                    int32_t pair;
                    std::memcpy(&pair, x + t * ldx + i, sizeof pair);
                    const vi a = vi{} + pair;
#pragma GCC unroll 2
                    for (int j = 0; j < vectors_at_once; j++) {
                        acc[t][j] = add_pair_products(acc[t][j], b[j], a);
                    }
                }
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < NT; t++) {
            float scale;
            std::memcpy(&scale, (const int16_t *) x_scale + t * ldx, sizeof scale);
#pragma GCC unroll 2
            for (int j = 0; j < vectors_at_once; j++) {
                const int column = (first + j) * width;
                float * to = sums + t * panel_width + column;
                store(to, multiply_add(__builtin_convertvector(acc[t][j], vf),
                                       load(w_scale + column) * scale, begin ? vf{} : load(to)));
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
#elif defined(__AVX2__)
// 32 products of uint8 and int8. Without VNNI two quadruples are summed in int16: see
// int8_weight_sum.
LC_INLINE __m256i add_byte_products(__m256i sum, const int8_t * w, __m256i x0, __m256i x1) {
    const __m256i w0 = _mm256_loadu_si256((const __m256i *) w);
    const __m256i w1 = _mm256_loadu_si256((const __m256i *) (w + 4 * panel_width));
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum, x0, w0), x1, w1);
#else
    const __m256i pairs =
        _mm256_add_epi16(_mm256_maddubs_epi16(x0, w0), _mm256_maddubs_epi16(x1, w1));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

LC_INLINE __m256i splat_quadruple(const uint8_t * x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

// Sums of uint8 times int8; k is padded to a multiple of 8.
template <int NT>
LC_INLINE void product_int8(const int8_t * w, const uint8_t * x, size_t ldx, int k, int32_t * out,
                            bool begin, prefetcher ahead) {
    for (int first = 0; first < vectors; first += 2) {
        __m256i a[NT], b[NT];
#pragma GCC unroll 4
        for (int t = 0; t < NT; t++) {
            a[t] = b[t] = _mm256_setzero_si256();
        }
        for (int chunk = 0; chunk < k; chunk += chunk_of_k) {
            ahead.next();
            const int end = k - chunk < chunk_of_k ? k : chunk + chunk_of_k;
            for (int i = chunk; i < end; i += 8) {
                const int8_t * row = w + (size_t) i * panel_width + first * width * 4;
#pragma GCC unroll 4
                for (int t = 0; t < NT; t++) {
                    const __m256i x0 = splat_quadruple(x + t * ldx + i);
                    const __m256i x1 = splat_quadruple(x + t * ldx + i + 4);
                    a[t] = add_byte_products(a[t], row, x0, x1);
                    b[t] = add_byte_products(b[t], row + width * 4, x0, x1);
                }
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < NT; t++) {
            auto * to = (__m256i *) (out + t * panel_width + first * width);
            _mm256_storeu_si256(to, begin ? a[t] : _mm256_add_epi32(a[t], _mm256_loadu_si256(to)));
            to++;
            _mm256_storeu_si256(to, begin ? b[t] : _mm256_add_epi32(b[t], _mm256_loadu_si256(to)));
        }
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
    if (a.y && !a.y_int16) {
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
#endif
        default:
            return product_f32<NT>((const float *) panel, (const float *) a.x + row * a.ldx, a.ldx,
                                   a.k, sums, panel_width);
    }
}

LC_INLINE size_t panel_bytes(weight_layout layout, int k) {
    switch (layout) {
        case weight_layout::int8_panels: return (size_t) panel_width * int8_padded(k);
        case weight_layout::int16_panels: return int16_panel_bytes(k);
        case weight_layout::bf16_panels: return (size_t) panel_width * ((k + 1) / 2 * 2) * 2;
        default: return (size_t) panel_width * k * 4;
    }
}

// Products of a block of k: a block of a panel stays in L1 while it is multiplied with many rows.
struct f32_part {
    static constexpr int size = 192, tile = ::tile;
    const float *w, *x;
    size_t ldx;
    int k;

    f32_part(const linear_args & a, const char * panel, int row, int begin)
        : w((const float *) panel + (size_t) begin * panel_width),
          x((const float *) a.x + row * a.ldx + begin),
          ldx(a.ldx),
          k(a.k - begin < size ? a.k - begin : size) {}

    const float * end() const { return w + (size_t) k * panel_width; }

    template <int NT>
    inline __attribute__((always_inline)) void multiply(int t, float * sums, bool begin,
                                                        prefetcher ahead) const {
        product_f32<NT>(w, x + t * ldx, ldx, k, sums, panel_width, begin, ahead);
    }
};

// The same with scales, which follow each block.
struct int16_part {
    static constexpr int size = int16_block, tile = ::tile;
    const int16_t *w, *x;
    const float *w_scale, *x_scale;
    size_t ldx;
    int k;

    int16_part(const linear_args & a, const char * panel, int row, int begin)
        : w((const int16_t *) panel + (size_t) begin * panel_width +
            begin / size * panel_width * (sizeof(float) / sizeof(int16_t))),
          x((const int16_t *) a.x + row * a.ldx + begin),
          x_scale((const float *) (x - begin + int16_padded(a.k)) + begin / size),
          ldx(a.ldx),
          k(int16_padded(a.k) - begin < size ? int16_padded(a.k) - begin : size) {
        w_scale = (const float *) (w + (size_t) k * panel_width);
    }

    const float * end() const { return w_scale + panel_width; }

    template <int NT>
    inline __attribute__((always_inline)) void multiply(int t, float * sums, bool begin,
                                                        prefetcher ahead) const {
        product_int16<NT>(w, w_scale, x + t * ldx,
                          (const float *) ((const int16_t *) x_scale + t * ldx), ldx, k, sums,
                          begin, ahead);
    }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// Sums of integers, which finish() scales.
struct int8_part {
    static constexpr int size = 512, tile = 4;
    const int8_t * w;
    const uint8_t * x;
    size_t ldx;
    int k;

    int8_part(const linear_args & a, const char * panel, int row, int begin)
        : w((const int8_t *) panel + (size_t) begin * panel_width),
          x((const uint8_t *) a.x + row * a.ldx + begin),
          ldx(a.ldx),
          k(a.k - begin < size ? a.k - begin : size) {}

    const int8_t * end() const { return w + (size_t) int8_padded(k) * panel_width; }

    template <int NT>
    inline __attribute__((always_inline)) void multiply(int t, float * sums, bool begin,
                                                        prefetcher ahead) const {
        product_int8<NT>(w, x + t * ldx, ldx, k, (int32_t *) sums, begin, ahead);
    }
};
#endif

// Rows that are multiplied with a block. A multiple of every tile.
constexpr int rows_at_once = 96;

// What `rows` of `all` rows prefetch of what comes after their block, which has as many bytes: the
// next block, or panel.
template <class block>
LC_INLINE prefetcher share_of(const block & part, int row, int rows, int all) {
    const char * next = (const char *) part.end();
    const int lines = (int) ((next - (const char *) part.w + 63) / 64);
    const int first = lines * row / all, last = lines * (row + rows) / all;
    const int chunks = (part.k + chunk_of_k - 1) / chunk_of_k * (vectors / vectors_at_once);
    return {next + first * 64, next + last * 64, (last - first + chunks - 1) / chunks};
}

// Sums of up to rows_at_once rows with all of k.
template <class block>
LC_INLINE void multiply_blocks(const linear_args & a, const char * panel, int row, int rows,
                               float * sums) {
    for (int i = 0; i < a.k; i += block::size) {
        const block part(a, panel, row, i);
        int t = 0;
        for (; t + block::tile <= rows; t += block::tile) {
            part.template multiply<block::tile>(t, sums + t * panel_width, i == 0,
                                                share_of(part, t, block::tile, rows));
        }
        for (; t + 2 <= rows; t += 2) {
            part.template multiply<2>(t, sums + t * panel_width, i == 0,
                                      share_of(part, t, 2, rows));
        }
        if (t < rows) {
            part.template multiply<1>(t, sums + t * panel_width, i == 0,
                                      share_of(part, t, 1, rows));
        }
    }
}

// Round a finished block of columns, of which scratch holds the floats.
LC_INLINE void write_int16_block(const linear_args & a, int begin, int end, int row0, int row1) {
    for (int row = row0; row < row1; row++) {
        const float * from = a.scratch + (size_t) (row - row0) * int16_block;
        int16_t * to = a.y_int16 + (size_t) row * int16_row(a.m);
        if (end == a.m && end % 2 != 0) {
            to[end] = 0;  // pads a pair
        }
        quantize_block_int16(from, end - begin, to + begin,
                             (float *) (to + int16_padded(a.m)) + begin / int16_block);
        if (a.y) {
            std::memcpy(a.y + row * a.ldy + begin, from, (end - begin) * sizeof(float));
        }
    }
}

template <class block>
LC_INLINE void linear_in_blocks(const linear_args & a, int row0, int row1) {
    alignas(64) float sums[rows_at_once * panel_width];
    const size_t bytes = panel_bytes(a.layout, a.k);
    linear_args out = a;
    for (int column = a.column0; column < a.column1; column += panel_width) {
        const int begin = column / int16_block * int16_block;
        if (a.y_int16) {
            out.y = a.scratch - (size_t) row0 * int16_block - begin;
            out.ldy = int16_block;
        }
        for (int row = row0; row < row1; row += rows_at_once) {
            const int rows = row1 - row < rows_at_once ? row1 - row : rows_at_once;
            multiply_blocks<block>(a, (const char *) a.w + column / panel_width * bytes, row, rows,
                                   sums);
            finish(out, sums, rows, row, column);
        }
        const int end = column + panel_width < a.m ? column + panel_width : a.m;
        if (a.y_int16 && (end % int16_block == 0 || end == a.m)) {
            write_int16_block(a, begin, end, row0, row1);
        }
    }
}

// Rows left over by whole tiles.
LC_INLINE void linear_rest(const linear_args & a, const char * panel, int row, int row1, int column,
                           float * sums) {
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

LC_INLINE void linear_in_tiles(const linear_args & a, int row0, int row1) {
    alignas(64) float sums[tile * panel_width];
    const size_t bytes = panel_bytes(a.layout, a.k);
    for (int column = a.column0; column < a.column1; column += panel_width) {
        const char * panel = (const char *) a.w + column / panel_width * bytes;
        int row = row0;
        // Prefetch the next panel while this one is multiplied, an eighth with each tile: else the
        // first tile of each panel waits for memory.
        const char * ahead = panel + bytes;
        for (; row + tile <= row1; row += tile, ahead += bytes / 8) {
            product<tile>(a, panel, row, sums, ahead);
            finish(a, sums, tile, row, column);
        }
        linear_rest(a, panel, row, row1, column, sums);
    }
}

static void linear(const linear_args & a, int row0, int row1) {
    switch (a.layout) {
        case weight_layout::f32_panels: return linear_in_blocks<f32_part>(a, row0, row1);
        case weight_layout::int16_panels: return linear_in_blocks<int16_part>(a, row0, row1);
#if defined(__AVX2__) && !defined(__AVX512F__)
        case weight_layout::int8_panels: return linear_in_blocks<int8_part>(a, row0, row1);
#endif
        default: return linear_in_tiles(a, row0, row1);
    }
}

}  // namespace
