// The kernels' arithmetic against plain loops in double precision, for CPUs that the tests do not
// run on: kernels_elsewhere.sh compiles this for another CPU and runs it under an emulator.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../llamacrab/kernels/kernel_table.hpp"

using namespace llamacrab::kernels;

static std::mt19937 random_bits(1);

static std::vector<float> numbers(size_t n, float scale) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> values(n);
    for (float & value : values) {
        value = normal(random_bits);
    }
    return values;
}

// The squared error as a share of the squared values, which must be less than `most`.
static int differ(const char * what, const std::vector<float> & found,
                  const std::vector<double> & wanted, double most) {
    double off = 0, all = 0;
    for (size_t i = 0; i < wanted.size(); i++) {
        off += (found[i] - wanted[i]) * (found[i] - wanted[i]);
        all += wanted[i] * wanted[i];
    }
    const bool wrong = !(off / all < most);
    std::printf("%-24s %.1e %s\n", what, off / all, wrong ? "WRONG" : "");
    return wrong;
}

// Pack columns of k weights as int16_panels describes.
static std::vector<char> pack_int16(const std::vector<float> & w, int k, int m) {
    const int panels = (m + panel_width - 1) / panel_width;
    std::vector<char> packed(panels * int16_panel_bytes(k));
    for (int column = 0; column < m; column++) {
        char * at = packed.data() + column / panel_width * int16_panel_bytes(k);
        const int place = column % panel_width;
        for (int begin = 0; begin < k; begin += int16_block) {
            const int n = std::min(k - begin, int16_block);
            const float * values = &w[(size_t) column * k + begin];
            float max = 0, sum = 0;
            for (int i = 0; i < n; i++) {
                max = std::max(max, std::fabs(values[i]));
                sum += std::fabs(values[i]);
            }
            const float scale = std::max(max / INT16_MAX, sum / (int16_weight_sum - n));
            auto * pairs = (int16_t *) at;
            for (int i = 0; i < n; i++) {
                pairs[(i / 2 * panel_width + place) * 2 + i % 2] =
                    (int16_t) std::lrint(values[i] / scale);
            }
            at += (size_t) int16_padded(n) * panel_width * 2;
            ((float *) at)[place] = scale;
            at += panel_width * sizeof(float);
        }
    }
    return packed;
}

static int check_linear(const kernel_table & set, int rows, int k, int m, weight_layout layout) {
    const auto x = numbers((size_t) rows * k, 1), w = numbers((size_t) m * k, 0.1f),
               bias = numbers(m, 1);
    const int panels = (m + panel_width - 1) / panel_width;
    std::vector<float> packed((size_t) panels * panel_width * k);
    for (int column = 0; column < m; column++) {
        const size_t panel = column / panel_width, place = column % panel_width;
        for (int i = 0; i < k; i++) {
            packed[panel * panel_width * k + i * panel_width + place] = w[(size_t) column * k + i];
        }
    }
    std::vector<float> y((size_t) rows * m);
    linear_args a{};
    a.layout = layout;
    const std::vector<char> integers = pack_int16(w, k, m);
    std::vector<int16_t> rounded((size_t) rows * int16_row(k));
    a.w = packed.data();
    a.k = k;
    a.m = m;
    a.x = x.data();
    a.ldx = k;
    if (layout == weight_layout::int16_panels) {
        for (int row = 0; row < rows; row++) {
            set.to_int16(&x[(size_t) row * k], &rounded[(size_t) row * int16_row(k)], k);
        }
        a.w = integers.data();
        a.x = rounded.data();
        a.ldx = int16_row(k);
    }
    a.bias = bias.data();
    a.act = activation::gelu;
    a.y = y.data();
    a.ldy = m;
    set.linear(a, 0, rows);
    std::vector<double> wanted;
    for (int row = 0; row < rows; row++) {
        for (int column = 0; column < m; column++) {
            double sum = bias[column];
            for (int i = 0; i < k; i++) {
                sum += (double) x[(size_t) row * k + i] * w[(size_t) column * k + i];
            }
            wanted.push_back(0.5 * sum *
                             (1 + std::tanh(0.7978845608 * (sum + 0.044715 * sum * sum * sum))));
        }
    }
    return differ(layout == weight_layout::f32_panels ? "product, f32" : "product, int16", y,
                  wanted, layout == weight_layout::f32_panels ? 1e-11 : 2e-6);
}

