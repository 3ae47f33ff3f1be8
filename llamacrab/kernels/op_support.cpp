// Predicates over single nodes. How nodes are combined is decided in fusion.cpp.
#include "op_support.hpp"

#include <cstring>

#include "ggml-impl.h"
#include "ggml_backend.hpp"

namespace llamacrab::kernels {

bool is_dense_f32(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t);
}

static const ggml_backend_buffer * buffer_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src->buffer : t->buffer;
}

// Nodes whose weights are not packed by this backend are left to other backends.
static bool has_unpacked_weights(const ggml_tensor * node) {
    for (const ggml_tensor * src : node->src) {
        const auto * buffer = src ? buffer_of(src) : nullptr;
        if (buffer && buffer->usage == GGML_BACKEND_BUFFER_USAGE_WEIGHTS &&
            !(is_packed_weight(src) && !src->view_src)) {
            return true;
        }
    }
    return false;
}

bool is_row(const ggml_tensor * row, const ggml_tensor * like) {
    return is_dense_f32(row) && row->ne[0] == like->ne[0] && ggml_nrows(row) == 1;
}

activation activation_of(ggml_unary_op op) {
    switch (op) {
        case GGML_UNARY_OP_GELU: return activation::gelu;
        case GGML_UNARY_OP_GELU_ERF: return activation::gelu_erf;
        case GGML_UNARY_OP_GELU_QUICK: return activation::gelu_quick;
        case GGML_UNARY_OP_SILU: return activation::silu;
        case GGML_UNARY_OP_RELU: return activation::relu;
        case GGML_UNARY_OP_TANH: return activation::tanh;
        case GGML_UNARY_OP_SIGMOID: return activation::sigmoid;
        default: return activation::none;
    }
}

activation activation_of(ggml_glu_op op) {
    switch (op) {
        case GGML_GLU_OP_REGLU: return activation::relu;
        case GGML_GLU_OP_GEGLU: return activation::gelu;
        case GGML_GLU_OP_SWIGLU: return activation::silu;
        case GGML_GLU_OP_GEGLU_ERF: return activation::gelu_erf;
        case GGML_GLU_OP_GEGLU_QUICK: return activation::gelu_quick;
        default: return activation::none;
    }
}

bool is_transposed_copy(const ggml_tensor * t) {
    return t->op == GGML_OP_CONT && t->type == GGML_TYPE_F32 &&
           t->src[0]->op == GGML_OP_TRANSPOSE && is_dense_f32(t->src[0]->src[0]) && t->ne[2] == 1 &&
           t->ne[3] == 1;
}

static bool supports_product(const ggml_tensor * node) {
    const ggml_tensor *w = node->src[0], *x = node->src[1];
    if (ggml_get_op_params_i32(node, 1) == GGML_HINT_SRC0_IS_HADAMARD || !is_dense_f32(x) ||
        !is_dense_f32(node)) {
        return false;
    }
    if (is_transposed_copy(w)) {  // pooling by mean
        return x->ne[2] == 1 && x->ne[3] == 1;
    }
    // Matrices with a row for each token of the vocabulary are large, and embeddings do not need
    // their products.
    const bool is_vocabulary = std::strcmp(w->name, "token_embd.weight") == 0 ||
                               std::strcmp(w->name, "output.weight") == 0;
    return is_packed_weight(w) && !w->view_src && layout_of(w) != weight_layout::unpacked &&
           !is_vocabulary;
}

// Whether packed weights made this tensor. A node that uses a KV cache has no weights of its own,
// and the cache is in memory that every backend can use: without this, ggml's scheduler would give
// this backend such nodes of models that it does not compute.
static bool is_of_packed_model(const ggml_tensor * t) {
    constexpr int longest_way = 16;  // from a product to the cache: bias, norm, RoPE, views
    for (int i = 0; t && i < longest_way; i++, t = t->src[0]) {
        for (const ggml_tensor * src : t->src) {
            if (src && is_packed_weight(src)) {
                return true;
            }
        }
    }
    return false;
}

