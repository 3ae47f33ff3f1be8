#include "compare_with_ggml.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>

#include "../ggml_backend.hpp"
#include "../kernels.hpp"
#include "../team.hpp"
#include "ggml-alloc.h"

namespace llamacrab::kernels {

// A graph under construction: weights and inputs with their values, which are the same for both
// backends.
class bench {
  public:
    bench() : weights(make()), inputs(make()), nodes(make()), random(1) {}

    ggml_context * g() { return nodes.get(); }

    ggml_tensor * weight(ggml_type type, int64_t a, int64_t b) {
        ggml_tensor * t = ggml_new_tensor_2d(weights.get(), type, a, b);
        ggml_set_name(t, "ffn");  // so that it may be 8 bits
        fill(t, 1 / std::sqrt((float) a));
        return t;
    }

    ggml_tensor * row(int64_t n) {
        ggml_tensor * t = ggml_new_tensor_1d(weights.get(), GGML_TYPE_F32, n);
        fill(t, 1);
        return t;
    }

    ggml_tensor * input(ggml_type type, int64_t a, int64_t b, int64_t c = 1) {
        ggml_tensor * t = ggml_new_tensor_3d(inputs.get(), type, a, b, c);
        fill(t, 1);
        return t;
    }

    ggml_tensor * input(const std::vector<int32_t> & values) {
        ggml_tensor * t = ggml_new_tensor_1d(inputs.get(), GGML_TYPE_I32, values.size());
        keep(t, values.data());
        return t;
    }

    ggml_tensor * input(ggml_type type, int64_t a, int64_t b, const std::vector<float> & values) {
        ggml_tensor * t = ggml_new_tensor_2d(inputs.get(), type, a, b);
        set(t, values);
        return t;
    }

    // A node's result, as if computed: what a backend takes as an operand, but not as weights.
    ggml_tensor * result(int64_t a, int64_t b) {
        return ggml_scale(g(), input(GGML_TYPE_F32, a, b), 1.0f);
    }

    std::vector<float> compute(ggml_tensor * out, ggml_backend_t backend,
                               ggml_backend_buffer_type_t type);
    bool taken = true;

  private:
    struct free_context {
        void operator()(ggml_context * c) const { ggml_free(c); }
    };
    using context = std::unique_ptr<ggml_context, free_context>;

    static context make() {
        return context(
            ggml_init({ggml_tensor_overhead() * 256 + ggml_graph_overhead(), nullptr, true}));
    }

    void fill(ggml_tensor * t, float scale) {
        std::normal_distribution<float> normal(0, scale);
        std::vector<float> values(ggml_nelements(t));
        for (float & v : values) {
            v = normal(random);
        }
        set(t, values);
    }

    void set(ggml_tensor * t, const std::vector<float> & values) {
        if (t->type == GGML_TYPE_F32) {
            return keep(t, values.data());
        }
        std::vector<char> bytes(ggml_nbytes(t));
        ggml_get_type_traits(t->type)->from_float_ref(values.data(), bytes.data(), values.size());
        keep(t, bytes.data());
    }

    void keep(ggml_tensor * t, const void * data) {
        kept.emplace_back(
            t, std::vector<char>((const char *) data, (const char *) data + ggml_nbytes(t)));
    }

