#include "ops.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "ggml_backend.hpp"

namespace llamacrab::kernels {

char * aligned_memory::reserve(size_t bytes) {
    if (bytes > size) {
        block.reset();
        size = 0;
        block.reset(new char[bytes + 64]);
        size = bytes;
        data = (char *) (((uintptr_t) block.get() + 63) / 64 * 64);
    }
    return data;
}

static const float * floats_of(const ggml_tensor * t) {
    return t ? (const float *) t->data : nullptr;
}

template <class T>
static T param(const ggml_tensor * node, int index) {
    T value;
    std::memcpy(&value, node->op_params + index, sizeof value);
    return value;
}

// -------------------------------------------------------------------------- products and norms

// Rows of a product that are computed before their norm: a multiple of every tile, such that the
// rows fit in L2 together with the weights of a panel.
constexpr int rows_per_block = 96;
// Without a tail no row goes through scratch, and each panel is read again for each block: as many
// rows per block as leave room in L2.
constexpr int max_block_bytes = 400000;

static norm_args make_norm_args(const step & s, const step_data & data) {
    norm_args a{};
    a.n = (int) s.out->ne[0];
    a.residual = floats_of(s.residual);
    a.ldr = a.ldx = a.ldy = a.n;
    a.ldq = int8_row_bytes(s.out);
    if (s.norm) {
        a.norm = true;
        a.rms = s.norm->op == GGML_OP_RMS_NORM;
        a.eps = param<float>(s.norm, 0);
        a.weight = floats_of(s.norm_weight);
        a.bias = floats_of(s.norm_bias);
    }
    a.y = data.y;
    a.y_bf16 = data.y_bf16;
    a.y_int16 = data.y_int16;
    a.y_int8 = data.y_int8;
    a.y_scale = data.y_scale;
    return a;
}

static linear_args make_linear_args(const step & s, const step_data & data) {
    linear_args a{};
    a.w = s.weight->data;
    a.layout = layout_of(s.weight);
    a.k = (int) s.weight->ne[0];
    a.m = a.column1 = (int) s.weight->ne[1];
    a.x = data.x;
    a.x_type = s.x_type;
    a.ldx = a.k;
    if (a.layout == weight_layout::int16_panels) {
        a.ldx = int16_row(a.k);
    }
    if (a.layout == weight_layout::int8_panels) {
        a.ldx = int8_row_bytes(s.x.tensor);
        const size_t scales = int8_scales_offset(a.ldx, ggml_nrows(s.x.tensor));
        a.x_scale = (const float *) ((const char *) a.x + scales);
        a.w_scale = int8_scales(s.weight, a.w);
        a.w_sum = int8_sums(s.weight, a.w);
    }
    a.bias = floats_of(s.bias);
    a.act = s.act;
    a.ldy = a.m;
    return a;
}

static size_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const long known = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (known > 0) {
        return (size_t) known;
    }
#endif
    return 512 * 1024;
}

// Threads take whole tiles. Few rows are divided into blocks of one tile.
static int block_rows(const step & s, const linear_args & a, int n_rows, int n_threads) {
    int block = rows_per_block;
    if (s.has_tail()) {
        // With what they become next, in half of L2.
        const int fit = (int) (l2_bytes() / 2 / (a.m * sizeof(float)));
        block = std::max(24, std::min(block, fit / 12 * 12));
    }
    if (!s.has_tail() && !s.slots.has(data_type::int16)) {
        block *= std::max(1, max_block_bytes / (2 * a.k * rows_per_block));
    }
    if (n_threads > 1) {
        const int tile = active_kernels().tile;
        const int share = (n_rows + n_threads - 1) / n_threads;
        block = std::min(block, (share + tile - 1) / tile * tile);
    }
    return block;
}

int worthwhile_threads(double work, int n_threads) {
    // About 40 us of a core; those that multiply bf16 do four times as much in it.
    const double least_work = active_kernels().has_bf16() ? 6e6 : 1.5e6;
    return std::clamp((int) (work / least_work), 1, n_threads);
}