static bool supports_attention(const ggml_tensor * node) {
    const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
    const auto is_f16_or_f32 = [](const ggml_tensor * t) {
        return (t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_F32) &&
               t->nb[0] == ggml_type_size(t->type);
    };
    const bool is_cached = buffer_of(k) || buffer_of(v);
    return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && is_f16_or_f32(k) &&
           is_f16_or_f32(v) && q->ne[0] == k->ne[0] && q->ne[0] % 2 == 0 && q->ne[0] <= 256 &&
           v->ne[0] <= 256 && v->ne[0] % 2 == 0 && q->ne[3] == 1 && k->ne[3] == 1 &&
           v->ne[3] == 1 && k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0 && !node->src[4] &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == 2 && mask->ne[2] == 1 &&
                      mask->ne[3] == 1 && mask->ne[1] >= q->ne[1])) &&
           is_dense_f32(node) && (!is_cached || is_of_packed_model(q));
}

// Keys or values of a pack, to a KV cache.
static bool supports_set_rows(const ggml_tensor * node) {
    const ggml_tensor *x = node->src[0], *places = node->src[1];
    return (node->type == GGML_TYPE_F16 || node->type == GGML_TYPE_F32) &&
           node->nb[0] == ggml_type_size(node->type) && node->ne[2] == 1 && node->ne[3] == 1 &&
           x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[2] == 1 &&
           x->ne[3] == 1 && ggml_is_contiguous(places) && is_of_packed_model(x);
}

static bool supports_rope(const ggml_tensor * node) {
    const ggml_tensor * x = node->src[0];
    const int32_t * p = node->op_params;
    const int mode = p[2];
    return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[3] == 1 &&
           is_dense_f32(node) && (mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX) &&
           p[15] == 0 && p[1] % 2 == 0 && p[1] <= x->ne[0] && x->ne[0] <= widest_head;
}

bool can_compute(const ggml_tensor * node) {
    const ggml_tensor *a = node->src[0], *b = node->src[1];
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE: return true;
        default: break;
    }
    if (has_unpacked_weights(node)) {
        return false;
    }
    if (node->op == GGML_OP_SET_ROWS) {
        return supports_set_rows(node);
    }
    if (node->view_src) {  // no operations in place, in the memory of another tensor
        return false;
    }
    switch (node->op) {
        case GGML_OP_MUL_MAT: return supports_product(node);
        case GGML_OP_ADD:
        case GGML_OP_MUL:
            return is_dense_f32(node) && is_dense_f32(a) && a->ne[0] > 1 && is_dense_f32(b) &&
                   (is_row(b, a) || ggml_are_same_shape(a, b));
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
            return is_dense_f32(node) && is_dense_f32(a) && a->ne[0] <= widest_row;
        case GGML_OP_UNARY:
            return is_dense_f32(node) && is_dense_f32(a) &&
                   activation_of(ggml_get_unary_op(node)) != activation::none;
        case GGML_OP_GLU:
            return is_dense_f32(node) && is_dense_f32(a) && (!b || is_dense_f32(b)) &&
                   activation_of(ggml_get_glu_op(node)) != activation::none;
        case GGML_OP_SCALE: return is_dense_f32(node) && is_dense_f32(a);
        case GGML_OP_GET_ROWS:
            return is_dense_f32(node) && is_dense_f32(a) && !buffer_of(a) &&
                   b->type == GGML_TYPE_I32 && ggml_is_contiguous(b) && a->ne[2] == 1 &&
                   a->ne[3] == 1 && ggml_nrows(b) == 1;
        case GGML_OP_CONT:
        case GGML_OP_CPY:
            return a->type == GGML_TYPE_F32 &&
                   (node->type == GGML_TYPE_F32 || node->type == GGML_TYPE_F16) &&
                   ggml_is_contiguous(node) && ggml_are_same_shape(a, node);
        case GGML_OP_ROPE: return supports_rope(node);
        case GGML_OP_FLASH_ATTN_EXT: return supports_attention(node);
        default: return false;
    }
}

}  // namespace llamacrab::kernels
