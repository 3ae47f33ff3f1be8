#include "graph_builder.hpp"

#include <stdexcept>

#include "ggml-alloc.h"
#include "ggml-backend-impl.h"

namespace llamacrab::kernels {

struct free_buffer {
    void operator()(ggml_backend_buffer * b) const { ggml_backend_buffer_free(b); }
};

std::vector<float> graph_builder::compute(ggml_tensor * out, ggml_backend_t backend,
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
    for (ggml_tensor * node : first_nodes) {
        ggml_build_forward_expand(graph, node);
    }
    ggml_build_forward_expand(graph, out);
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        taken = taken && ggml_backend_supports_op(backend, ggml_graph_node(graph, i));
    }
    std::vector<float> values(ggml_nelements(out));
    if (!taken) {
        return values;
    }
    // As in a context: ggml decides which nodes share memory.
    const std::unique_ptr<ggml_gallocr, void (*)(ggml_gallocr_t)> allocator(
        ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)), ggml_gallocr_free);
    if (!ggml_gallocr_alloc_graph(allocator.get(), graph)) {
        throw std::runtime_error("no memory for the graph");
    }
    for (const auto & one : skipped_nodes) {
        const std::vector<float> values(ggml_nelements(one.first), one.second);
        ggml_backend_tensor_set(one.first, values.data(), 0, ggml_nbytes(one.first));
        one.first->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
    }
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("the graph could not be computed");
    }
    ggml_backend_tensor_get(out, values.data(), 0, ggml_nbytes(out));
    return values;
}

std::vector<float> mask_of(const std::vector<int> & lengths, const std::string & kind, int n) {
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
                    (kind == "fully_masked" && i == first)) {
                    value = closed;
                }
            }
        }
        first += length;
    }
    return mask;
}

ggml_tensor * linear(graph_builder & b, ggml_tensor * x, ggml_type type, int64_t m, bool bias) {
    ggml_tensor * y = ggml_mul_mat(b.g(), b.weight(type, x->ne[0], m), x);
    return bias ? ggml_add(b.g(), y, b.row(m)) : y;
}

ggml_tensor * normed(graph_builder & b, ggml_tensor * x, bool rms) {
    x = rms ? ggml_rms_norm(b.g(), x, 1e-6f) : ggml_norm(b.g(), x, 1e-6f);
    x = ggml_mul(b.g(), x, b.row(x->ne[0]));
    return rms ? x : ggml_add(b.g(), x, b.row(x->ne[0]));
}

ggml_tensor * attention(graph_builder & b, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                        ggml_tensor * mask, float softcap, float max_bias) {
    ggml_context * g = b.g();
    const float scale = 1 / std::sqrt((float) q->ne[0]);
    q = ggml_permute(g, q, 0, 2, 1, 3);
    const auto from_cache_or_cast = [&](ggml_tensor * t) {
        const bool cached = t->view_src && t->view_src->op == GGML_OP_NONE;
        t = ggml_permute(g, t, 0, 2, 1, 3);
        return cached ? t : ggml_cast(g, t, GGML_TYPE_F16);
    };
    k = from_cache_or_cast(k);
    v = from_cache_or_cast(v);
    ggml_tensor * y = ggml_flash_attn_ext(g, q, k, v, mask, scale, max_bias, softcap);
    return ggml_reshape_2d(g, y, y->ne[0] * y->ne[1], y->ne[2]);
}

}  // namespace llamacrab::kernels
