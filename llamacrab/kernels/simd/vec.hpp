// Vectors of the width that this translation unit is compiled for. All functions are always inlined
// and in an unnamed namespace: the linker must never choose a function with AVX-512 instructions
// for another unit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LC_INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif

typedef float vf __attribute__((vector_size(4 * width)));
typedef int32_t vi __attribute__((vector_size(4 * width)));
typedef int16_t vh __attribute__((vector_size(2 * width)));
typedef uint8_t vb __attribute__((vector_size(width)));

LC_INLINE vf load(const float * p) {
    vf r;
    std::memcpy(&r, p, sizeof r);
    return r;
}

LC_INLINE void store(float * p, vf v) { std::memcpy(p, &v, sizeof v); }

// `vf{} + x` would add, as -0 + 0 is 0.
LC_INLINE vf splat(float x) {
#if defined(__AVX512F__)
    return (vf) _mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (vf) _mm256_set1_ps(x);
#else
    return vf{x, x, x, x};
#endif
}

// The greater of each two numbers; NaN where `b` is NaN.
LC_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf) _mm512_max_ps((__m512) a, (__m512) b);
#elif defined(__AVX2__)
    return (vf) _mm256_max_ps((__m256) a, (__m256) b);
#else
    return a > b ? a : b;
#endif
}

LC_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf) _mm512_min_ps((__m512) a, (__m512) b);
#elif defined(__AVX2__)
    return (vf) _mm256_min_ps((__m256) a, (__m256) b);
#else
    return a < b ? a : b;
#endif
}

// a * b + c. The compiler fuses what it likes, here and there: where a row must get the same bits
// in every tile, it has no choice with this.
LC_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf) _mm512_fmadd_ps((__m512) a, (__m512) b, (__m512) c);
#elif defined(__AVX2__)
    return (vf) _mm256_fmadd_ps((__m256) a, (__m256) b, (__m256) c);
#else
    return a * b + c;
#endif
}

LC_INLINE vf vabs(vf a) { return (vf) ((vi) a & 0x7fffffff); }

LC_INLINE float reduce_sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512) v);
#else
    float s = 0;
    for (int i = 0; i < width; i++) {
        s += v[i];
    }
    return s;
#endif
}

LC_INLINE float reduce_max(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512) v);
#else
    float s = v[0];
    for (int i = 1; i < width; i++) {
        s = s > v[i] ? s : v[i];
    }
    return s;
#endif
}

// The lanes i and i ^ DISTANCE change places.
template <int DISTANCE>
LC_INLINE vf exchange(vf v) {
#if defined(__AVX512F__)
    switch (DISTANCE) {
        case 1: return (vf) _mm512_permute_ps((__m512) v, 0xb1);
        case 2: return (vf) _mm512_permute_ps((__m512) v, 0x4e);
        case 4: return (vf) _mm512_shuffle_f32x4((__m512) v, (__m512) v, 0xb1);
        default: return (vf) _mm512_shuffle_f32x4((__m512) v, (__m512) v, 0x4e);
    }
#elif defined(__AVX2__)
    switch (DISTANCE) {
        case 1: return (vf) _mm256_permute_ps((__m256) v, 0xb1);
        case 2: return (vf) _mm256_permute_ps((__m256) v, 0x4e);
        default: return (vf) _mm256_permute2f128_ps((__m256) v, (__m256) v, 1);
    }
#else
    vf r;
    for (int i = 0; i < width; i++) {
        r[i] = v[i ^ DISTANCE];
    }
    return r;
#endif
}

// Load the first n numbers of a vector; the rest are zeros.
LC_INLINE vf load_part(const float * p, int n) {
    vf r = {};
    std::memcpy(&r, p, n * sizeof(float));
    return r;
}

// How exact a function must be: as its result is kept in float, or rounded to bf16.
enum class precision { f32, bf16 };

