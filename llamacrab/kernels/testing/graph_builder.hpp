// For tests: builds small graphs as llama.cpp does, and computes them on a backend.
#pragma once

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"

namespace llamacrab::kernels {

// A graph under construction: weights and inputs with their values, which are the same for both
// backends.
class graph_builder {
  public:
    graph_builder() : weights(make()), inputs(make()), nodes(make()), random(1) {}

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

    ggml_tensor * places(const std::vector<int64_t> & values) {
        ggml_tensor * t = ggml_new_tensor_1d(inputs.get(), GGML_TYPE_I64, values.size());
        keep(t, values.data());
        return t;
    }

    // Compute a node that others depend on without reading it, before them.
    void first(ggml_tensor * node) { first_nodes.push_back(node); }

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

    // The result of a node: a backend takes it as an operand, which it does not take inputs for.
    ggml_tensor * result(int64_t a, int64_t b) {
        return ggml_scale(g(), input(GGML_TYPE_F32, a, b), 1.0f);
    }

    // Have a node keep this value in place of being computed: ggml skips what lacks the flag.
    ggml_tensor * skipped(ggml_tensor * node, float value) {
        skipped_nodes.emplace_back(node, value);
        return node;
    }

    // Compute a node on a backend, with the weights in buffers of a type.
    std::vector<float> compute(ggml_tensor * out, ggml_backend_t backend,
                               ggml_backend_buffer_type_t type);
    bool taken = true;  // whether the backend supports all nodes; if not, nothing is computed

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
    std::vector<std::pair<ggml_tensor *, float>> skipped_nodes;
    std::vector<ggml_tensor *> first_nodes;
    std::mt19937 random;
};

// The values of a mask for `n` tokens of texts with these lengths. Kinds: "texts", "window",
// "causal", "holes" (random), "fully_masked" (one token of each text sees nothing), "distance".
std::vector<float> mask_of(const std::vector<int> & lengths, const std::string & kind, int n);

// A product with a new weight of m columns.
ggml_tensor * linear(graph_builder & b, ggml_tensor * x, ggml_type type, int64_t m, bool bias);

// A norm with a new weight; a layer norm has a bias too.
ggml_tensor * normed(graph_builder & b, ggml_tensor * x, bool rms);

// As llama.cpp builds it for a model without a KV cache.
ggml_tensor * attention(graph_builder & b, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                        ggml_tensor * mask, float softcap, float max_bias);

}  // namespace llamacrab::kernels
