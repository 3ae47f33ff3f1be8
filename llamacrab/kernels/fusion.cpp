// Which nodes this backend takes, and how they become steps.
//
// A matrix product takes the nodes after it along: the bias, the activation, the residual, the
// norm. What is fused is never written: only the last node's tensor gets its data, and that only if
// somebody reads it as floats. Between steps data stays in bf16 or int8, in slots of our own.
//
// A tensor's memory is reused once the last node that reads it, in ggml's order, is through. So a
// step may read a tensor later than its node would have only if it reads a slot; and a fused step,
// which writes in the memory of its last node what it reads row by row, only where the two do not
// overlap, or lie on each other.
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "executor.hpp"
#include "ggml-impl.h"

namespace llamacrab::kernels {

// -------------------------------------------------------------------------------------- what we
// take

static bool floats(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && ggml_is_contiguous(t);
}

static const ggml_backend_buffer * buffer_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src->buffer : t->buffer;
}

// Weights of other buffers keep their nodes: a model that is not in our buffers is none of our
// business.
static bool has_foreign_weights(const ggml_tensor * node) {
    for (const ggml_tensor * src : node->src) {
        const auto * buffer = src ? buffer_of(src) : nullptr;
        if (buffer && buffer->usage == GGML_BACKEND_BUFFER_USAGE_WEIGHTS &&
            !(is_ours(src) && !src->view_src)) {
            return true;
        }
    }
    return false;
}

static bool is_row(const ggml_tensor * row, const ggml_tensor * like) {
    return floats(row) && row->ne[0] == like->ne[0] && ggml_nrows(row) == 1;
}

static activation activation_of(ggml_unary_op op) {
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

static activation activation_of(ggml_glu_op op) {
    switch (op) {
        case GGML_GLU_OP_REGLU: return activation::relu;
        case GGML_GLU_OP_GEGLU: return activation::gelu;
        case GGML_GLU_OP_SWIGLU: return activation::silu;
        case GGML_GLU_OP_GEGLU_ERF: return activation::gelu_erf;
        case GGML_GLU_OP_GEGLU_QUICK: return activation::gelu_quick;
        default: return activation::none;
    }
}

static bool is_transposed_copy(const ggml_tensor * t) {
    return t->op == GGML_OP_CONT && t->type == GGML_TYPE_F32 &&
           t->src[0]->op == GGML_OP_TRANSPOSE && floats(t->src[0]->src[0]) && t->ne[2] == 1 &&
           t->ne[3] == 1;
}

static bool takes_product(const ggml_tensor * node) {
    const ggml_tensor *w = node->src[0], *x = node->src[1];
    if (ggml_get_op_params_i32(node, 1) == GGML_HINT_SRC0_IS_HADAMARD || !floats(x) ||
        !floats(node)) {
        return false;
    }
    if (is_transposed_copy(w)) {  // pooling by mean
        return x->ne[2] == 1 && x->ne[3] == 1;
    }
    // A matrix that is also the table of embeddings, or what a decoder predicts tokens with, is
    // large and not used for rows.
    const bool predicts = std::strcmp(w->name, "token_embd.weight") == 0 ||
                          std::strcmp(w->name, "output.weight") == 0;
    return is_ours(w) && !w->view_src && packing_in_place(w) != packing::raw && !predicts;
}

static bool takes_attention(const ggml_tensor * node) {
    const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
    const auto half_or_float = [](const ggml_tensor * t) {
        // A cache's tensors are there before the graph is planned; a cache holds more keys than are
        // seen.
        return (t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_F32) &&
               t->nb[0] == ggml_type_size(t->type) && !buffer_of(t);
    };
    return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && half_or_float(k) &&
           half_or_float(v) && q->ne[0] == k->ne[0] && q->ne[0] % 2 == 0 && q->ne[0] <= 256 &&
           v->ne[0] <= 256 && v->ne[0] % 2 == 0 && q->ne[3] == 1 && k->ne[3] == 1 &&
           v->ne[3] == 1 && k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0 && !node->src[4] &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == 2 && mask->ne[2] == 1 &&
                      mask->ne[3] == 1 && mask->ne[1] >= q->ne[1])) &&
           floats(node);
}