// A product of rows that are not enough for each thread to have a block: threads divide the
// columns, so that each weight is read once.
static void run_linear_by_columns(const step & s, const step_data & data, const parallel & workers,
                                  const linear_args & linear) {
    const kernel_table & set = active_kernels();
    const int n_rows = (int) ggml_nrows(s.x.tensor), n_threads = workers.n_threads;
    linear_args all = linear;
    size_t scratch_size = 0;  // of each thread
    if (s.has_tail()) {
        scratch_size = (size_t) n_rows * linear.m;  // of all together
        all.y = (float *) workers.scratch.reserve(scratch_size * sizeof(float));
    } else {
        all.y = data.y;
        all.y_bf16 = data.y_bf16;
        all.y_int16 = data.y_int16;
        scratch_size = all.y_int16 ? (size_t) n_rows * int16_block : 0;
        all.scratch = (float *) workers.scratch.reserve(scratch_size * n_threads * sizeof(float));
    }
    const int unit = all.y_int16 ? int16_block : panel_width;
    const int part = (linear.m / (3 * n_threads) / unit + 1) * unit;  // a few for each thread
    workers.threads.parallel_for((linear.m + part - 1) / part, n_threads, [&](int i, int thread) {
        linear_args mine = all;
        mine.column0 = i * part;
        mine.column1 = std::min(linear.m, (i + 1) * part);
        if (all.y_int16) {
            mine.scratch += thread * scratch_size;
        }
        set.linear(mine, 0, n_rows);
    });
    if (s.has_tail()) {
        norm_args tail = make_norm_args(s, data);
        tail.x = all.y;
        const int n = worthwhile_threads((double) n_rows * linear.m * work_per_value, n_threads);
        workers.threads.parallel_for(n_rows, n, [&](int i, int) { set.norm(tail, i, i + 1); });
    }
}

static void run_linear_by_rows(const step & s, const step_data & data, const parallel & workers,
                               const linear_args & all) {
    const kernel_table & set = active_kernels();
    const int n_rows = (int) ggml_nrows(s.x.tensor);
    linear_args linear = all;
    const int block = block_rows(s, linear, n_rows, workers.n_threads);
    const int n_blocks = (n_rows + block - 1) / block;
    if (!s.has_tail()) {
        linear.y = data.y;
        linear.y_bf16 = data.y_bf16;
        linear.y_int16 = data.y_int16;
        const size_t scratch_size = linear.y_int16 ? (size_t) block * int16_block : 0;
        float * scratch =
            (float *) workers.scratch.reserve(scratch_size * workers.n_threads * sizeof(float));
        workers.threads.parallel_for(n_blocks, workers.n_threads, [&](int i, int thread) {
            linear_args part = linear;
            part.scratch = scratch + thread * scratch_size;
            set.linear(part, i * block, std::min(n_rows, (i + 1) * block));
        });
        return;
    }
    const size_t block_size = (size_t) block * linear.m;
    float * sums =
        (float *) workers.scratch.reserve(block_size * workers.n_threads * sizeof(float));
    const norm_args tail = make_norm_args(s, data);
    workers.threads.parallel_for(n_blocks, workers.n_threads, [&](int i, int thread) {
        const int row0 = i * block, row1 = std::min(n_rows, row0 + block);
        linear_args to_sums = linear;
        norm_args from_sums = tail;
        // Both kernels count rows from the first row of the whole matrix.
        to_sums.y = sums + thread * block_size - (size_t) row0 * linear.m;
        from_sums.x = to_sums.y;
        set.linear(to_sums, row0, row1);
        set.norm(from_sums, row0, row1);
    });
}

void run_linear(const step & s, const step_data & data, const parallel & workers) {
    const linear_args linear = make_linear_args(s, data);
    const int n_rows = (int) ggml_nrows(s.x.tensor);
    const double work = (double) n_rows * linear.k * linear.m;
    const parallel fewer{workers.threads, worthwhile_threads(work, workers.n_threads),
                         workers.scratch};
    if (fewer.n_threads > 1 && n_rows < rows_per_block * fewer.n_threads) {
        return run_linear_by_columns(s, data, fewer, linear);
    }
    run_linear_by_rows(s, data, fewer, linear);
}

void run_norm(const step & s, const step_data & data, int row0, int row1) {
    norm_args a = make_norm_args(s, data);
    a.x = (const float *) data.x;
    active_kernels().norm(a, row0, row1);
}

// ----------------------------------------------------------------------------------- attention

// The strides of an operand, in elements: from a token to the next, and from a head to the next.
static void set_strides(const operand & from, ptrdiff_t & row, ptrdiff_t & head) {
    const ggml_tensor * t = from.tensor;
    if (from.gathered) {
        row = t->ne[2] * t->ne[0];
        head = t->ne[0];
    } else {
        row = t->nb[1] / ggml_type_size(t->type);
        head = t->nb[2] / ggml_type_size(t->type);
    }
}

