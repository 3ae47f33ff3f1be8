#include "executor.hpp"

#include <cstring>

#include "attention_mask.hpp"
#include "kernels.hpp"

namespace llamacrab::kernels {

char * executor::slot_data(int slot) const { return arena.data + current.slots[slot].offset; }

const void * executor::operand_data(const operand & from, data_type type) const {
    if (from.slot == no_slot) {
        return from.tensor ? from.tensor->data : nullptr;  // only attention has k and v
    }
    const size_t size = type == data_type::f32 ? 4 : type == data_type::int8 ? 1 : 2;
    return slot_data(from.slot) + from.shift * (ptrdiff_t) size;
}

step_data executor::data_of(const step & s) {
    step_data d{};
    d.x = operand_data(s.x, s.x_type);
    d.k = operand_data(s.k, s.x_type);
    d.v = operand_data(s.v, s.x_type);
    if (s.slots.has(data_type::f32)) {
        d.y = (float *) slot_data(s.slots[data_type::f32]);
    } else if (s.write_f32) {
        d.y = (float *) s.out->data;
    }
    if (s.slots.has(data_type::bf16)) {
        d.y_bf16 = (uint16_t *) slot_data(s.slots[data_type::bf16]);
    }
    if (s.slots.has(data_type::int16)) {
        d.y_int16 = (int16_t *) slot_data(s.slots[data_type::int16]);
    }
    if (s.slots.has(data_type::int8)) {
        char * rows = slot_data(s.slots[data_type::int8]);
        d.y_int8 = (uint8_t *) rows;
        d.y_scale = (float *) (rows + int8_scales_offset(int8_row_bytes(s.out), ggml_nrows(s.out)));
    }
    if (s.kind == step_kind::rope) {
        d.angles = angles_of(s.node);
    }
    return d;
}

// All layers rotate by the same angles.
const float * executor::angles_of(const ggml_tensor * rope) {
    for (const auto & known : known_angles) {
        if (have_same_angles(known.first, rope)) {
            return known.second.data();
        }
    }
    known_angles.emplace_back(rope, rope_angles(rope));
    return known_angles.back().second.data();
}

// All layers have the same mask: it is analysed once.
const std::vector<segment> & executor::segments_of(const ggml_tensor * attention) {
    const ggml_tensor *q = attention->src[0], *k = attention->src[1], *mask = attention->src[3];
    for (const auto & known : known_masks) {
        if (known.first == mask) {
            return known.second;
        }
    }
    known_masks.emplace_back(mask, find_segments(mask, (int) q->ne[1], (int) k->ne[1]));
    return known_masks.back().second;
}

static int & threads_beyond() {
    static thread_local int value = 0;
    return value;
}

extra_threads::extra_threads(int n) : before(threads_beyond()) { threads_beyond() = n; }
extra_threads::~extra_threads() { threads_beyond() = before; }
int extra_threads::allowed() { return threads_beyond(); }

int executor::max_threads() const { return n_threads + extra_threads::allowed(); }

ggml_status executor::run(const ggml_cgraph * graph) {
    current = make_plan(graph);
    arena.reserve(current.arena_bytes);
    known_masks.clear();
    known_angles.clear();
    for (const step & s : current.steps) {
        if (abort && abort(abort_data)) {
            return GGML_STATUS_ABORTED;
        }
        run_step(s);
        if (s.write_f32 && s.slots.has(data_type::f32)) {
            std::memcpy(s.out->data, slot_data(s.slots[data_type::f32]), ggml_nbytes(s.out));
        }
    }
    return GGML_STATUS_SUCCESS;
}

void executor::run_step(const step & s) {
    const parallel workers{threads, max_threads(), scratch};
    switch (s.kind) {
        case step_kind::linear: return run_linear(s, data_of(s), workers);
        case step_kind::attention:
            return run_attention(s, data_of(s), segments_of(s.node), workers);
        case step_kind::norm: return run_rows(s, run_norm);
        case step_kind::gate: return run_rows(s, run_gate);
        case step_kind::binary: return run_rows(s, run_binary);
        case step_kind::scale: return run_rows(s, run_scale);
        case step_kind::get_rows: return run_rows(s, run_get_rows);
        case step_kind::copy: return run_rows(s, run_copy);
        case step_kind::rope: return run_rows(s, run_rope);
        case step_kind::set_rows: return run_rows(s, run_set_rows);
        case step_kind::convert: return run_rows(s, run_convert);
        case step_kind::gather: return run_rows(s, run_gather);
        case step_kind::pool: return run_rows(s, run_pool);
    }
}

void executor::run_rows(const step & s, row_op op) {
    const step_data data = data_of(s);
    // Of a cache only some rows are written.
    const ggml_tensor * work = s.kind == step_kind::set_rows ? s.x.tensor : s.out;
    const int rows = (int) ggml_nrows(work);
    const int n = worthwhile_threads((double) ggml_nelements(work) * work_per_value, max_threads());
    const int blocks = n > 1 ? (rows + 15) / 16 : 1;
    threads.parallel_for(blocks, n, [&](int i, int) {
        op(s, data, (int) ((int64_t) rows * i / blocks), (int) ((int64_t) rows * (i + 1) / blocks));
    });
}

}  // namespace llamacrab::kernels
