// A matrix product takes the nodes that follow it into its step: the bias, the activation, the
// residual, the norm. The results of nodes inside a step are never written: only the tensor of the
// last node gets its data, and only if a reader needs it as floats. Between steps data stays in
// bf16 or int8, in slots.
//
// ggml reuses the memory of a tensor after the last node, in ggml's order, that reads it. A step
// runs later than its first nodes would have. So
// - a step may read a tensor later than its node would have only if it reads a slot;
// - a fused step writes to the memory of its last node while it reads row by row: allowed only if
//   the memory it reads and writes does not overlap, or is the same.
#include "fusion.hpp"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "ggml-impl.h"
#include "ggml_backend.hpp"
#include "op_support.hpp"

namespace llamacrab::kernels {

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

static bool is_norm(const ggml_tensor * t) {
    return t->op == GGML_OP_NORM || t->op == GGML_OP_RMS_NORM;
}

static const ggml_tensor * base_of(const ggml_tensor * t) { return t->view_src ? t->view_src : t; }

size_t int8_row_bytes(const ggml_tensor * t) { return int8_padded((int) t->ne[0]); }

size_t int8_scales_offset(size_t row_bytes, int64_t n_rows) {
    return (row_bytes * n_rows + 63) / 64 * 64;
}

static size_t slot_bytes(const ggml_tensor * t, data_type type) {
    switch (type) {
        case data_type::f32: return ggml_nelements(t) * 4;
        case data_type::bf16: return ggml_nelements(t) * 2;
        case data_type::int16: return ggml_nrows(t) * int16_row((int) t->ne[0]) * 2;
        default: {
            const size_t scales = int8_scales_offset(int8_row_bytes(t), ggml_nrows(t));
            return scales + ggml_nrows(t) * 2 * sizeof(float);
        }
    }
}

class planner {
  public:
    explicit planner(const ggml_cgraph * graph) : graph(graph) {}

    plan make();

  private:
    struct tensor_info {
        int n_local_uses = 0;        // by nodes of this graph, which may be a part of a larger one
        int producer = -1;           // the step that computes it
        bool needed_as_f32 = false;  // in its own memory
        slots_by_type slots;
        const ggml_tensor * copy_of = nullptr;  // the copy is left out: readers read this instead
    };

    const ggml_tensor * node_at(int i) const { return graph->nodes[i]; }

    // The next node that computes something. At one that is not to be computed a fused step ends:
    // its result stays as it is, so what comes after it does not belong to what came before.
    int next(int i) const {
        for (i++; i < graph->n_nodes && is_view(graph->nodes[i]); i++) {
        }
        return i < graph->n_nodes && is_wanted(graph->nodes[i]) ? i : graph->n_nodes;
    }