// ALiBi: each head multiplies the mask by a slope of its own.
static float alibi_slope(int head, int n_heads, float max_bias) {
    if (max_bias <= 0) {
        return 1;
    }
    const int power_of_two = 1 << (int) std::floor(std::log2(n_heads));
    const float base0 = std::exp2(-max_bias / power_of_two);
    const float base1 = std::exp2(-max_bias / 2 / power_of_two);
    return head < power_of_two ? std::pow(base0, head + 1)
                               : std::pow(base1, 2 * (head - power_of_two) + 1);
}

void run_attention(const step & s, const step_data & data, const std::vector<segment> & segments,
                   const parallel & workers) {
    const kernel_table & set = active_kernels();
    const ggml_tensor *q = s.node->src[0], *k = s.node->src[1], *v = s.node->src[2],
                      *mask = s.node->src[3];
    attention_args a{};
    a.scale = param<float>(s.node, 0);
    const float max_bias = param<float>(s.node, 1);
    a.softcap = param<float>(s.node, 2);
    a.q = data.x;
    a.k = data.k;
    a.v = data.v;
    a.type = s.x_type;
    a.k_f16 = s.k.is_f16();
    a.v_f16 = s.v.is_f16();
    set_strides(s.x, a.q_row, a.q_head);
    set_strides(s.k, a.k_row, a.k_head);
    set_strides(s.v, a.v_row, a.v_head);
    a.d_k = (int) q->ne[0];
    a.d_v = (int) v->ne[0];
    a.heads_per_kv = (int) (q->ne[2] / k->ne[2]);
    a.y = data.y;
    a.y_bf16 = data.y_bf16;
    a.y_head = a.d_v;
    a.y_row = a.d_v * q->ne[2];
    if (mask) {
        a.mask = (const uint16_t *) mask->data;
        a.mask_row = mask->nb[1] / 2;
    }

    int max_keys = 0;
    for (const segment & part : segments) {
        max_keys = std::max(max_keys, part.key1 - part.key0);
    }
    const size_t thread_bytes = (set.attention_scratch(a.d_k, a.d_v, max_keys) + 63) / 64 * 64;
    char * scratch = workers.scratch.reserve(thread_bytes * workers.n_threads);
    // Heads that share keys and values go together, unless that leaves threads without work. (With
    // ALiBi each head has a slope of its own.)
    const int n_heads = (int) q->ne[2], n_segments = (int) segments.size();
    double work = 0;
    for (const segment & part : segments) {
        work +=
            (double) (part.row1 - part.row0) * (part.key1 - part.key0) * (a.d_k + a.d_v) * n_heads;
    }
    const int n_threads = worthwhile_threads(work, workers.n_threads);
    const bool together = max_bias <= 0 && n_segments * (int) k->ne[2] >= 2 * n_threads;
    const int group = together ? a.heads_per_kv : 1, n_groups = n_heads / group;
    const auto attend = [&](int i, int thread) {
        const int head = i % n_groups * group;
        attention_args one = a;
        one.scratch = scratch + thread * thread_bytes;
        one.slope = alibi_slope(head, n_heads, max_bias);
        set.attention(one, segments[i / n_groups], head, group);
    };
    workers.threads.parallel_for(n_segments * n_groups, n_threads, attend);
}

// ------------------------------------------------------------------------- operations row by row

void run_gate(const step & s, const step_data & data, int row0, int row1) {
    const kernel_table & set = active_kernels();
    const bool is_glu = s.node->op == GGML_OP_GLU;
    const ggml_tensor * b = is_glu ? s.node->src[1] : nullptr;
    const int64_t n = s.out->ne[0];
    for (int64_t row = row0; row < row1; row++) {
        const float * left = (const float *) data.x + row * s.x.tensor->ne[0];
        const float * right = b ? (const float *) b->data + row * n : nullptr;
        if (is_glu && !b) {  // one tensor holds both halves
            const bool swapped = param<int32_t>(s.node, 1) != 0;
            right = left + (swapped ? 0 : n);
            left += swapped ? n : 0;
        }
        set.gate(s.act, left, right, data.y ? data.y + row * n : nullptr,
                 data.y_bf16 ? data.y_bf16 + row * n : nullptr, n);
    }
}

void run_binary(const step & s, const step_data & data, int row0, int row1) {
    const kernel_table & set = active_kernels();
    const auto apply = s.node->op == GGML_OP_ADD ? set.add : set.mul;
    const ggml_tensor * b = s.node->src[1];
    const int64_t n = s.out->ne[0], b_stride = ggml_nrows(b) == 1 ? 0 : n;
    for (int64_t row = row0; row < row1; row++) {
        apply((const float *) data.x + row * n, (const float *) b->data + row * b_stride,
              data.y + row * n, n);
    }
}