static bool takes_rope(const ggml_tensor * node) {
    const ggml_tensor * x = node->src[0];
    const int32_t * p = node->op_params;
    const int mode = p[2];
    float extrapolation;
    std::memcpy(&extrapolation, p + 7, sizeof extrapolation);
    return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[3] == 1 && floats(node) &&
           (mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX) && extrapolation == 0 &&
           !node->src[2] && p[15] == 0 && p[1] % 2 == 0 && p[1] <= x->ne[0] && x->ne[0] <= 512;
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
    if (node->view_src ||
        has_foreign_weights(node)) {  // nothing in place, in another tensor's memory
        return false;
    }
    switch (node->op) {
        case GGML_OP_MUL_MAT: return takes_product(node);
        case GGML_OP_ADD:
        case GGML_OP_MUL:
            return floats(node) && floats(a) && a->ne[0] > 1 && floats(b) &&
                   (is_row(b, a) || ggml_are_same_shape(a, b));
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM: return floats(node) && floats(a) && a->ne[0] <= widest_row;
        case GGML_OP_UNARY:
            return floats(node) && floats(a) &&
                   activation_of(ggml_get_unary_op(node)) != activation::none;
        case GGML_OP_GLU:
            return floats(node) && floats(a) && (!b || floats(b)) &&
                   activation_of(ggml_get_glu_op(node)) != activation::none;
        case GGML_OP_SCALE: return floats(node) && floats(a);
        case GGML_OP_GET_ROWS:
            return floats(node) && floats(a) && !buffer_of(a) && b->type == GGML_TYPE_I32 &&
                   ggml_is_contiguous(b) && a->ne[2] == 1 && a->ne[3] == 1 && ggml_nrows(b) == 1;
        case GGML_OP_CONT:
        case GGML_OP_CPY:
            return a->type == GGML_TYPE_F32 &&
                   (node->type == GGML_TYPE_F32 || node->type == GGML_TYPE_F16) &&
                   ggml_is_contiguous(node) && ggml_are_same_shape(a, node);
        case GGML_OP_ROPE: return takes_rope(node);
        case GGML_OP_FLASH_ATTN_EXT: return takes_attention(node);
        default: return false;
    }
}

// ------------------------------------------------------------------------------------ the planner

static bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW ||
           t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

static bool disjoint(const ggml_tensor * a, const ggml_tensor * b) {
    const char *p = (const char *) a->data, *q = (const char *) b->data;
    return p + ggml_nbytes(a) <= q || q + ggml_nbytes(b) <= p;
}

// Whether rows of `out` may be written while later rows of `in` are still to be read.
static bool may_write_over(const ggml_tensor * out, const ggml_tensor * in) {
    return disjoint(out, in) ||
           (out->data == in->data && out->nb[1] == in->nb[1] && out->type == in->type);
}

class planner {
  public:
    explicit planner(const ggml_cgraph * graph) : graph(graph), set(active_kernels()) {}

    plan make();

  private:
    struct knowledge {
        int seen = 0;         // uses by nodes of this part
        int producer = -1;    // the step that computes it
        bool needed = false;  // as floats, in its own memory
        int bf16 = no_slot, int8 = no_slot;
        const ggml_tensor * alias = nullptr;  // a copy that is not made: read this instead
    };

    int uses(const ggml_tensor * t) const {
        const size_t at = ggml_hash_find(&graph->visited_hash_set, t);
        return at != GGML_HASHSET_FULL && ggml_bitset_get(graph->visited_hash_set.used, at)
                   ? graph->use_counts[at]
                   : 1 << 20;
    }