    context weights, inputs, nodes;
    std::vector<std::pair<ggml_tensor *, std::vector<char>>> kept;
    std::mt19937 random;
};

struct free_buffer {
    void operator()(ggml_backend_buffer * b) const { ggml_backend_buffer_free(b); }
};

std::vector<float> bench::compute(ggml_tensor * out, ggml_backend_t backend,
                                  ggml_backend_buffer_type_t type) {
    using buffer = std::unique_ptr<ggml_backend_buffer, free_buffer>;
    const buffer packed(ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), type));
    const buffer plain(
        ggml_backend_alloc_ctx_tensors_from_buft(inputs.get(), ggml_backend_cpu_buffer_type()));
    if (packed) {
        ggml_backend_buffer_set_usage(packed.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }
    for (const auto & one : kept) {
        ggml_backend_tensor_set(one.first, one.second.data(), 0, one.second.size());
    }
    ggml_cgraph * graph = ggml_new_graph_custom(nodes.get(), 256, false);
    ggml_set_output(out);
    ggml_build_forward_expand(graph, out);
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        taken = taken && ggml_backend_supports_op(backend, ggml_graph_node(graph, i));
    }
    std::vector<float> values(ggml_nelements(out));
    if (!taken) {
        return values;
    }
    // As in a context: nodes share memory by ggml's rules.
    const std::unique_ptr<ggml_gallocr, void (*)(ggml_gallocr_t)> allocator(
        ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)), ggml_gallocr_free);
    if (!ggml_gallocr_alloc_graph(allocator.get(), graph) ||
        ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("the graph could not be computed");
    }
    ggml_backend_tensor_get(out, values.data(), 0, ggml_nbytes(out));
    return values;
}

// What sees what, of texts with these lengths.
static std::vector<float> mask_of(const std::vector<int> & lengths, const std::string & kind,
                                  int n) {
    const float closed = -INFINITY;
    std::vector<float> mask((size_t) n * n, closed);
    std::mt19937 random(2);
    int first = 0;
    for (const int length : lengths) {
        for (int i = first; i < first + length; i++) {
            for (int j = first; j < first + length; j++) {
                float & value = mask[(size_t) i * n + j];
                value = kind == "distance" ? -std::abs(i - j) : 0;
                if ((kind == "window" && std::abs(i - j) > 5) || (kind == "causal" && j > i) ||
                    (kind == "holes" && i != j && random() % 3 == 0) ||
                    (kind == "blind" && i == first)) {
                    value = closed;
                }
            }
        }
        first += length;
    }
    return mask;
}

static ggml_tensor * linear(bench & b, ggml_tensor * x, ggml_type type, int64_t m, bool bias) {
    ggml_tensor * y = ggml_mul_mat(b.g(), b.weight(type, x->ne[0], m), x);
    return bias ? ggml_add(b.g(), y, b.row(m)) : y;
}

static ggml_tensor * normed(bench & b, ggml_tensor * x, bool rms) {
    x = rms ? ggml_rms_norm(b.g(), x, 1e-6f) : ggml_norm(b.g(), x, 1e-6f);
    x = ggml_mul(b.g(), x, b.row(x->ne[0]));
    return rms ? x : ggml_add(b.g(), x, b.row(x->ne[0]));
}

// As llama.cpp builds it for a model without memory.
static ggml_tensor * attention(bench & b, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                               ggml_tensor * mask, float softcap, float max_bias) {
    ggml_context * g = b.g();
    const float scale = 1 / std::sqrt((float) q->ne[0]);
    q = ggml_permute(g, q, 0, 2, 1, 3);
    k = ggml_cast(g, ggml_permute(g, k, 0, 2, 1, 3), GGML_TYPE_F16);
    v = ggml_cast(g, ggml_permute(g, v, 0, 2, 1, 3), GGML_TYPE_F16);
    ggml_tensor * y = ggml_flash_attn_ext(g, q, k, v, mask, scale, max_bias, softcap);
    return ggml_reshape_2d(g, y, y->ne[0] * y->ne[1], y->ne[2]);
}

// Share out work again and again with a team of each size; return how many items were not done
// once.
static double check_team(const std::vector<int> & sizes) {
    team threads;
    double wrong = 0;
    for (int round = 0; round < 200; round++) {
        for (const int size : sizes) {
            std::vector<int> done(round % 9);
            threads.share(size, (int) done.size(), [&](int i, int) { done[i]++; });
            wrong += std::count_if(done.begin(), done.end(), [](int times) { return times != 1; });
        }
    }
    return wrong;
}