void run_scale(const step & s, const step_data & data, int row0, int row1) {
    const float factor = param<float>(s.node, 0), shift = param<float>(s.node, 1);
    const int64_t n = s.out->ne[0];
    for (int64_t i = row0 * n; i < row1 * n; i++) {
        data.y[i] = ((const float *) data.x)[i] * factor + shift;
    }
}

void run_get_rows(const step & s, const step_data & data, int row0, int row1) {
    const int32_t * ids = (const int32_t *) s.node->src[1]->data;
    const int64_t n = s.out->ne[0];
    for (int64_t row = row0; row < row1; row++) {
        std::memcpy(data.y + row * n, (const float *) data.x + ids[row] * n, n * sizeof(float));
    }
}

// Row number `row` of a tensor with any strides.
static const char * row_of(const ggml_tensor * t, int64_t row) {
    const int64_t i1 = row % t->ne[1], i2 = row / t->ne[1] % t->ne[2],
                  i3 = row / t->ne[1] / t->ne[2];
    return (const char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
}

void run_copy(const step & s, const step_data & data, int row0, int row1) {
    const ggml_tensor * x = s.x.tensor;
    const int64_t n = s.out->ne[0];
    for (int64_t row = row0; row < row1; row++) {
        const char * from = row_of(x, row);
        for (int64_t i = 0; i < n; i++) {
            const float value = *(const float *) (from + i * x->nb[0]);
            if (s.out->type == GGML_TYPE_F32) {
                data.y[row * n + i] = value;
            } else {
                ((ggml_fp16_t *) s.out->data)[row * n + i] = ggml_fp32_to_fp16(value);
            }
        }
    }
}

static float value_at(const ggml_tensor * t, const char * at) {
    return t->type == GGML_TYPE_F32 ? *(const float *) at
                                    : ggml_fp16_to_fp32(*(const ggml_fp16_t *) at);
}

// These two write float32 or bf16, as `x_type` says.
static void store_as(const step & s, const step_data & data, size_t index, float value) {
    if (s.x_type == data_type::f32) {
        data.y[index] = value;
    } else {
        data.y_bf16[index] = ggml_fp32_to_bf16(value).bits;
    }
}

void run_convert(const step & s, const step_data & data, int row0, int row1) {
    const ggml_tensor * x = s.x.tensor;
    const int64_t n = s.out->ne[0];
    if (data.y_int8) {
        return run_norm(s, data, row0, row1);  // which quantizes, here without a norm
    }
    if (data.y_int16) {
        for (int64_t row = row0; row < row1; row++) {
            active_kernels().to_int16((const float *) x->data + row * n,
                                      data.y_int16 + row * int16_row((int) n), (int) n);
        }
        return;
    }
    if (x->type == GGML_TYPE_F32) {
        return active_kernels().to_bf16((const float *) x->data + row0 * n, data.y_bf16 + row0 * n,
                                        (row1 - row0) * n);
    }
    for (int64_t i = row0 * n; i < row1 * n; i++) {
        const float value = ggml_fp16_to_fp32(((const ggml_fp16_t *) x->data)[i]);
        store_as(s, data, i, value);
    }
}

void run_gather(const step & s, const step_data & data, int row0, int row1) {
    const ggml_tensor * x = s.x.tensor;
    const size_t size = ggml_type_size(x->type);
    const int64_t n = s.out->ne[0];
    for (int64_t row = row0; row < row1; row++) {
        const char * from = row_of(x, row);
        const size_t to = (row % x->ne[1] * x->ne[2] + row / x->ne[1]) * n;
        for (int64_t i = 0; i < n; i++) {
            store_as(s, data, to + i, value_at(x, from + i * size));
        }
    }
}

// The parameters of ggml_rope_ext(), but for the number of dimensions and the mode.
struct rope_params {
    float base, frequency, extrapolation, magnitude;
    float corrected[2];  // YaRN interpolates pairs from one of these to the other in part

    explicit rope_params(const ggml_tensor * node)
        : base(param<float>(node, 5)),
          frequency(param<float>(node, 6)),
          extrapolation(param<float>(node, 7)),
          magnitude(param<float>(node, 8)) {
        ggml_rope_yarn_corr_dims(param<int32_t>(node, 1), param<int32_t>(node, 4), base,
                                 param<float>(node, 9), param<float>(node, 10), corrected);
    }

    // The angle of pair i, given what its position alone makes it (rope_yarn() of ggml).
    float angle(float theta, int i) const {
        if (extrapolation == 0) {
            return theta * frequency;
        }
        const float place =
            ((float) i - corrected[0]) / std::max(0.001f, corrected[1] - corrected[0]);
        const float mix = (1 - std::clamp(place, 0.f, 1.f)) * extrapolation;
        return theta * frequency * (1 - mix) + theta * mix;
    }

    float length() const {
        return extrapolation == 0 ? magnitude : magnitude * (1 + 0.1f * std::log(1 / frequency));
    }
};

std::vector<float> rope_angles(const ggml_tensor * node) {
    const rope_params params(node);
    const int64_t n_tokens = node->ne[2], half = param<int32_t>(node, 1) / 2;
    const float step = std::pow(params.base, -1.0f / half), length = params.length();
    const auto * positions = (const int32_t *) node->src[1]->data;
    const float * factors = floats_of(node->src[2]);
    std::vector<float> angles(n_tokens * half * 2);
    for (int64_t token = 0; token < n_tokens; token++) {
        float * cosines = angles.data() + token * half * 2;
        float theta = (float) positions[token];
        for (int i = 0; i < half; i++) {
            const float angle = params.angle(factors ? theta / factors[i] : theta, i);
            cosines[i] = std::cos(angle) * length;
            cosines[half + i] = std::sin(angle) * length;
            theta *= step;
        }
    }
    return angles;
}

bool have_same_angles(const ggml_tensor * a, const ggml_tensor * b) {
    // The mode (2) says only which values are a pair.
    for (const int i : {1, 4, 5, 6, 7, 8, 9, 10}) {
        if (a->op_params[i] != b->op_params[i]) {
            return false;
        }
    }
    return a->src[1] == b->src[1] && a->src[2] == b->src[2];
}

void run_rope(const step & s, const step_data & data, int row0, int row1) {
    const kernel_table & set = active_kernels();
    const ggml_tensor * x = s.node->src[0];
    const int n_dims = param<int32_t>(s.node, 1);
    const bool neighbours = param<int32_t>(s.node, 2) == GGML_ROPE_TYPE_NORMAL;
    const int64_t n = x->ne[0], heads = x->ne[1];
    float rotated[widest_head];
    for (int64_t row = row0; row < row1; row++) {
        const int64_t token = row / heads, head = row % heads;
        const auto * from =
            (const float *) ((const char *) x->data + token * x->nb[2] + head * x->nb[1]);
        const float * cosines = data.angles + token * n_dims;
        float * to = data.y ? data.y + row * n : rotated;
        set.rope(from, cosines, cosines + n_dims / 2, to, n_dims, neighbours);
        std::memmove(to + n_dims, from + n_dims, (n - n_dims) * sizeof(float));
        if (data.y_bf16) {
            set.to_bf16(to, data.y_bf16 + row * n, n);
        }
    }
}

// Write rows to the places in another tensor, a KV cache, that `src[1]` names.
void run_set_rows(const step & s, const step_data &, int row0, int row1) {
    const ggml_tensor *x = s.x.tensor, *places = s.node->src[1], *out = s.out;
    for (int64_t row = row0; row < row1; row++) {
        const auto * from = (const float *) ((const char *) x->data + row * x->nb[1]);
        const int64_t place = places->type == GGML_TYPE_I64 ? ((const int64_t *) places->data)[row]
                                                            : ((const int32_t *) places->data)[row];
        char * to = (char *) out->data + place * out->nb[1];
        if (out->type == GGML_TYPE_F16) {
            active_kernels().to_f16(from, (uint16_t *) to, x->ne[0]);
        } else {
            std::memcpy(to, from, x->ne[0] * sizeof(float));
        }
    }
}

void run_pool(const step & s, const step_data & data, int row0, int row1) {
    const ggml_tensor * weights = s.node->src[1];
    const ggml_tensor * x = s.x.tensor;
    const int64_t n = s.out->ne[0], n_tokens = weights->ne[0];
    // `x` holds the rows of tokens if the copy that transposes them is left out.
    const bool transposed = x == s.node->src[0];
    const int64_t token_stride = transposed ? 1 : n, value_stride = transposed ? x->ne[0] : 1;
    for (int64_t row = row0; row < row1; row++) {
        const float * weight = (const float *) weights->data + row * n_tokens;
        float * sum = data.y + row * n;
        std::memset(sum, 0, n * sizeof(float));
        for (int64_t t = 0; t < n_tokens; t++) {
            if (weight[t] == 0) {  // most are: those of the tokens of other texts
                continue;
            }
            const float * values = (const float *) x->data + t * token_stride;
            for (int64_t i = 0; i < n; i++) {
                sum[i] += weight[t] * values[i * value_stride];
            }
        }
    }
}

}  // namespace llamacrab::kernels