    // Whether nothing but its one reader needs it.
    bool passes_on(const ggml_tensor * t) {
        return uses(t) == 1 && !(t->flags & GGML_TENSOR_FLAG_OUTPUT);
    }

    static const ggml_tensor * base_of(const ggml_tensor * t) {
        return t->view_src ? t->view_src : t;
    }

    int next(int i) const {
        for (i++; i < graph->n_nodes && is_view(graph->nodes[i]); i++) {
        }
        return i;
    }

    step & add(step_kind kind, const ggml_tensor * node, const ggml_tensor * out) {
        made.steps.push_back({});
        step & s = made.steps.back();
        s.kind = kind;
        s.node = node;
        s.out = out;
        know[out].producer = (int) made.steps.size() - 1;
        return s;
    }

    int new_slot(size_t bytes, int first) {
        made.slots.push_back({});
        made.slots.back().bytes = bytes;
        made.slots.back().first = made.slots.back().last = first;
        return (int) made.slots.size() - 1;
    }

    void read_floats(const ggml_tensor * t) {
        if (t) {
            know[base_of(t)].needed = true;
        }
    }

    bool slot_of(const ggml_tensor * t, packing kind, source & from);
    // A step of one node, which reads its first operand as floats.
    step & plan_reader(step_kind kind, const ggml_tensor * node) {
        read_floats(node->src[0]);
        step & s = add(kind, node, node);
        s.x.tensor = node->src[0];
        return s;
    }

    source convert(const ggml_tensor * t, packing kind);
    source operand(const ggml_tensor * t, packing kind);
    source attention_operand(const ggml_tensor * t, packing kind);

    int plan_linear(int i);
    int plan_norm(int i, const ggml_tensor * residual, const ggml_tensor * x);
    int follow_norm(step & s, int i, const ggml_tensor * norm);
    bool skip_copy(int i);
    void plan_attention(const ggml_tensor * node);
    void keep(source & from) {
        if (from.slot != no_slot) {
            made.slots[from.slot].last =
                std::max(made.slots[from.slot].last, (int) made.steps.size() - 1);
        }
    }
    void place_slots();

    const ggml_cgraph * graph;
    const kernel_table & set;
    plan made;
    std::unordered_map<const ggml_tensor *, knowledge> know;
    bool half = false;  // attention in bf16
};

// Find, or ask its producer for, a copy of a tensor in another type.
bool planner::slot_of(const ggml_tensor * t, packing kind, source & from) {
    const ggml_tensor * base = base_of(t);
    knowledge & k = know[base];
    int & slot = kind == packing::int8 ? k.int8 : k.bf16;
    if (slot == no_slot && k.producer >= 0 && ggml_is_contiguous(base)) {
        step & s = made.steps[k.producer];
        const bool rows = s.kind == step_kind::norm || s.kind == step_kind::linear;
        if (kind == packing::bf16 && (rows || s.kind == step_kind::attention ||
                                      s.kind == step_kind::gate || s.kind == step_kind::rope)) {
            slot = s.bf16 = new_slot(ggml_nelements(base) * 2, k.producer);
        } else if (kind == packing::int8 && rows && base->ne[0] <= widest_row) {
            slot = s.int8 = new_slot(ggml_nelements(base) + ggml_nrows(base) * 8 + 64, k.producer);
        }
    }
    if (slot == no_slot) {
        return false;
    }
    from.tensor = t;
    from.slot = slot;
    from.shift = ((const char *) t->data - (const char *) base->data) / (ptrdiff_t) sizeof(float);
    return true;
}