double check_kernels(const std::string & kind, const std::vector<int> & n) {
    if (kind == "team") {
        return check_team(n);
    }
    static const char * masks[] = {"none",  "texts", "window",  "causal",
                                   "holes", "blind", "distance"};
    const auto at = [&](size_t i) { return n.at(i); };
    const auto lengths = [&](size_t i) { return std::vector<int>(n.begin() + i, n.end()); };
    const auto sum = [](const std::vector<int> & v) {
        int s = 0;
        for (int one : v) {
            s += one;
        }
        return s;
    };
    bool int8 = false;

    const std::function<ggml_tensor *(bench &)> build = [&](bench & b) -> ggml_tensor * {
        ggml_context * g = b.g();
        if (kind == "linear") {  // rows, k, m, type, bias, unary or -1, residual, norm (1: layer,
                                 // 2: rms), int8
            ggml_tensor * y = linear(b, b.result(at(1), at(0)), (ggml_type) at(3), at(2), at(4));
            y = at(5) >= 0 ? ggml_unary(g, y, (ggml_unary_op) at(5)) : y;
            y = at(6) ? ggml_add(g, y, b.result(at(2), at(0))) : y;
            int8 = at(8);
            return at(7) ? normed(b, y, at(7) == 2) : y;
        }
        if (kind == "attention") {  // d, heads, kv heads, mask, softcap, max bias, type of products
                                    // before, lengths
            const auto texts = lengths(7);
            const int tokens = sum(texts), d = at(0);
            const bool products = at(6) >= 0;
            ggml_tensor * x = b.result(64, tokens);
            const auto heads = [&](int count) {
                ggml_tensor * y = products ? linear(b, x, (ggml_type) at(6), d * count, true)
                                           : b.result(d * count, tokens);
                return ggml_reshape_3d(g, y, d, count, tokens);
            };
            ggml_tensor *q = heads(at(1)), *k = heads(at(2)), *v = heads(at(2));
            ggml_tensor * mask = nullptr;
            if (at(3)) {
                mask = b.input(GGML_TYPE_F16, tokens, tokens, mask_of(texts, masks[at(3)], tokens));
            }
            return attention(b, q, k, v, mask, at(4), at(5));
        }
        if (kind == "layer") {  // width, heads, ff, type, gated, rope, rms, before (norm first),
                                // int8, lengths
            const auto texts = lengths(9);
            const int tokens = sum(texts), width = at(0), heads = at(1), d = width / heads;
            const ggml_type type = (ggml_type) at(3);
            const bool gated = at(4), first = at(7);
            int8 = at(8);
            ggml_tensor * mask =
                b.input(GGML_TYPE_F16, tokens, tokens, mask_of(texts, "texts", tokens));
            std::vector<int32_t> places;
            for (int length : texts) {
                for (int i = 0; i < length; i++) {
                    places.push_back(i);
                }
            }
            ggml_tensor * positions = at(5) ? b.input(places) : nullptr;
            ggml_tensor * x = b.result(width, tokens);
            for (int layer = 0; layer < 2; layer++) {
                ggml_tensor * in = first ? normed(b, x, at(6)) : x;
                const auto part = [&](bool turned) {
                    ggml_tensor * y =
                        ggml_reshape_3d(g, linear(b, in, type, width, true), d, heads, tokens);
                    return turned && positions ? ggml_rope(g, y, positions, d, GGML_ROPE_TYPE_NEOX)
                                               : y;
                };
                ggml_tensor *q = part(true), *k = part(true), *v = part(false);
                ggml_tensor * y = attention(b, q, k, v, mask, 0, 0);
                x = ggml_add(g, linear(b, y, type, width, true), x);
                x = first ? x : normed(b, x, at(6));
                in = first ? normed(b, x, at(6)) : x;
                ggml_tensor * up = linear(b, in, type, at(2), !gated);
                up = gated ? ggml_geglu_split(g, up, linear(b, in, type, at(2), false))
                           : ggml_gelu(g, up);
                x = ggml_add(g, linear(b, up, type, width, true), x);
                x = first ? x : normed(b, x, at(6));
            }
            return x;
        }
        if (kind == "norm") {  // width, rows, rms, residual
            ggml_tensor * x = b.result(at(0), at(1));
            x = at(3) ? ggml_add(g, x, b.result(at(0), at(1))) : x;
            return normed(b, x, at(2));
        }
        if (kind == "rope") {  // d, heads, tokens, dims, neox
            std::vector<int32_t> places(at(2));
            for (int i = 0; i < at(2); i++) {
                places[i] = i * 3;
            }
            ggml_tensor * x =
                ggml_reshape_3d(g, b.result(at(0) * at(1), at(2)), at(0), at(1), at(2));
            return ggml_rope(g, x, b.input(places), at(3),
                             at(4) ? GGML_ROPE_TYPE_NEOX : GGML_ROPE_TYPE_NORMAL);
        }
        if (kind == "glu") {  // width, rows, op, split, swapped
            if (at(3)) {
                return ggml_glu_split(g, b.result(at(0), at(1)), b.result(at(0), at(1)),
                                      (ggml_glu_op) at(2));
            }
            return ggml_glu(g, b.result(2 * at(0), at(1)), (ggml_glu_op) at(2), at(4));
        }
        if (kind == "unary") {  // width, rows, op
            return ggml_unary(g, b.result(at(0), at(1)), (ggml_unary_op) at(2));
        }
        if (kind == "binary") {  // width, rows, multiply, one row only
            ggml_tensor *x = b.result(at(0), at(1)), *y = b.result(at(0), at(3) ? 1 : at(1));
            return at(2) ? ggml_mul(g, x, y) : ggml_add(g, x, y);
        }
        if (kind == "pool") {  // width, lengths
            const auto texts = lengths(1);
            const int tokens = sum(texts);
            std::vector<float> means(tokens * texts.size());
            for (size_t text = 0, first = 0; text < texts.size(); first += texts[text++]) {
                for (int i = 0; i < texts[text]; i++) {
                    means[text * tokens + first + i] = 1.0f / texts[text];
                }
            }
            ggml_tensor * x = b.result(at(0), tokens);
            return ggml_mul_mat(g, ggml_cont(g, ggml_transpose(g, x)),
                                b.input(GGML_TYPE_F32, tokens, texts.size(), means));
        }
        if (kind == "rows") {  // width, rows, chosen ...
            return ggml_get_rows(g, b.result(at(0), at(1)),
                                 b.input(std::vector<int32_t>(n.begin() + 2, n.end())));
        }
        if (kind == "copy") {  // a, b, c: permuted, and copied
            ggml_tensor * x =
                ggml_reshape_3d(g, b.result(at(0) * at(1), at(2)), at(0), at(1), at(2));
            return ggml_cont(g, ggml_permute(g, x, 0, 2, 1, 3));
        }
        throw std::invalid_argument("no such check: " + kind);
    };

    using backend = std::unique_ptr<ggml_backend, void (*)(ggml_backend_t)>;
    ggml_backend_dev_t device = ggml_backend_dev_by_name("llamacrab");
    bench ours, theirs;
    ggml_tensor * out = build(ours);
    const backend mine(ggml_backend_dev_init(device, nullptr), ggml_backend_free);
    const backend cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr),
                      ggml_backend_free);
    // ggml's threads spin while they wait for each other: one is faster for graphs as small as
    // these.
    const auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get())),
        "ggml_backend_set_n_threads");
    set_n_threads(cpu.get(), 1);
    ggml_backend_buffer_type_t type;
    {
        const loading_for scope(int8 ? cpu_backend::int8 : cpu_backend::llamacrab);
        type = ggml_backend_dev_buffer_type(device);
    }
    const std::vector<float> a = ours.compute(out, mine.get(), type);
    if (!ours.taken) {
        return -1;
    }
    const std::vector<float> c =
        theirs.compute(build(theirs), cpu.get(), ggml_backend_cpu_buffer_type());
    double off = 0, all = 0;
    for (size_t i = 0; i < a.size(); i++) {
        off += (double) (a[i] - c[i]) * (a[i] - c[i]);
        all += (double) c[i] * c[i];
    }
    return off / all;
}

}  // namespace llamacrab::kernels