// exp2: x is split into an integer, which goes into the exponent, and a fraction. The relative
// error of the polynomials is 8e-8 and 8e-5.
template <precision P = precision::f32>
LC_INLINE vf exp2v(vf x) {
    vf p;
#if defined(__AVX512DQ__)
    // The fraction in [0, 1). scalef takes the integer part of x itself, and handles infinities.
    const vf f = (vf) _mm512_reduce_ps((__m512) x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    if (P == precision::bf16) {
        p = f * 0.078024514f + 0.226067171f;
        p = p * f + 0.695833564f;
        p = p * f + 0.999925196f;
    } else {
        p = f * 0.00187757658f + 0.00898934063f;
        p = p * f + 0.0558263175f;
        p = p * f + 0.240153611f;
        p = p * f + 0.693153083f;
        p = p * f + 0.99999994f;
    }
    return (vf) _mm512_scalef_ps((__m512) p, (__m512) x);
#else
    x = vmin(splat(127.f), vmax(splat(-126.f), x));
    const vf big = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf t = x + big;
    const vf f = x - (t - big);  // in [-1/2, 1/2]
    if (P == precision::bf16) {  // an error of 3e-6, enough for int16 too
        p = f * 9.5701e-3f + 5.591786e-2f;
        p = p * f + 2.4024745e-1f;
        p = p * f + 6.9312181e-1f;
        p = p * f + 9.9999926e-1f;
    } else {
        p = f * 1.32764701e-3f + 9.67554096e-3f;
        p = p * f + 5.55071346e-2f;
        p = p * f + 2.40221202e-1f;
        p = p * f + 6.93146944e-1f;
        p = p * f + 1.00000012f;
    }
    return (vf) ((vi) p + ((vi) t << 23));
#endif
}

constexpr float log2e = 1.44269504f;

template <precision P = precision::f32>
LC_INLINE vf inverse(vf x) {
#if defined(__AVX512F__)
    const __m512 r = _mm512_rcp14_ps((__m512) x);
    if (P == precision::bf16) {
        return (vf) r;
    }
    const __m512 e = _mm512_fnmadd_ps((__m512) x, r, _mm512_set1_ps(2.f));
    // If the estimate is 0 (x is infinite), the correction would be infinity times 0.
    return (vf) _mm512_mask_mul_ps(r, _mm512_cmp_ps_mask(r, _mm512_setzero_ps(), _CMP_NEQ_UQ), r,
                                   e);
#elif defined(__AVX2__)
    const __m256 r = _mm256_rcp_ps((__m256) x);  // and one step of Newton's method
    return (vf) _mm256_mul_ps(r, _mm256_fnmadd_ps((__m256) x, r, _mm256_set1_ps(2.f)));
#else
    return 1.f / x;
#endif
}

template <precision P = precision::f32>
LC_INLINE vf sigmoidv(vf x) {
    return inverse<P>(1.f + exp2v<P>(x * -log2e));
}

// GELU by the approximation with tanh, written as x times a sigmoid.
template <precision P = precision::f32>
LC_INLINE vf geluv(vf x) {
    const float c = -log2e * 2 * 0.79788456f;
    return x * inverse<P>(1.f + exp2v<P>(x * (x * x * (c * 0.044715f) + c)));
}

// erf by Abramowitz and Stegun 7.1.26, with an error of 1.5e-7.
LC_INLINE vf gelu_erfv(vf x) {
    const vf z = vabs(x) * 0.70710678f;
    const vf t = inverse(1.f + z * 0.3275911f);
    vf p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vf tail = p * t * exp2v(z * z * -log2e) * 0.5f;  // the probability beyond |x|
    return x * (x > 0.f ? 1.f - tail : tail);
}

LC_INLINE vf tanhv(vf x) { return 2.f * sigmoidv(2.f * x) - 1.f; }

#if defined(__AVX512BF16__)
LC_INLINE void store_bf16(uint16_t * p, vf v) {
    const __m256bh r = _mm512_cvtneps_pbh((__m512) v);
    std::memcpy(p, &r, sizeof r);
}
#endif

// Add the products of pairs of int16: a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1].
LC_INLINE vi add_pair_products(vi sum, vi a, vi b) {
#if defined(__AVX512VNNI__)
    return (vi) _mm512_dpwssd_epi32((__m512i) sum, (__m512i) a, (__m512i) b);
#elif defined(__AVXVNNI__)
    return (vi) _mm256_dpwssd_avx_epi32((__m256i) sum, (__m256i) a, (__m256i) b);
#elif defined(__AVX2__)
    return sum + (vi) _mm256_madd_epi16((__m256i) a, (__m256i) b);
#elif defined(__SSE2__)
    return sum + (vi) _mm_madd_epi16((__m128i) a, (__m128i) b);
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

LC_INLINE vi load_i(const void * p) {
    vi r;
    std::memcpy(&r, p, sizeof r);
    return r;
}

LC_INLINE uint16_t round_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffff) > 0x7f800000) {
        return (uint16_t) ((u >> 16) | 64);  // NaN stays NaN
    }
    return (uint16_t) ((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

LC_INLINE uint16_t round_f16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    const uint32_t sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) {
        return (uint16_t) (sign | 0x7e00);  // NaN
    }
    if (rest >= 0x477ff000) {
        return (uint16_t) (sign | 0x7c00);  // rounds to infinity
    }
    if (rest < 0x38800000) {  // subnormal: a multiple of 2^-24, the last place of numbers from 0.5
        const float shifted = __builtin_fabsf(x) + 0.5f;
        std::memcpy(&u, &shifted, sizeof u);
        return (uint16_t) (sign | (u - 0x3f000000));
    }
    return (uint16_t) (sign | ((rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13));
}

LC_INLINE void store_f16(uint16_t * p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *) p, _mm512_cvtps_ph((__m512) v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i *) p, _mm256_cvtps_ph((__m256) v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < width; i++) {
        p[i] = round_f16(v[i]);
    }
#endif
}

LC_INLINE float from_f16(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16;
    const uint32_t rest = h & 0x7fff;
    uint32_t bits;
    float f;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + (112u << 23));
    } else {
        f = (float) rest * 5.9604645e-8f;  // subnormal: a multiple of 2^-24
        std::memcpy(&bits, &f, sizeof bits);
        bits |= sign;
    }
    std::memcpy(&f, &bits, sizeof f);
    return f;
#endif
}

LC_INLINE vf load_f16(const uint16_t * p) {
#if defined(__AVX512F__)
    return (vf) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
#elif defined(__F16C__)
    return (vf) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
#else
    vf r;
    for (int i = 0; i < width; i++) {
        r[i] = from_f16(p[i]);
    }
    return r;
#endif
}

}  // namespace
