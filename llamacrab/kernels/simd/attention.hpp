// Attention of the queries of a segment over the keys they see, for heads that share them. The
// scores are a product with packed keys, the result is a product with packed values: both use the
// micro-kernels of gemm.hpp.
#pragma once

#include "gemm.hpp"

namespace {

using llamacrab::kernels::attention_args;
using llamacrab::kernels::data_type;
using llamacrab::kernels::segment;

// Keys are padded to whole panels for the scores, and to pairs for the result.
LC_INLINE int round_to_pair(int n) { return (n + 1) / 2 * 2; }
LC_INLINE int round_to_panel(int n) { return (n + panel_width - 1) / panel_width * panel_width; }
LC_INLINE size_t round_to_line(size_t bytes) { return (bytes + 63) / 64 * 64; }

static size_t attention_scratch(int d_k, int d_v, int n_keys) {
    const size_t keys = round_to_panel(n_keys);
    return round_to_line(keys * (d_k + 1) * 4) + round_to_line(keys * round_to_panel(d_v) * 4) +
           round_to_line((size_t) n_keys * (d_k > d_v ? d_k : d_v) * 4) +
           round_to_line(tile * (keys + panel_width) * 4) * 2 +
           round_to_line(tile * panel_width * 4) + 64 * 16;
}

#if defined(__AVX512BF16__)
// Columns of a 16 x 16 matrix of 32-bit values become its rows.
LC_INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

struct bf16_data {
    typedef uint16_t type;

