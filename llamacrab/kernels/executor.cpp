// Runs a plan.
#include "executor.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

namespace llamacrab::kernels {

// Rows of a product that are computed before their norm: a multiple of every tile that fits in L2
// beside the weights of a panel.
constexpr int rows_a_block = 96;
constexpr int bytes_of_rows = 400000;

char * graph_runner::memory::grow(size_t bytes) {
    if (bytes > size) {
        block.reset();
        size = 0;
        block.reset(new char[bytes + 64]);
        size = bytes;
        at = (char *) (((uintptr_t) block.get() + 63) / 64 * 64);
    }
    return at;
}

static size_t int8_row(const ggml_tensor * t) { return (t->ne[0] + 3) / 4 * 4; }

// Where the scales of an int8 slot's rows lie: behind the rows.
static size_t int8_scales_at(size_t row, int64_t rows) { return (row * rows + 63) / 64 * 64; }

char * graph_runner::slot_data(int slot) const { return arena.at + current.slots[slot].offset; }

const void * graph_runner::data_of(const source & from, packing kind) const {
    if (from.slot == no_slot) {
        return from.tensor->data;
    }
    const size_t size = kind == packing::f32 ? 4 : kind == packing::bf16 ? 2 : 1;
    return slot_data(from.slot) + from.shift * (ptrdiff_t) size;
}

const std::vector<segment> & graph_runner::segments(const ggml_tensor * mask, int n_rows,
                                                    int n_keys) {
    for (const auto & known : masks) {
        if (known.first == mask) {
            return known.second;
        }
    }
    masks.emplace_back(mask, segments_of(mask, n_rows, n_keys));
    return masks.back().second;
}

ggml_status graph_runner::run(const ggml_cgraph * graph) {
    current = make_plan(graph);
    arena.grow(current.arena);
    masks.clear();
    for (const step & s : current.steps) {
        if (abort && abort(abort_data)) {
            return GGML_STATUS_ABORTED;
        }
        run_step(s);
    }
    return GGML_STATUS_SUCCESS;
}

void graph_runner::run_step(const step & s) {
    switch (s.kind) {
        case step_kind::linear: return run_linear(s);
        case step_kind::attention: return run_attention(s);
        default: {
            const int rows = (int) ggml_nrows(s.out);
            const int blocks = n_threads > 1 ? (rows + 15) / 16 : 1;
            helpers.share(n_threads, blocks, [&](int i, int) {
                run_rows(s, (int) ((int64_t) rows * i / blocks),
                         (int) ((int64_t) rows * (i + 1) / blocks));
            });
        }
    }
}

static norm_args norm_of(const step & s) {
    norm_args n{};
    n.n = (int) s.out->ne[0];
    n.residual = s.residual ? (const float *) s.residual->data : nullptr;
    n.ldr = n.ldx = n.ldy = n.n;
    n.ldq = int8_row(s.out);
    if (s.norm) {
        n.norm = true;
        n.rms = s.norm->op == GGML_OP_RMS_NORM;
        std::memcpy(&n.eps, s.norm->op_params, sizeof n.eps);
        n.weight = s.norm_w ? (const float *) s.norm_w->data : nullptr;
        n.bias = s.norm_b ? (const float *) s.norm_b->data : nullptr;
    }
    return n;
}

void graph_runner::run_linear(const step & s) {
    const kernel_table & set = active_kernels();
    const int n = (int) ggml_nrows(s.x.tensor);
    linear_args a{};
    a.w = s.w->data;
    a.kind = packing_in_place(s.w);
    a.k = (int) s.w->ne[0];
    a.m = (int) s.w->ne[1];
    a.x = data_of(s.x, s.x_kind);
    a.x_kind = s.x_kind;
    a.ldx = a.k;
    if (a.kind == packing::int8) {
        a.ldx = int8_row(s.x.tensor);
        a.x_scale = (const float *) ((const char *) a.x + int8_scales_at(a.ldx, n));
        a.w_scale = int8_scales(s.w, a.w);
        a.w_sum = int8_sums(s.w, a.w);
    }
    a.bias = s.bias ? (const float *) s.bias->data : nullptr;
    a.act = s.act;
    a.ldy = a.m;

    float * y = s.write ? (float *) s.out->data : nullptr;
    uint16_t * y_bf16 = s.bf16 != no_slot ? (uint16_t *) slot_data(s.bf16) : nullptr;
    // A thread takes whole tiles; few rows are shared out by one tile each.
    int block = rows_a_block;
    if (!s.has_tail()) {  // nothing goes through scratch: as many rows as leave room in L2, for
                          // each panel is read again
        block *= std::max(1, bytes_of_rows / (2 * a.k * rows_a_block));
    }
    if (n_threads > 1) {
        const int share = (n + n_threads - 1) / n_threads;
        block = std::min(block, (share + set.tile - 1) / set.tile * set.tile);
    }
    const int blocks = (n + block - 1) / block;
    if (!s.has_tail()) {
        a.y = y;
        a.y_bf16 = y_bf16;
        helpers.share(n_threads, blocks,
                      [&](int i, int) { set.linear(a, i * block, std::min(n, (i + 1) * block)); });
        return;
    }
    const size_t each = (size_t) block * a.m;
    float * sums = (float *) scratch.grow(each * n_threads * sizeof(float));
    norm_args tail = norm_of(s);
    tail.y = y;
    tail.y_bf16 = y_bf16;
    if (s.int8 != no_slot) {
        tail.y_int8 = (uint8_t *) slot_data(s.int8);
        tail.y_scale = (float *) (slot_data(s.int8) + int8_scales_at(tail.ldq, n));
    }
    helpers.share(n_threads, blocks, [&](int i, int thread) {
        const int row0 = i * block, row1 = std::min(n, row0 + block);
        linear_args one = a;
        norm_args two = tail;
        // Both count rows from the beginning of the whole.
        one.y = sums + thread * each - (size_t) row0 * a.m;
        two.x = one.y;
        set.linear(one, row0, row1);
        set.norm(two, row0, row1);
    });
}

void graph_runner::run_attention(const step & s) {
    const kernel_table & set = active_kernels();
    const ggml_tensor *q = s.node->src[0], *k = s.node->src[1], *v = s.node->src[2],
                      *mask = s.node->src[3];
    attention_args a{};
    float max_bias;
    std::memcpy(&a.scale, s.node->op_params, sizeof(float));
    std::memcpy(&max_bias, s.node->op_params + 1, sizeof(float));
    std::memcpy(&a.softcap, s.node->op_params + 2, sizeof(float));

    const auto place = [&](const source & from, const void *& data, ptrdiff_t & row,
                           ptrdiff_t & head) {
        const ggml_tensor * t = from.tensor;
        data = data_of(from, s.x_kind);
        if (from.gathered) {
            row = t->ne[2] * t->ne[0];
            head = t->ne[0];
        } else {
            row = t->nb[1] / ggml_type_size(t->type);
            head = t->nb[2] / ggml_type_size(t->type);
        }
    };
    place(s.x, a.q, a.q_row, a.q_head);
    place(s.k, a.k, a.k_row, a.k_head);
    place(s.v, a.v, a.v_row, a.v_head);
    a.kind = s.x_kind;
    a.d_k = (int) q->ne[0];
    a.d_v = (int) v->ne[0];
    a.heads_per_kv = (int) (q->ne[2] / k->ne[2]);
    a.y = s.write ? (float *) s.out->data : nullptr;
    a.y_bf16 = s.bf16 != no_slot ? (uint16_t *) slot_data(s.bf16) : nullptr;
    a.y_head = a.d_v;
    a.y_row = a.d_v * q->ne[2];
    if (mask) {
        a.mask = (const uint16_t *) mask->data;
        a.mask_row = mask->nb[1] / 2;
    }

    const int heads = (int) q->ne[2];
    const auto & parts = segments(mask, (int) q->ne[1], (int) k->ne[1]);
    int most = 0;
    for (const segment & part : parts) {
        most = std::max(most, part.key1 - part.key0);
    }
    const size_t each = (set.attention_scratch(a.d_k, a.d_v, most) + 63) / 64 * 64;
    char * room = scratch.grow(each * n_threads);
    // ALiBi: each head weighs the mask by a slope of its own.
    const int whole = 1 << (int) std::floor(std::log2(heads));
    const float base0 = std::exp2(-max_bias / whole), base1 = std::exp2(-max_bias / 2 / whole);
    helpers.share(n_threads, (int) parts.size() * heads, [&](int i, int thread) {
        attention_args one = a;
        const int head = i % heads;
        one.scratch = room + thread * each;
        one.slope = max_bias <= 0  ? 1
                    : head < whole ? std::pow(base0, head + 1)
                                   : std::pow(base1, 2 * (head - whole) + 1);
        set.attention(one, parts[i / heads], head);
    });
}

// ------------------------------------------------------------------------- the rest, row by row

// Row number `row` of a tensor whose rows may be permuted.
static char * row_of(const ggml_tensor * t, int64_t row) {
    const int64_t i1 = row % t->ne[1], i2 = row / t->ne[1] % t->ne[2],
                  i3 = row / t->ne[1] / t->ne[2];
    return (char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
}

static float value_of(const ggml_tensor * t, const char * at) {
    return t->type == GGML_TYPE_F32 ? *(const float *) at
                                    : ggml_fp16_to_fp32(*(const ggml_fp16_t *) at);
}

static void rope_row(const ggml_tensor * node, int row, float * out) {
    const ggml_tensor * x = node->src[0];
    const int n_dims = node->op_params[1];
    const bool neox = node->op_params[2] == GGML_ROPE_TYPE_NEOX;
    float base, frequency, magnitude;
    std::memcpy(&base, node->op_params + 5, sizeof base);
    std::memcpy(&frequency, node->op_params + 6, sizeof frequency);
    std::memcpy(&magnitude, node->op_params + 8, sizeof magnitude);
    const int heads = (int) x->ne[1], n = (int) x->ne[0], half = n_dims / 2;
    const float step = std::pow(base, -2.0f / n_dims);
    float theta = (float) ((const int32_t *) node->src[1]->data)[row];
    float sines[256], cosines[256];
    for (int i = 0; i < half; i++) {
        cosines[i] = std::cos(theta * frequency) * magnitude;
        sines[i] = std::sin(theta * frequency) * magnitude;
        theta *= step;
    }
    for (int head = 0; head < heads; head++) {
        const float * from =
            (const float *) ((const char *) x->data + row * x->nb[2] + head * x->nb[1]);
        float * to = out + head * n;
        if (neox) {
            for (int i = 0; i < half; i++) {
                const float a = from[i], b = from[i + half];
                to[i] = a * cosines[i] - b * sines[i];
                to[i + half] = a * sines[i] + b * cosines[i];
            }
        } else {
            for (int i = 0; i < half; i++) {
                const float a = from[2 * i], b = from[2 * i + 1];
                to[2 * i] = a * cosines[i] - b * sines[i];
                to[2 * i + 1] = a * sines[i] + b * cosines[i];
            }
        }
        for (int i = n_dims; i < n; i++) {
            to[i] = from[i];
        }
    }
}

void graph_runner::run_rows(const step & s, int row0, int row1) {
    const kernel_table & set = active_kernels();
    const ggml_tensor *node = s.node, *a = s.x.tensor, *out = s.out;
    const int64_t n = out->ne[0];
    float * y = (float *) out->data;
    uint16_t * bf16 = s.bf16 != no_slot ? (uint16_t *) slot_data(s.bf16) : nullptr;
    switch (s.kind) {
        case step_kind::norm: {
            norm_args args = norm_of(s);
            args.x = (const float *) a->data;
            args.y = s.write ? y : nullptr;
            args.y_bf16 = bf16;
            if (s.int8 != no_slot) {
                args.y_int8 = (uint8_t *) slot_data(s.int8);
                args.y_scale =
                    (float *) (slot_data(s.int8) + int8_scales_at(args.ldq, ggml_nrows(out)));
            }
            return set.norm(args, row0, row1);
        }
        case step_kind::convert: {
            if (s.int8 != no_slot) {
                norm_args args = norm_of(s);
                args.x = (const float *) a->data;
                args.y_int8 = (uint8_t *) slot_data(s.int8);
                args.y_scale =
                    (float *) (slot_data(s.int8) + int8_scales_at(args.ldq, ggml_nrows(out)));
                return set.norm(args, row0, row1);
            }
            if (a->type == GGML_TYPE_F32) {
                return set.to_bf16((const float *) a->data + row0 * n, bf16 + row0 * n,
                                   (row1 - row0) * n);
            }
            float * floats = s.x_kind == packing::f32 ? (float *) bf16 : nullptr;
            for (int64_t i = row0 * n; i < row1 * n; i++) {
                const float value = ggml_fp16_to_fp32(((const ggml_fp16_t *) a->data)[i]);
                if (floats) {
                    floats[i] = value;
                } else {
                    bf16[i] = ggml_fp32_to_bf16(value).bits;
                }
            }
            return;
        }
        case step_kind::gather: {
            const size_t size = ggml_type_size(a->type);
            for (int64_t row = row0; row < row1; row++) {
                const char * from = row_of(a, row);
                const size_t to = (row % a->ne[1] * a->ne[2] + row / a->ne[1]) * n;
                for (int64_t i = 0; i < n; i++) {
                    const float value = value_of(a, from + i * size);
                    if (s.x_kind == packing::f32) {
                        ((float *) bf16)[to + i] = value;
                    } else {
                        bf16[to + i] = ggml_fp32_to_bf16(value).bits;
                    }
                }
            }
            return;
        }
        case step_kind::gate: {
            const ggml_tensor * b = node->op == GGML_OP_GLU ? node->src[1] : nullptr;
            for (int64_t row = row0; row < row1; row++) {
                const float * left = (const float *) a->data + row * a->ne[0];
                const float * right = b ? (const float *) b->data + row * n : nullptr;
                if (node->op == GGML_OP_GLU && !b) {
                    const bool swapped = node->op_params[1] != 0;
                    right = left + (swapped ? 0 : n);
                    left += swapped ? n : 0;
                }
                set.gate(s.act, left, right, s.write ? y + row * n : nullptr,
                         bf16 ? bf16 + row * n : nullptr, n);
            }
            return;
        }
        case step_kind::binary: {
            const ggml_tensor * b = node->src[1];
            const auto how = node->op == GGML_OP_ADD ? set.add : set.mul;
            const bool row_only = ggml_nrows(b) == 1;
            for (int64_t row = row0; row < row1; row++) {
                how((const float *) a->data + row * n,
                    (const float *) b->data + (row_only ? 0 : row * n), y + row * n, n);
            }
            return;
        }
        case step_kind::scale: {
            float factor, shift;
            std::memcpy(&factor, node->op_params, sizeof factor);
            std::memcpy(&shift, node->op_params + 1, sizeof shift);
            for (int64_t i = row0 * n; i < row1 * n; i++) {
                y[i] = ((const float *) a->data)[i] * factor + shift;
            }
            return;
        }
        case step_kind::get_rows: {
            const int32_t * ids = (const int32_t *) node->src[1]->data;
            for (int64_t row = row0; row < row1; row++) {
                std::memcpy(y + row * n, (const float *) a->data + ids[row] * n, n * sizeof(float));
            }
            return;
        }
        case step_kind::copy: {
            for (int64_t row = row0; row < row1; row++) {
                const char * from = row_of(a, row);
                for (int64_t i = 0; i < n; i++) {
                    const float value = *(const float *) (from + i * a->nb[0]);
                    if (out->type == GGML_TYPE_F32) {
                        y[row * n + i] = value;
                    } else {
                        ((ggml_fp16_t *) out->data)[row * n + i] = ggml_fp32_to_fp16(value);
                    }
                }
            }
            return;
        }
        case step_kind::rope: {
            // A token's heads are rows of the tensor, but share their angles.
            const int64_t heads = out->ne[1], width = heads * n;
            std::vector<float> token(width);
            for (int64_t row = (row0 + heads - 1) / heads; row * heads < row1; row++) {
                rope_row(node, (int) row, token.data());
                if (s.write) {
                    std::memcpy(y + row * width, token.data(), width * sizeof(float));
                }
                if (bf16) {
                    set.to_bf16(token.data(), bf16 + row * width, width);
                }
            }
            return;
        }
        case step_kind::pool: {
            // Most weights of a mean are zero: those of other texts.
            const ggml_tensor * weights = node->src[1];
            const bool plain = a != node->src[0];  // rows of tokens, else their transpose
            for (int64_t row = row0; row < row1; row++) {
                const float * weight = (const float *) weights->data + row * weights->ne[0];
                float * sum = y + row * n;
                std::memset(sum, 0, n * sizeof(float));
                for (int64_t t = 0; t < weights->ne[0]; t++) {
                    if (weight[t] == 0) {
                        continue;
                    }
                    const float * x = (const float *) a->data;
                    const int64_t step = plain ? 1 : a->ne[0];
                    x += plain ? t * n : t;
                    for (int64_t i = 0; i < n; i++) {
                        sum[i] += weight[t] * x[i * step];
                    }
                }
            }
            return;
        }
        default: return;
    }
}

}  // namespace llamacrab::kernels