static int check_norm(const kernel_table & set, int rows, int n) {
    const auto x = numbers((size_t) rows * n, 1), r = numbers((size_t) rows * n, 1),
               w = numbers(n, 1), b = numbers(n, 1);
    std::vector<float> y((size_t) rows * n);
    norm_args a{};
    a.x = x.data();
    a.residual = r.data();
    a.weight = w.data();
    a.bias = b.data();
    a.norm = true;
    a.eps = 1e-5f;
    a.n = n;
    a.y = y.data();
    a.ldx = a.ldr = a.ldy = n;
    set.norm(a, 0, rows);
    std::vector<double> wanted;
    for (int row = 0; row < rows; row++) {
        double mean = 0, variance = 0;
        for (int i = 0; i < n; i++) {
            mean += (double) x[row * n + i] + r[row * n + i];
        }
        mean /= n;
        for (int i = 0; i < n; i++) {
            variance += std::pow((double) x[row * n + i] + r[row * n + i] - mean, 2);
        }
        for (int i = 0; i < n; i++) {
            wanted.push_back(((double) x[row * n + i] + r[row * n + i] - mean) /
                                 std::sqrt(variance / n + 1e-5) * w[i] +
                             b[i]);
        }
    }
    return differ("norm", y, wanted, 1e-11);
}

static int check_attention(const kernel_table & set, int tokens, int d) {
    const auto q = numbers((size_t) tokens * d, 1), k = numbers((size_t) tokens * d, 1),
               v = numbers((size_t) tokens * d, 1);
    std::vector<float> y((size_t) tokens * d);
    std::vector<char> scratch(set.attention_scratch(d, d, tokens) + 64);
    attention_args a{};
    a.q = q.data();
    a.k = k.data();
    a.v = v.data();
    a.type = data_type::f32;
    a.q_row = a.k_row = a.v_row = a.y_row = d;
    a.d_k = a.d_v = d;
    a.heads_per_kv = 1;
    a.scale = 1 / std::sqrt((float) d);
    a.slope = 1;
    a.y = y.data();
    a.scratch = (void *) (((uintptr_t) scratch.data() + 63) / 64 * 64);
    // Two texts: none sees the other.
    const int cut = tokens / 3;
    set.attention(a, {0, cut, 0, cut, true}, 0, 1);
    set.attention(a, {cut, tokens, cut, tokens, true}, 0, 1);
    std::vector<double> wanted((size_t) tokens * d);
    for (int row = 0; row < tokens; row++) {
        const int first = row < cut ? 0 : cut, last = row < cut ? cut : tokens;
        double total = 0;
        for (int key = first; key < last; key++) {
            double score = 0;
            for (int i = 0; i < d; i++) {
                score += (double) q[row * d + i] * k[key * d + i];
            }
            const double p = std::exp(score / std::sqrt((double) d));
            total += p;
            for (int i = 0; i < d; i++) {
                wanted[row * d + i] += p * v[key * d + i];
            }
        }
        for (int i = 0; i < d; i++) {
            wanted[row * d + i] /= total;
        }
    }
    return differ("attention", y, wanted, 1e-11);
}

// Every f16 becomes itself, and what lies between two of them becomes the nearer one.
static int check_f16(const kernel_table & set) {
    int wrong = 0;
    for (int bits = 0; bits <= 0x7bff; bits++) {  // up to the greatest number; and infinity
        const uint16_t pair[2] = {(uint16_t) bits, (uint16_t) (bits + 1)};
        float values[2];
        set.from_f16(pair, values, 2);
        const float end = bits == 0x7bff ? 65536 : values[1];
        const double middle = ((double) values[0] + end) / 2;
        const float near[4] = {values[0], (float) (middle * (1 - 1e-6)), (float) middle,
                               (float) (middle * (1 + 1e-6))};
        const int even = bits % 2 == 0 ? bits : bits + 1;
        const int wanted[4] = {bits, bits, even, bits + 1};
        for (const float sign : {1.f, -1.f}) {
            for (int i = 0; i < 4; i++) {
                const float value = near[i] * sign;
                uint16_t found;
                set.to_f16(&value, &found, 1);
                wrong += found != (wanted[i] | (sign < 0 ? 0x8000 : 0));
            }
        }
    }
    std::printf("%-24s %d wrong\n", "f16", wrong);
    return wrong;
}

int main() {
    const kernel_table & set = *generic_kernels();
    int wrong = check_f16(set);
    for (int rows : {1, 3, 4, 17}) {
        for (int m : {5, 32, 70}) {
            wrong += check_linear(set, rows, 64, m, weight_layout::f32_panels) +
                     check_linear(set, rows, 64, m, weight_layout::int16_panels);
        }
    }
    for (int n : {3, 64, 101}) {
        wrong += check_norm(set, 5, n);
    }
    for (int tokens : {3, 9, 50, 100}) {
        wrong += check_attention(set, tokens, 32) + check_attention(set, tokens, 48);
    }
    return wrong ? 1 : 0;
}