    static inline __attribute__((always_inline)) void pack_keys(const attention_args & a,
                                                                const uint16_t * k, int n,
                                                                uint16_t * out) {
        const int pairs = a.d_k / 2;
        for (int key = 0; key < round_to_panel(n); key += 16) {
            uint16_t * panel = out + (size_t) (key / panel_width) * pairs * panel_width * 2 +
                               key % panel_width * 2;
            for (int pair = 0; pair < pairs; pair += 16) {
                const int count = pairs - pair < 16 ? pairs - pair : 16;
                const __mmask16 mask = (__mmask16) ((1u << count) - 1);
                __m512i r[16];
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) {
                    r[i] = key + i < n
                               ? _mm512_maskz_loadu_epi32(mask, k + (key + i) * a.k_row + pair * 2)
                               : _mm512_setzero_si512();
                }
                transpose16(r);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) {
                    if (i < count) {
                        _mm512_storeu_si512(panel + (size_t) (pair + i) * panel_width * 2, r[i]);
                    }
                }
            }
        }
    }

    static inline __attribute__((always_inline)) void pack_values(const attention_args & a,
                                                                  const uint16_t * v, int n,
                                                                  uint16_t * out) {
        const int keys = round_to_pair(n);
        for (int d = 0; d < round_to_panel(a.d_v); d += 16) {
            const int count = a.d_v - d < 16 ? (a.d_v - d < 0 ? 0 : a.d_v - d) : 16;
            const __mmask16 mask = (__mmask16) ((1u << count) - 1);
            uint16_t * panel =
                out + (size_t) (d / panel_width) * keys * panel_width + d % panel_width * 2;
            for (int key = 0; key < keys; key += 2) {
                __m512i low = _mm512_setzero_si512(), high = low;
                if (key < n) {
                    low = _mm512_cvtepu16_epi32(
                        _mm256_maskz_loadu_epi16(mask, v + key * a.v_row + d));
                }
                if (key + 1 < n) {
                    high = _mm512_cvtepu16_epi32(
                        _mm256_maskz_loadu_epi16(mask, v + (key + 1) * a.v_row + d));
                }
                _mm512_storeu_si512(panel + (size_t) key * panel_width,
                                    _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
    }

    template <int NT>
    static inline __attribute__((always_inline)) void product(const uint16_t * w,
                                                              const uint16_t * x, size_t ldx, int k,
                                                              float * out, size_t ldo) {
        product_bf16<NT>(w, x, ldx, k, out, ldo);
    }

    // Scores of up to 32 keys.
    template <int NT>
    static inline __attribute__((always_inline)) void scores(const uint16_t * w, const uint16_t * x,
                                                             size_t ldx, int k, float * out,
                                                             size_t ldo, int n) {
        if (n > 16) {
            product_bf16<NT>(w, x, ldx, k, out, ldo);
        } else {
            product_bf16<NT, false>(w, x, ldx, k, out, ldo);
        }
    }

    static constexpr precision exact = precision::bf16;

    static inline __attribute__((always_inline)) void store_all(uint16_t * p, vf v) {
        store_bf16(p, v);
    }

    static inline __attribute__((always_inline)) void store_one(uint16_t * p, float value) {
        *p = round_bf16(value);
    }
};
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// Columns of an 8 x 8 matrix become its rows.
LC_INLINE void transpose8(vf r[8]) {
    __m256 t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps((__m256) r[i], (__m256) r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps((__m256) r[i], (__m256) r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = (vf) _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = (vf) _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}
#endif

struct f32_data {
    typedef float type;

    static inline __attribute__((always_inline)) void pack_keys(const attention_args & a,
                                                                const float * k, int n,
                                                                float * out) {
        int whole = 0;  // values of each key that are packed by vectors
#if defined(__AVX2__) && !defined(__AVX512F__)
        whole = a.d_k / width * width;
        for (int key = 0; key < round_to_panel(n); key += width) {
            float * panel =
                out + (size_t) (key / panel_width) * a.d_k * panel_width + key % panel_width;
            for (int d = 0; d < whole; d += width) {
                vf r[width];
#pragma GCC unroll 8
                for (int i = 0; i < width; i++) {
                    r[i] = key + i < n ? load(k + (key + i) * a.k_row + d) : vf{};
                }
                transpose8(r);
#pragma GCC unroll 8
                for (int i = 0; i < width; i++) {
                    store(panel + (size_t) (d + i) * panel_width, r[i]);
                }
            }
        }
#endif
        for (int key = 0; whole < a.d_k && key < round_to_panel(n); key++) {
            float * panel =
                out + (size_t) (key / panel_width) * a.d_k * panel_width + key % panel_width;
            for (int d = whole; d < a.d_k; d++) {
                panel[(size_t) d * panel_width] = key < n ? k[key * a.k_row + d] : 0.f;
            }
        }
    }

    static inline __attribute__((always_inline)) void pack_values(const attention_args & a,
                                                                  const float * v, int n,
                                                                  float * out) {
        const int keys = round_to_pair(n);
        std::memset(out, 0, (size_t) round_to_panel(a.d_v) * keys * sizeof(float));
        for (int d = 0; d < a.d_v; d += panel_width) {
            const int count = a.d_v - d < panel_width ? a.d_v - d : panel_width;
            for (int key = 0; key < n; key++) {
                std::memcpy(out + (size_t) d * keys + (size_t) key * panel_width,
                            v + key * a.v_row + d, count * sizeof(float));
            }
        }
    }

    template <int NT>
    static inline __attribute__((always_inline)) void product(const float * w, const float * x,
                                                              size_t ldx, int k, float * out,
                                                              size_t ldo) {
        product_f32<NT>(w, x, ldx, k, out, ldo);
    }

    template <int NT>
    static inline __attribute__((always_inline)) void scores(const float * w, const float * x,
                                                             size_t ldx, int k, float * out,
                                                             size_t ldo, int) {
        product_f32<NT>(w, x, ldx, k, out, ldo);
    }

    static constexpr precision exact = precision::f32;

    static inline __attribute__((always_inline)) void store_all(float * p, vf v) { store(p, v); }

    static inline __attribute__((always_inline)) void store_one(float * p, float value) {
        *p = value;
    }
};

// Apply the scale, the soft cap and the mask to the scores of a row with keys [key, key + n). The
// results are in units of log2.
LC_INLINE void apply_mask(const attention_args & a, const segment & s, int row, int key, int n,
                          float * scores) {
    float scale = a.scale;
    if (a.softcap != 0) {
        for (int i = 0; i < n; i += width) {
            store(scores + i, tanhv(load(scores + i) * (scale / a.softcap)) * a.softcap);
        }
        scale = 1;
    }
    const uint16_t * mask = a.mask + row * a.mask_row + s.key0 + key;
    int i = 0;
    for (; i + width <= n; i += width) {
        const vf bias = s.unmasked ? vf{} : load_f16(mask + i) * a.slope;
        store(scores + i, (load(scores + i) * scale + bias) * log2e);
    }
    for (; i < n; i++) {
        const float bias = s.unmasked ? 0.f : from_f16(mask[i]) * a.slope;
        scores[i] = (scores[i] * scale + bias) * log2e;
    }
}

// The keys that pad the last vector get no weight.
LC_INLINE void mask_padding(float * scores, int n) {
    for (; n % width; n++) {
        scores[n] = -__builtin_inff();
    }
}

// Scores and softmax of a single row. Returns 1 / the sum of its weights.
template <class data>
LC_INLINE float softmax_row(const attention_args & a, const segment & s, int row,
                            const typename data::type * q, const typename data::type * keys,
                            float * scores, typename data::type * out) {
    const int n = s.key1 - s.key0;
    const bool scale_only = s.unmasked && a.softcap == 0;
    for (int i = 0; i < n; i += panel_width) {
        data::template scores<1>(keys + (size_t) i * a.d_k, q, a.q_row, a.d_k, scores + i,
                                 panel_width, n - i);
    }
    if (!scale_only) {
        apply_mask(a, s, row, 0, n, scores);
    }
    mask_padding(scores, n);
    vf maxima = splat(-__builtin_inff());
    for (int i = 0; i < n; i += width) {
        maxima = vmax(maxima, load(scores + i));
    }
    const float max = reduce_max(maxima), score_scale = scale_only ? a.scale * log2e : 1.f;
    const bool fully_masked = max == -__builtin_inff();
    vf total = {};
    for (int i = 0; i < n; i += width) {
        const vf p = fully_masked ? vf{} : exp2v((load(scores + i) - max) * score_scale);
        total += p;
        data::store_all(out + i, p);
    }
    return fully_masked ? 0 : 1.f / reduce_sum(total);
}

// Parts of the scratch memory.
template <class type>
struct attention_buffers {
    type * keys;     // all keys of a segment, packed
    type * values;   // all values
    type * rows;     // keys or values that were f16, not packed yet
    float * scores;  // of a tile with 32 keys, or of a row with all keys
    type * weights;  // of a tile with all keys
    float * result;  // of a tile, 32 columns
};

// Write columns [d, d + 32) of a head's result for a row, scaled.
LC_INLINE void write_panel(const attention_args & a, int head, int row, int d, float * result,
                           float scale) {
    const int count = a.d_v - d < panel_width ? a.d_v - d : panel_width;
    const ptrdiff_t place = row * a.y_row + head * a.y_head + d;
    for (int i = 0; i < panel_width; i += width) {
        store(result + i, load(result + i) * scale);
    }
    if (a.y) {
        std::memcpy(a.y + place, result, count * sizeof(float));
    }
#if defined(__AVX512BF16__)
    if (a.y_bf16) {
        const __m512bh both =
            _mm512_cvtne2ps_pbh((__m512) load(result + 16), (__m512) load(result));
        const __mmask32 mask = count == 32 ? ~0u : (1u << count) - 1;
        _mm512_mask_storeu_epi16(a.y_bf16 + place, mask, (__m512i) both);
    }
#endif
}

// Attention of NT rows of queries. Softmax may subtract any number from the scores before exp, as
// long as no sum of a row leaves the range of float: here the greatest score of the first 32 keys,
// for all rows. So the scores go through a small buffer once. Rows for which that number does not
// fit are computed again one by one.
template <class data, int NT>
LC_INLINE void attention_tile(const attention_args & a, const segment & s, int head, int row,
                              const attention_buffers<typename data::type> & buffers) {
    typedef typename data::type type;
    const type *keys = buffers.keys, *values = buffers.values;
    type * weights = buffers.weights;
    float *scores = buffers.scores, *result = buffers.result;
    const int n = s.key1 - s.key0, pairs = round_to_pair(n);
    const ptrdiff_t stride =
        round_to_panel(n) + panel_width;  // a power of two would use few cache sets
    const type * q = (const type *) a.q + row * a.q_row + head * a.q_head;
    const bool scale_only = s.unmasked && a.softcap == 0;
    const float score_scale = scale_only ? a.scale * log2e : 1.f;
    float shift = 0;
    vf total[NT] = {};
    for (int key = 0; key < n; key += panel_width) {
        const int count = n - key < panel_width ? n - key : panel_width;
        data::template scores<NT>(keys + (size_t) key * a.d_k, q, a.q_row, a.d_k, scores,
                                  panel_width, count);
        for (int t = 0; t < NT; t++) {
            if (!scale_only) {
                apply_mask(a, s, row + t, key, count, scores + t * panel_width);
            }
            mask_padding(scores + t * panel_width, count);
        }
        if (key == 0) {
            vf maxima = splat(-__builtin_inff());
            for (int t = 0; t < NT; t++) {
                for (int i = 0; i < count; i += width) {
                    maxima = vmax(maxima, load(scores + t * panel_width + i));
                }
            }
            shift = reduce_max(maxima) * score_scale;
            shift = shift > -1e30f ? shift : 0;
        }
        for (int i = 0; i < count; i += width) {
#pragma GCC unroll 12
            for (int t = 0; t < NT; t++) {
                const vf p =
                    exp2v<data::exact>(load(scores + t * panel_width + i) * score_scale - shift);
                total[t] += p;
                data::store_all(weights + t * stride + key + i, p);
            }
        }
    }
    float inverse_sums[NT];
#pragma GCC unroll 12
    for (int t = 0; t < NT; t++) {
        inverse_sums[t] = reduce_sum(total[t]);
    }
    for (int t = 0; t < NT; t++) {
        const bool out_of_range = inverse_sums[t] < 1e-20f || inverse_sums[t] > 1e30f;
        inverse_sums[t] = out_of_range ? softmax_row<data>(a, s, row + t, q + t * a.q_row, keys,
                                                           scores, weights + t * stride)
                                       : 1.f / inverse_sums[t];
    }
    for (int d = 0; d < a.d_v; d += panel_width) {
        data::template product<NT>(values + (size_t) d * pairs, weights, stride, pairs, result,
                                   panel_width);
        for (int t = 0; t < NT; t++) {
            write_panel(a, head, row + t, d, result + t * panel_width, inverse_sums[t]);
        }
    }
}

// Copy n rows of f16, which are `stride` apart.
template <class data>
LC_INLINE void widen_rows(const uint16_t * from, ptrdiff_t stride, int n, int d,
                          typename data::type * to) {
    for (int row = 0; row < n; row++) {
        int i = 0;
        for (; i + width <= d; i += width) {
            data::store_all(to + (size_t) row * d + i, load_f16(from + row * stride + i));
        }
        for (; i < d; i++) {
            data::store_one(to + (size_t) row * d + i, from_f16(from[row * stride + i]));
        }
    }
}

// The rows at `from`: as they are, or if they are f16, copied to `rows`, whose stride then is d.
template <class data>
LC_INLINE const typename data::type * rows_as(const void * from, bool f16, ptrdiff_t first, int n,
                                              int d, ptrdiff_t & stride,
                                              typename data::type * rows) {
    if (!f16) {
        return (const typename data::type *) from + first;
    }
    widen_rows<data>((const uint16_t *) from + first, stride, n, d, rows);
    stride = d;
    return rows;
}

template <class data>
LC_INLINE void pack_keys_and_values(const attention_args & given, const segment & s, int kv,
                                    const attention_buffers<typename data::type> & buffers) {
    attention_args a = given;
    const int n = s.key1 - s.key0;
    const ptrdiff_t key = s.key0 * a.k_row + kv * a.k_head,
                    value = s.key0 * a.v_row + kv * a.v_head;
    const auto * keys = rows_as<data>(a.k, a.k_f16, key, n, a.d_k, a.k_row, buffers.rows);
    data::pack_keys(a, keys, n, buffers.keys);
    const auto * values = rows_as<data>(a.v, a.v_f16, value, n, a.d_v, a.v_row, buffers.rows);
    data::pack_values(a, values, n, buffers.values);
}

template <class data>
LC_INLINE void attention_as(const attention_args & a, const segment & s, int head0, int n_heads) {
    typedef typename data::type type;
    const int n = s.key1 - s.key0, end = round_to_panel(n);
    char * at = (char *) a.scratch;
    const auto take = [&](size_t bytes) {
        char * p = at;
        at += round_to_line(bytes);
        return p;
    };
    attention_buffers<type> buffers;
    buffers.keys = (type *) take(sizeof(type) * end * a.d_k);
    buffers.values = (type *) take(sizeof(type) * round_to_pair(n) * round_to_panel(a.d_v));
    buffers.scores =
        (float *) take(sizeof(float) * (end > tile * panel_width ? end : tile * panel_width));
    buffers.weights = (type *) take(sizeof(type) * tile * (end + panel_width));
    buffers.result = (float *) take(sizeof(float) * tile * panel_width);
    buffers.rows = (type *) take(sizeof(type) * n * (a.d_k > a.d_v ? a.d_k : a.d_v));
    pack_keys_and_values<data>(a, s, head0 / a.heads_per_kv, buffers);
    const auto compute_rows = [&](int head, int row, int rows) {
        switch (rows) {
            case 12: return attention_tile<data, 12>(a, s, head, row, buffers);
            case 8: return attention_tile<data, 8>(a, s, head, row, buffers);
            case 6: return attention_tile<data, 6>(a, s, head, row, buffers);
            case 4: return attention_tile<data, 4>(a, s, head, row, buffers);
            case 2: return attention_tile<data, 2>(a, s, head, row, buffers);
            default: return attention_tile<data, 1>(a, s, head, row, buffers);
        }
    };
    // The last tile may begin among rows that are done already, which is faster than tiles of one
    // or two rows.
    for (int row = s.row0; row < s.row1;) {
        const int left = s.row1 - row, all = s.row1 - s.row0;
        int rows = tile;
        static constexpr int sizes[] = {8, 6, 4, 2, 1};
        for (int smaller : sizes) {
            if (smaller < tile && (smaller >= left || rows > all)) {
                rows = smaller;
            }
        }
        if (rows > left) {
            row = s.row1 - rows;
        }
        for (int head = head0; head < head0 + n_heads; head++) {
            compute_rows(head, row, rows);
        }
        row += rows;
    }
}

static void attention(const attention_args & a, const segment & s, int head, int n_heads) {
#if defined(__AVX512BF16__)
    if (a.type == data_type::bf16) {
        return attention_as<bf16_data>(a, s, head, n_heads);
    }
#endif
    attention_as<f32_data>(a, s, head, n_heads);
}

}  // namespace