source planner::convert(const ggml_tensor * t, packing kind) {
    read_floats(t);
    const bool dense = ggml_is_contiguous(t);
    const size_t n = ggml_nelements(t);
    const size_t bytes = kind == packing::int8   ? n + ggml_nrows(t) * 8 + 64
                         : kind == packing::bf16 ? n * 2
                                                 : n * 4;
    step s{};
    s.kind = dense ? step_kind::convert : step_kind::gather;
    s.node = s.out = t;
    s.x.tensor = t;
    s.x_kind = kind;
    const int slot = new_slot(bytes, (int) made.steps.size());
    (kind == packing::int8 ? s.int8 : s.bf16) = slot;
    made.steps.push_back(s);
    if (dense && !t->view_src && kind != packing::f32) {  // the next reader may use it too
        (kind == packing::int8 ? know[t].int8 : know[t].bf16) = slot;
    }
    return {t, slot, 0, !dense};
}

// What a product multiplies.
source planner::operand(const ggml_tensor * t, packing kind) {
    source from;
    if (kind == packing::f32) {
        read_floats(t);
        from.tensor = t;
        return from;
    }
    // int8 rows have scales: the tensor must be the whole, row by row.
    const bool whole = kind != packing::int8 || (ggml_nelements(t) == ggml_nelements(base_of(t)) &&
                                                 t->ne[0] == base_of(t)->ne[0]);
    if (whole && slot_of(t, kind, from)) {
        return from;
    }
    return convert(t, kind);
}

int planner::follow_norm(step & s, int i, const ggml_tensor * norm) {
    s.norm = s.out = norm;
    for (int j = next(i); j < graph->n_nodes && passes_on(s.out); j = next(j)) {
        const ggml_tensor * n = graph->nodes[j];
        const ggml_tensor * other = n->src[0] == s.out ? n->src[1] : n->src[0];
        if ((n->src[0] != s.out && n->src[1] != s.out) || !other || !is_row(other, s.out) ||
            !is_ours(other)) {
            break;
        }
        if (n->op == GGML_OP_MUL && !s.norm_w && !s.norm_b) {
            s.norm_w = other;
        } else if (n->op == GGML_OP_ADD && !s.norm_b) {
            s.norm_b = other;
        } else {
            break;
        }
        s.out = n;
        i = j;
    }
    return i;
}

int planner::plan_linear(int i) {
    const ggml_tensor * node = graph->nodes[i];
    const ggml_tensor *w = node->src[0], *x = node->src[1];
    const packing kind = packing_in_place(w);
    step s{};
    s.kind = step_kind::linear;
    s.node = s.out = node;
    s.w = w;
    s.x_kind = kind == packing::bf16 && !set.bf16 ? packing::f32 : kind;
    s.x = operand(x, s.x_kind);
    // A product reads all of x again for each panel; with a tail it goes through scratch, block by
    // block.
    const auto free_to = [&](const ggml_tensor * out, const ggml_tensor * residual) {
        return (s.x.slot != no_slot || may_write_over(out, x)) &&
               (!residual || may_write_over(out, residual));
    };
    const auto apart = [&](const ggml_tensor * out) {
        return s.x.slot != no_slot || disjoint(out, x);
    };
    for (int j = next(i); j < graph->n_nodes && passes_on(s.out); j = next(j)) {
        const ggml_tensor *n = graph->nodes[j], *a = n->src[0], *b = n->src[1];
        const bool reads = a == s.out || (b == s.out && a != b);
        const ggml_tensor * other = a == s.out ? b : a;
        if (!reads || n->type != GGML_TYPE_F32) {
            break;
        }
        if (n->op == GGML_OP_ADD && is_row(other, s.out) && is_ours(other) && apart(n) && !s.bias &&
            s.act == activation::none && !s.residual) {
            s.bias = other;
        } else if (n->op == GGML_OP_UNARY && s.act == activation::none && !s.residual && apart(n) &&
                   activation_of(ggml_get_unary_op(n)) != activation::none) {
            s.act = activation_of(ggml_get_unary_op(n));
        } else if (n->op == GGML_OP_ADD && !s.residual && ggml_are_same_shape(other, s.out) &&
                   floats(other) && n->ne[0] <= widest_row && free_to(n, other)) {
            s.residual = other;
        } else if ((n->op == GGML_OP_NORM || n->op == GGML_OP_RMS_NORM) && can_compute(n)) {
            const step before = s;
            const int last = follow_norm(s, j, n);
            if (free_to(s.out, s.residual)) {
                i = last;
            } else {
                s = before;
            }
            break;
        } else {
            break;
        }
        s.out = n;
        i = j;
    }
    made.steps.push_back(s);
    know[s.out].producer = (int) made.steps.size() - 1;
    read_floats(s.residual);
    keep(made.steps.back().x);
    return i;
}