    // As ggml-cpu does, which skips the others.
    static bool is_wanted(const ggml_tensor * node) {
        return (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
    }

    int n_uses(const ggml_tensor * t) const {
        const size_t at = ggml_hash_find(&graph->visited_hash_set, t);
        return at != GGML_HASHSET_FULL && ggml_bitset_get(graph->visited_hash_set.used, at)
                   ? graph->use_counts[at]
                   : 1 << 20;
    }

    bool has_single_consumer(const ggml_tensor * t) const {
        return n_uses(t) == 1 && !(t->flags & GGML_TENSOR_FLAG_OUTPUT);
    }

    const ggml_tensor * source_of(const ggml_tensor * t) {
        const ggml_tensor * original = info[t].copy_of;
        return original ? original : t;
    }

    int last_step() const { return (int) result.steps.size() - 1; }

    step & add(const step & s) {
        result.steps.push_back(s);
        info[s.out].producer = last_step();
        return result.steps.back();
    }

    // Add a step of one node that reads its first operand as floats.
    step & add_simple(step_kind kind, const ggml_tensor * node) {
        require_f32(node->src[0]);
        step s{};
        s.kind = kind;
        s.node = s.out = node;
        s.x.tensor = node->src[0];
        return add(s);
    }

    void require_f32(const ggml_tensor * t) {
        if (t) {
            info[base_of(t)].needed_as_f32 = true;
        }
    }

    int new_slot(size_t bytes, int first_step) {
        result.slots.push_back({bytes, first_step, first_step, 0});
        return (int) result.slots.size() - 1;
    }

    // The last step reads this operand: its slot must last until then.
    void extend_slot(const operand & from) {
        if (from.slot != no_slot) {
            int & last = result.slots[from.slot].last_step;
            last = std::max(last, last_step());
        }
    }

    bool find_slot(const ggml_tensor * t, data_type type, operand & from);
    operand convert(const ggml_tensor * t, data_type type);
    operand product_operand(const ggml_tensor * t, data_type type);
    operand attention_operand(const ggml_tensor * t, data_type type);

    // These take the index of a node, and return the index of the last node that they took.
    int plan_node(int i);
    int plan_product(int i);
    int plan_linear(int i);
    int plan_add(int i);
    int plan_norm(int i);
    int plan_copy(int i);
    int try_fused_norm(int i, const ggml_tensor * residual, const ggml_tensor * x);  // or -1
    int fuse_norm(step & s, int i, const ggml_tensor * norm);

    bool try_skip_copy(int i);
    void plan_attention(const ggml_tensor * node);
    void count_uses();
    void choose_writes();
    void place_slots();

    const ggml_cgraph * graph;
    plan result;
    std::unordered_map<const ggml_tensor *, tensor_info> info;
    data_type attention_type = data_type::f32;
};

static bool is_integer(data_type type) {
    return type == data_type::int16 || type == data_type::int8;
}

// Find a copy of a tensor in another type, or make the step that produces the tensor write one.
bool planner::find_slot(const ggml_tensor * t, data_type type, operand & from) {
    const ggml_tensor * base = base_of(t);
    tensor_info & known = info[base];
    int & slot = known.slots[type];
    if (slot == no_slot && known.producer >= 0 && ggml_is_contiguous(base)) {
        step & s = result.steps[known.producer];
        const bool by_rows = s.kind == step_kind::norm || s.kind == step_kind::linear;
        const bool whole_integers = by_rows && base->ne[0] <= widest_row;
        const bool any_floats = by_rows || s.kind == step_kind::attention ||
                                s.kind == step_kind::gate || s.kind == step_kind::rope;
        if (is_integer(type) ? whole_integers : any_floats) {
            slot = s.slots[type] = new_slot(slot_bytes(base, type), known.producer);
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

// Add a step that copies a tensor to a slot.
operand planner::convert(const ggml_tensor * t, data_type type) {
    require_f32(t);
    const bool dense = ggml_is_contiguous(t);
    step s{};
    s.kind = dense ? step_kind::convert : step_kind::gather;
    s.node = s.out = t;
    s.x.tensor = t;
    s.x_type = type;
    const int slot = new_slot(slot_bytes(t, type), (int) result.steps.size());
    s.slots[type] = slot;
    result.steps.push_back(s);  // not by add(): the tensor already has a producer
    if (dense && !t->view_src && type != data_type::f32) {
        // The next reader may use it too.
        info[t].slots[type] = slot;
    }
    return {t, slot, 0, !dense};
}

operand planner::product_operand(const ggml_tensor * t, data_type type) {
    operand from;
    if (type == data_type::f32) {
        require_f32(t);
        from.tensor = t;
        return from;
    }
    // Rows of integers have scales: only a whole tensor can be read from a slot, not a part of it.
    const ggml_tensor * base = base_of(t);
    const bool whole = ggml_nelements(t) == ggml_nelements(base) && t->ne[0] == base->ne[0];
    if ((!is_integer(type) || whole) && find_slot(t, type, from)) {
        return from;
    }
    return convert(t, type);
}

// Fuse a norm, its weight and its bias into a step. Returns the last node taken.
int planner::fuse_norm(step & s, int i, const ggml_tensor * norm) {
    s.norm = s.out = norm;
    for (int j = next(i); j < graph->n_nodes && has_single_consumer(s.out); j = next(j)) {
        const ggml_tensor * n = node_at(j);
        const ggml_tensor * other = n->src[0] == s.out ? n->src[1] : n->src[0];
        if ((n->src[0] != s.out && n->src[1] != s.out) || !other || !is_row(other, s.out) ||
            !is_packed_weight(other)) {
            break;
        }
        if (n->op == GGML_OP_MUL && !s.norm_weight && !s.norm_bias) {
            s.norm_weight = other;
        } else if (n->op == GGML_OP_ADD && !s.norm_bias) {
            s.norm_bias = other;
        } else {
            break;
        }
        s.out = n;
        i = j;
    }
    return i;
}

// The type in which a product reads its activations.
static data_type activation_type(weight_layout layout) {
    switch (layout) {
        case weight_layout::int8_panels: return data_type::int8;
        case weight_layout::int16_panels: return data_type::int16;
        case weight_layout::bf16_panels: return data_type::bf16;
        default: return data_type::f32;
    }
}

int planner::plan_linear(int i) {
    const ggml_tensor * node = node_at(i);
    const ggml_tensor *w = node->src[0], *x = node->src[1];
    step s{};
    s.kind = step_kind::linear;
    s.node = s.out = node;
    s.weight = w;
    s.x_type = activation_type(layout_of(w));
    s.x = product_operand(x, s.x_type);
    // A product reads all of x again for each panel. With a tail it goes through scratch, block by
    // block, so that it may write over what earlier blocks have read.
    const bool reads_slot = s.x.slot != no_slot;
    const auto may_write_product = [&](const ggml_tensor * out) {
        return reads_slot || disjoint(out, x);
    };
    const auto may_write_tail = [&](const ggml_tensor * out, const ggml_tensor * residual) {
        return (reads_slot || may_write_over(out, x)) &&
               (!residual || may_write_over(out, residual));
    };
    for (int j = next(i); j < graph->n_nodes && has_single_consumer(s.out); j = next(j)) {
        const ggml_tensor *n = node_at(j), *a = n->src[0], *b = n->src[1];
        const bool reads_result = a == s.out || (b == s.out && a != b);
        const ggml_tensor * other = a == s.out ? b : a;
        if (!reads_result || n->type != GGML_TYPE_F32) {
            break;
        }
        const bool only_product = s.act == activation::none && !s.residual;
        if (n->op == GGML_OP_ADD && only_product && !s.bias && is_row(other, s.out) &&
            is_packed_weight(other) && may_write_product(n)) {
            s.bias = other;
        } else if (n->op == GGML_OP_UNARY && only_product && may_write_product(n) &&
                   activation_of(ggml_get_unary_op(n)) != activation::none) {
            s.act = activation_of(ggml_get_unary_op(n));
        } else if (n->op == GGML_OP_ADD && !s.residual && ggml_are_same_shape(other, s.out) &&
                   is_dense_f32(other) && n->ne[0] <= widest_row && may_write_tail(n, other)) {
            s.residual = other;
        } else if (is_norm(n) && can_compute(n)) {
            const step before = s;
            const int last = fuse_norm(s, j, n);
            if (may_write_tail(s.out, s.residual)) {
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
    require_f32(s.residual);
    extend_slot(add(s).x);
    return i;
}

int planner::plan_product(int i) {
    const ggml_tensor *node = node_at(i), *a = node->src[0];
    if (is_packed_weight(a)) {
        return plan_linear(i);
    }
    const ggml_tensor * x = source_of(a);
    require_f32(x);
    require_f32(node->src[1]);
    step s{};
    s.kind = step_kind::pool;
    s.node = s.out = node;
    s.x.tensor = x;
    add(s);
    return i;
}

// Plan a norm of x + residual as one step. Returns the last node taken, or -1 if the step would
// write over what it has yet to read.
int planner::try_fused_norm(int i, const ggml_tensor * residual, const ggml_tensor * x) {
    step s{};
    s.kind = step_kind::norm;
    s.node = node_at(i);
    s.x.tensor = x;
    s.residual = residual;
    const int norm = residual ? next(i) : i;
    const int last = fuse_norm(s, norm, node_at(norm));
    if (!may_write_over(s.out, x) || (residual && !may_write_over(s.out, residual))) {
        return -1;
    }
    add(s);
    require_f32(x);
    require_f32(residual);
    return last;
}

int planner::plan_norm(int i) {
    const int last = try_fused_norm(i, nullptr, node_at(i)->src[0]);
    if (last >= 0) {
        return last;
    }
    // The norm alone writes over what it reads, row by row.
    add_simple(step_kind::norm, node_at(i)).norm = node_at(i);
    return i;
}

int planner::plan_add(int i) {
    const ggml_tensor *node = node_at(i), *a = node->src[0], *b = node->src[1];
    const int j = next(i);
    if (j < graph->n_nodes && has_single_consumer(node) && node_at(j)->src[0] == node &&
        is_norm(node_at(j)) && ggml_are_same_shape(a, b) && can_compute(node_at(j))) {
        const int last = try_fused_norm(i, b, a);
        if (last >= 0) {
            return last;
        }
    }
    require_f32(b);
    add_simple(step_kind::binary, node);
    return i;
}

// Leave out a copy to f16 that only attention reads, if attention can read its source in a slot.
bool planner::try_skip_copy(int i) {
    const ggml_tensor *node = node_at(i), *from = node->src[0];
    operand unused;
    if (node->type != GGML_TYPE_F16 || from->nb[0] != sizeof(float) ||
        (node->flags & GGML_TENSOR_FLAG_OUTPUT)) {
        return false;
    }
    int readers = 0;
    for (int j = i + 1; j < graph->n_nodes; j++) {
        const ggml_tensor * n = node_at(j);
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
    if (readers == 0 || n_uses(node) != readers + itself ||
        !find_slot(from, attention_type, unused)) {
        return false;
    }
    info[node].copy_of = from;
    return true;
}

int planner::plan_copy(int i) {
    const ggml_tensor *node = node_at(i), *x = node->src[0];
    const int j = next(i);
    if (is_transposed_copy(node) && has_single_consumer(node) && j < graph->n_nodes &&
        node_at(j)->op == GGML_OP_MUL_MAT && node_at(j)->src[0] == node &&
        disjoint(node_at(j), x->src[0])) {
        info[node].copy_of = x->src[0];  // pooling reads it as it is
    } else if (node->op != GGML_OP_CPY || !try_skip_copy(i)) {
        add_simple(step_kind::copy, node);
    }
    return i;
}

operand planner::attention_operand(const ggml_tensor * t, data_type type) {
    operand from;
    const ggml_tensor * source = source_of(t);
    if ((type != data_type::f32 || source != t) && find_slot(source, type, from)) {
        return from;
    }
    if (t->type == GGML_TYPE_F16) {  // a KV cache
        from.tensor = t;
        return from;
    }
    if (type == data_type::f32) {
        require_f32(t);
        from.tensor = t;
        return from;
    }
    return convert(t, type);
}

void planner::plan_attention(const ggml_tensor * node) {
    step s{};
    s.kind = step_kind::attention;
    s.node = s.out = node;
    s.x_type = attention_type;
    s.x = attention_operand(node->src[0], s.x_type);
    s.k = attention_operand(node->src[1], s.x_type);
    s.v = attention_operand(node->src[2], s.x_type);
    add(s);
    extend_slot(s.x);
    extend_slot(s.k);
    extend_slot(s.v);
}

int planner::plan_node(int i) {
    const ggml_tensor * node = node_at(i);
    switch (node->op) {
        case GGML_OP_MUL_MAT: return plan_product(i);
        case GGML_OP_ADD: return plan_add(i);
        case GGML_OP_MUL:
            require_f32(node->src[1]);
            add_simple(step_kind::binary, node);
            return i;
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM: return plan_norm(i);
        case GGML_OP_UNARY:
            add_simple(step_kind::gate, node).act = activation_of(ggml_get_unary_op(node));
            return i;
        case GGML_OP_GLU:
            require_f32(node->src[1]);
            add_simple(step_kind::gate, node).act = activation_of(ggml_get_glu_op(node));
            return i;
        case GGML_OP_SCALE: add_simple(step_kind::scale, node); return i;
        case GGML_OP_GET_ROWS: add_simple(step_kind::get_rows, node); return i;
        case GGML_OP_CONT:
        case GGML_OP_CPY: return plan_copy(i);
        case GGML_OP_ROPE: add_simple(step_kind::rope, node); return i;
        case GGML_OP_SET_ROWS: add_simple(step_kind::set_rows, node); return i;
        case GGML_OP_FLASH_ATTN_EXT: plan_attention(node); return i;
        default: return i;
    }
}

// What other parts of the graph read, or the caller, must be there as floats.
void planner::count_uses() {
    for (int i = 0; i < graph->n_nodes; i++) {
        for (const ggml_tensor * src : node_at(i)->src) {
            if (src) {
                info[src].n_local_uses++;
            }
        }
    }
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = node_at(i);
        if ((node->flags & GGML_TENSOR_FLAG_OUTPUT) || n_uses(node) != info[node].n_local_uses) {
            require_f32(node);
        }
    }
}

// A result that no slot takes is always written as floats.
void planner::choose_writes() {
    for (step & s : result.steps) {
        s.write_f32 = s.kind != step_kind::convert && s.kind != step_kind::gather &&
                      (info[base_of(s.out)].needed_as_f32 || !s.slots.any());
    }
}

plan planner::make() {
    count_uses();
    // Attention is as exact as the products around it.
    for (int i = 0; active_kernels().has_bf16() && i < graph->n_nodes; i++) {
        const ggml_tensor *node = node_at(i), *w = node->src[0];
        if (node->op == GGML_OP_MUL_MAT && is_packed_weight(w) &&
            layout_of(w) != weight_layout::f32_panels) {
            attention_type = data_type::bf16;
        }
    }
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = node_at(i);
        if (!is_view(node) && !ggml_is_empty(node) && is_wanted(node)) {
            i = plan_node(i);
        }
    }
    choose_writes();
    place_slots();
    return std::move(result);
}

// First fit: each slot gets the lowest offset where no slot lies that is in use at the same time.
void planner::place_slots() {
    std::vector<const slot *> placed;
    for (slot & s : result.slots) {
        s.bytes = (s.bytes + 127) / 64 * 64;  // and room for what a kernel reads beyond the end
        s.offset = 0;
        for (bool moved = true; moved;) {
            moved = false;
            for (const slot * other : placed) {
                const bool together =
                    s.first_step <= other->last_step && other->first_step <= s.last_step;
                const bool overlap =
                    s.offset < other->offset + other->bytes && other->offset < s.offset + s.bytes;
                if (together && overlap) {
                    s.offset = other->offset + other->bytes;
                    moved = true;
                }
            }
        }
        placed.push_back(&s);
        result.arena_bytes = std::max(result.arena_bytes, s.offset + s.bytes);
    }
}

plan make_plan(const ggml_cgraph * graph) { return planner(graph).make(); }

}  // namespace llamacrab::kernels