int planner::plan_norm(int i, const ggml_tensor * residual, const ggml_tensor * x) {
    step s{};
    s.kind = step_kind::norm;
    s.node = graph->nodes[i];
    s.x.tensor = x;
    s.residual = residual;
    const int norm = residual ? next(i) : i;
    const int last = follow_norm(s, norm, graph->nodes[norm]);
    if (!may_write_over(s.out, x) || (residual && !may_write_over(s.out, residual))) {
        return -1;
    }
    made.steps.push_back(s);
    know[s.out].producer = (int) made.steps.size() - 1;
    read_floats(x);
    read_floats(residual);
    return last;
}

// A copy to f16 that only attention reads is left out where attention can read what it copies in
// bf16.
bool planner::skip_copy(int i) {
    const ggml_tensor *node = graph->nodes[i], *from = node->src[0];
    source unused;
    if (!half || node->type != GGML_TYPE_F16 || from->nb[0] != sizeof(float) ||
        (node->flags & GGML_TENSOR_FLAG_OUTPUT)) {
        return false;
    }
    int readers = 0;
    for (int j = i + 1; j < graph->n_nodes; j++) {
        const ggml_tensor * n = graph->nodes[j];
        for (const ggml_tensor * src : n->src) {
            if (src && base_of(src) == node) {
                if (n->op != GGML_OP_FLASH_ATTN_EXT || src != node) {
                    return false;
                }
                readers++;
            }
        }
    }
    const int itself = node->src[1] == node ? 1 : 0;
    if (readers == 0 || uses(node) != readers + itself || !slot_of(from, packing::bf16, unused)) {
        return false;
    }
    know[node].alias = from;
    return true;
}

source planner::attention_operand(const ggml_tensor * t, packing kind) {
    const ggml_tensor * alias = know[t].alias;
    source from;
    if (kind == packing::bf16 && slot_of(alias ? alias : t, kind, from)) {
        return from;
    }
    if (t->type == GGML_TYPE_F32 && kind == packing::f32) {
        read_floats(t);
        from.tensor = t;
        return from;
    }
    return convert(t, kind);
}

void planner::plan_attention(const ggml_tensor * node) {
    const packing kind = half ? packing::bf16 : packing::f32;
    const source q = attention_operand(node->src[0], kind);
    const source k = attention_operand(node->src[1], kind);
    const source v = attention_operand(node->src[2], kind);
    step & s = add(step_kind::attention, node, node);
    s.x_kind = kind;
    s.x = q;
    s.k = k;
    s.v = v;
    keep(s.x);
    keep(s.k);
    keep(s.v);
}

plan planner::make() {
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = graph->nodes[i];
        for (const ggml_tensor * src : node->src) {
            if (src) {
                know[src].seen++;
            }
        }
        if (node->op == GGML_OP_MUL_MAT && is_ours(node->src[0]) &&
            packing_in_place(node->src[0]) != packing::f32) {
            half = set.bf16;
        }
    }
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = graph->nodes[i];
        // What other parts of the graph read, or the caller, must be there as floats.
        if ((node->flags & GGML_TENSOR_FLAG_OUTPUT) || uses(node) != know[node].seen) {
            know[base_of(node)].needed = true;
        }
    }
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor *node = graph->nodes[i], *a = node->src[0], *b = node->src[1];
        if (is_view(node) || ggml_is_empty(node)) {
            continue;
        }
        switch (node->op) {
            case GGML_OP_MUL_MAT:
                if (is_ours(a)) {
                    i = plan_linear(i);
                } else {
                    read_floats(know[a].alias ? know[a].alias : a);
                    read_floats(b);
                    add(step_kind::pool, node, node).x.tensor = know[a].alias ? know[a].alias : a;
                }
                break;
            case GGML_OP_ADD: {
                const int j = next(i);
                if (j < graph->n_nodes && passes_on(node) && graph->nodes[j]->src[0] == node &&
                    (graph->nodes[j]->op == GGML_OP_NORM ||
                     graph->nodes[j]->op == GGML_OP_RMS_NORM) &&
                    ggml_are_same_shape(a, b) && can_compute(graph->nodes[j])) {
                    const int last = plan_norm(i, b, a);
                    if (last >= 0) {
                        i = last;
                        break;
                    }
                }
                read_floats(b);
                plan_reader(step_kind::binary, node);
                break;
            }
            case GGML_OP_MUL:
                read_floats(b);
                plan_reader(step_kind::binary, node);
                break;
            case GGML_OP_NORM:
            case GGML_OP_RMS_NORM: {
                const int last = plan_norm(i, nullptr, a);
                if (last >= 0) {
                    i = last;
                } else {  // the norm alone writes over what it reads, row by row
                    plan_reader(step_kind::norm, node).norm = node;
                }
                break;
            }
            case GGML_OP_UNARY:
            case GGML_OP_GLU: {
                read_floats(b);
                plan_reader(step_kind::gate, node).act =
                    node->op == GGML_OP_GLU ? activation_of(ggml_get_glu_op(node))
                                            : activation_of(ggml_get_unary_op(node));
                break;
            }
            case GGML_OP_SCALE: plan_reader(step_kind::scale, node); break;
            case GGML_OP_GET_ROWS: plan_reader(step_kind::get_rows, node); break;
            case GGML_OP_CONT:
            case GGML_OP_CPY: {
                const int j = next(i);
                if (is_transposed_copy(node) && passes_on(node) && j < graph->n_nodes &&
                    graph->nodes[j]->op == GGML_OP_MUL_MAT && graph->nodes[j]->src[0] == node &&
                    disjoint(graph->nodes[j], a->src[0])) {
                    know[node].alias = a->src[0];
                    break;
                }
                if (node->op == GGML_OP_CPY && skip_copy(i)) {
                    break;
                }
                plan_reader(step_kind::copy, node);
                break;
            }
            case GGML_OP_ROPE: plan_reader(step_kind::rope, node); break;
            case GGML_OP_FLASH_ATTN_EXT: plan_attention(node); break;
            default: break;
        }
    }
    for (step & s : made.steps) {
        s.write = s.kind != step_kind::convert && s.kind != step_kind::gather &&
                  (know[base_of(s.out)].needed || (s.bf16 == no_slot && s.int8 == no_slot));
    }
    place_slots();
    return std::move(made);
}

// First fit: a slot takes the lowest place where none lies that is in use at the same time.
void planner::place_slots() {
    std::vector<const slot *> placed;
    for (slot & s : made.slots) {
        s.bytes = (s.bytes + 127) / 64 * 64;  // and room for what a kernel reads beyond the end
        s.offset = 0;
        for (bool moved = true; moved;) {
            moved = false;
            for (const slot * other : placed) {
                const bool together = s.first <= other->last && other->first <= s.last;
                const bool overlap =
                    s.offset < other->offset + other->bytes && other->offset < s.offset + s.bytes;
                if (together && overlap) {
                    s.offset = other->offset + other->bytes;
                    moved = true;
                }
            }
        }
        placed.push_back(&s);
        made.arena = std::max(made.arena, s.offset + s.bytes);
    }
}

plan make_plan(const ggml_cgraph * graph) { return planner(graph).make(); }

}  // namespace llamacrab::kernels
