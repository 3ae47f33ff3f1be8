#include "compare_with_ggml.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "../kernels.hpp"
#include "ggml-backend-impl.h"
#include "graph_builder.hpp"

namespace llamacrab::kernels {

// ---------------------------------------------------------------------------------------- cases

// Reads the fields of a case by name. The struct gives the default of an optional field.
class field_reader {
  public:
    explicit field_reader(const std::map<std::string, field_value> & fields) : left(fields) {}

    template <class T>
    void required(const char * name, T & value) {
        if (!read(name, value)) {
            throw std::invalid_argument(std::string("missing field: ") + name);
        }
    }

    template <class T>
    void optional(const char * name, T & value) {
        read(name, value);
    }

    void end() const {
        if (!left.empty()) {
            throw std::invalid_argument("unknown field: " + left.begin()->first);
        }
    }

  private:
    template <class T>
    bool read(const char * name, T & value) {
        const auto found = left.find(name);
        if (found == left.end()) {
            return false;
        }
        convert(found->second, value);
        left.erase(found);
        return true;
    }

    static void convert(const field_value & from, std::vector<int> & to) { to = from.numbers; }
    static void convert(const field_value & from, std::string & to) { to = from.word; }
    template <class T>
    static void convert(const field_value & from, T & to) {
        to = (T) from.numbers.at(0);
    }

    std::map<std::string, field_value> left;
};

static int sum(const std::vector<int> & values) {
    return std::accumulate(values.begin(), values.end(), 0);
}

struct test_case {
    bool int8 = false;  // load the weights as "int8" would

    virtual ~test_case() = default;
    virtual void read(field_reader & fields) = 0;
    virtual ggml_tensor * build(graph_builder & b) const = 0;
};

constexpr int no_op = -1;

// A product, and what may be fused into it.
struct linear_case : test_case {
    int rows, k, m;
    ggml_type type;
    bool bias = false;
    int act = no_op;  // of ggml_unary_op
    bool residual = false;
    std::string norm;  // "", "layer" or "rms"
    int outlier = 0;   // added to one value of each row

    void read(field_reader & f) override {
        f.required("rows", rows);
        f.required("k", k);
        f.required("m", m);
        f.required("type", type);
        f.optional("bias", bias);
        f.optional("act", act);
        f.optional("residual", residual);
        f.optional("norm", norm);
        f.optional("outlier", outlier);
        f.optional("int8", int8);
    }

    ggml_tensor * build(graph_builder & b) const override {
        ggml_tensor * x = b.result(k, rows);
        if (outlier) {
            std::vector<float> row(k);
            row[k / 3] = (float) outlier;
            x = ggml_add(b.g(), x, ggml_scale(b.g(), b.input(GGML_TYPE_F32, k, 1, row), 1.0f));
        }
        ggml_tensor * y = linear(b, x, type, m, bias);
        y = act != no_op ? ggml_unary(b.g(), y, (ggml_unary_op) act) : y;
        y = residual ? ggml_add(b.g(), y, b.result(m, rows)) : y;
        return norm.empty() ? y : normed(b, y, norm == "rms");
    }
};

// Attention over a pack of texts of these lengths.
struct attention_case : test_case {
    int d, heads, kv_heads;
    std::string mask = "texts";
    int softcap = 0, max_bias = 0;
    int product_type = no_op;  // of ggml_type: queries, keys and values come from products
    std::vector<int> lengths;

    void read(field_reader & f) override {
        f.required("d", d);
        f.required("heads", heads);
        f.required("kv_heads", kv_heads);
        f.optional("mask", mask);
        f.optional("softcap", softcap);
        f.optional("max_bias", max_bias);
        f.optional("product_type", product_type);
        f.required("lengths", lengths);
    }

    ggml_tensor * build(graph_builder & b) const override {
        const int tokens = sum(lengths);
        ggml_tensor * x = b.result(64, tokens);
        const auto make_heads = [&](int count) {
            ggml_tensor * y = product_type != no_op
                                  ? linear(b, x, (ggml_type) product_type, d * count, true)
                                  : b.result(d * count, tokens);
            return ggml_reshape_3d(b.g(), y, d, count, tokens);
        };
        ggml_tensor *q = make_heads(heads), *k = make_heads(kv_heads), *v = make_heads(kv_heads);
        ggml_tensor * values = nullptr;
        if (mask != "none") {
            values = b.input(GGML_TYPE_F16, tokens, tokens, mask_of(lengths, mask, tokens));
        }
        return attention(b, q, k, v, values, softcap, max_bias);
    }
};

// A decoder's attention: keys and values go to a KV cache, and are read from it. All texts continue
// one prefix, which the cache holds, as it holds what must not be seen: the cells after them.
struct cached_attention_case : test_case {
    int d, heads, kv_heads, prefix;
    ggml_type cache_type = GGML_TYPE_F16;
    int softcap = 0;
    std::vector<int> lengths;

    void read(field_reader & f) override {
        f.required("d", d);
        f.required("heads", heads);
        f.required("kv_heads", kv_heads);
        f.required("prefix", prefix);
        f.optional("cache_type", cache_type);
        f.optional("softcap", softcap);
        f.required("lengths", lengths);
    }

    ggml_tensor * build(graph_builder & b) const override {
        ggml_context * g = b.g();
        const int tokens = sum(lengths), cells = prefix + tokens + 9;
        ggml_tensor * x = b.result(64, tokens);
        std::vector<int32_t> positions;
        std::vector<int64_t> cell_of_token;
        std::vector<float> mask((size_t) tokens * cells, -INFINITY);
        for (const int length : lengths) {
            const int begin = prefix + (int) positions.size() % tokens;
            for (int i = 0; i < length; i++) {
                float * row = mask.data() + positions.size() * cells;
                std::fill(row, row + prefix, 0.0f);
                std::fill(row + begin, row + begin + i + 1, 0.0f);
                cell_of_token.push_back(begin + i);
                positions.push_back(prefix + i);
            }
        }
        ggml_tensor *at = b.input(positions), *to = b.places(cell_of_token);
        const auto make_heads = [&](int count, bool rotated) {
            ggml_tensor * y = linear(b, x, GGML_TYPE_F32, d * count, true);
            y = ggml_reshape_3d(g, y, d, count, tokens);
            return rotated ? ggml_rope(g, y, at, d, GGML_ROPE_TYPE_NEOX) : y;
        };
        const auto through_cache = [&](ggml_tensor * y) {
            const int width = d * kv_heads;
            ggml_tensor * cache = b.input(cache_type, width, cells);
            b.first(ggml_set_rows(g, cache, ggml_view_2d(g, y, width, tokens, y->nb[2], 0), to));
            return ggml_view_3d(g, cache, d, kv_heads, cells, ggml_row_size(cache_type, d),
                                cache->nb[1], 0);
        };
        ggml_tensor * q = make_heads(heads, true);
        ggml_tensor * k = through_cache(make_heads(kv_heads, true));
        ggml_tensor * v = through_cache(make_heads(kv_heads, false));
        return attention(b, q, k, v, b.input(GGML_TYPE_F16, cells, tokens, mask), softcap, 0);
    }
};

// Two layers of an encoder.
struct layer_case : test_case {
    int width, heads, ff;
    ggml_type type;
    bool gated = false, rope = false, rms = false, norm_first = false;
    std::vector<int> lengths;

    void read(field_reader & f) override {
        f.required("width", width);
        f.required("heads", heads);
        f.required("ff", ff);
        f.required("type", type);
        f.optional("gated", gated);
        f.optional("rope", rope);
        f.optional("rms", rms);
        f.optional("norm_first", norm_first);
        f.optional("int8", int8);
        f.required("lengths", lengths);
    }

    ggml_tensor * build(graph_builder & b) const override {
        const int tokens = sum(lengths);
        ggml_tensor * mask =
            b.input(GGML_TYPE_F16, tokens, tokens, mask_of(lengths, "texts", tokens));
        std::vector<int32_t> places;
        for (const int length : lengths) {
            for (int i = 0; i < length; i++) {
                places.push_back(i);
            }
        }
        ggml_tensor * positions = rope ? b.input(places) : nullptr;
        ggml_tensor * x = b.result(width, tokens);
        x = layer(b, x, mask, positions);
        return layer(b, x, mask, positions);
    }

  private:
    ggml_tensor * layer(graph_builder & b, ggml_tensor * x, ggml_tensor * mask,
                        ggml_tensor * positions) const {
        ggml_context * g = b.g();
        const int d = width / heads;
        ggml_tensor * in = norm_first ? normed(b, x, rms) : x;
        const auto project = [&](bool rotated) {
            ggml_tensor * y =
                ggml_reshape_3d(g, linear(b, in, type, width, true), d, heads, x->ne[1]);
            return rotated && positions ? ggml_rope(g, y, positions, d, GGML_ROPE_TYPE_NEOX) : y;
        };
        ggml_tensor *q = project(true), *k = project(true), *v = project(false);
        ggml_tensor * y = attention(b, q, k, v, mask, 0, 0);
        x = ggml_add(g, linear(b, y, type, width, true), x);
        x = norm_first ? x : normed(b, x, rms);
        in = norm_first ? normed(b, x, rms) : x;
        ggml_tensor * up = linear(b, in, type, ff, !gated);
        up = gated ? ggml_geglu_split(g, up, linear(b, in, type, ff, false)) : ggml_gelu(g, up);
        x = ggml_add(g, linear(b, up, type, width, true), x);
        return norm_first ? x : normed(b, x, rms);
    }
};

struct norm_case : test_case {
    int width, rows;
    bool rms = false, residual = false;

    void read(field_reader & f) override {
        f.required("width", width);
        f.required("rows", rows);
        f.optional("rms", rms);
        f.optional("residual", residual);
    }

    ggml_tensor * build(graph_builder & b) const override {
        ggml_tensor * x = b.result(width, rows);
        x = residual ? ggml_add(b.g(), x, b.result(width, rows)) : x;
        return normed(b, x, rms);
    }
};

struct rope_case : test_case {
    int d, heads, tokens, dims;
    bool neox = false;
    bool factors = false;  // a divisor for each frequency
    bool yarn = false;

    void read(field_reader & f) override {
        f.required("d", d);
        f.required("heads", heads);
        f.required("tokens", tokens);
        f.required("dims", dims);
        f.optional("neox", neox);
        f.optional("factors", factors);
        f.optional("yarn", yarn);
    }

    ggml_tensor * build(graph_builder & b) const override {
        std::vector<int32_t> positions(tokens);
        std::vector<float> divisors(dims / 2);
        for (int i = 0; i < dims / 2; i++) {
            divisors[i] = 1 + 0.2f * i;
        }
        for (int i = 0; i < tokens; i++) {
            positions[i] = i * 3;
        }
        ggml_tensor * x = ggml_reshape_3d(b.g(), b.result(d * heads, tokens), d, heads, tokens);
        return ggml_rope_ext(b.g(), x, b.input(positions),
                             factors ? b.input(GGML_TYPE_F32, dims / 2, 1, divisors) : nullptr,
                             dims, neox ? GGML_ROPE_TYPE_NEOX : GGML_ROPE_TYPE_NORMAL,
                             yarn ? 64 : 0, 10000, yarn ? 0.25f : 1, yarn ? 1 : 0, 1.1f, 32, 1);
    }
};

// A gate and what it multiplies: two tensors if `split`, else the halves of one.
struct glu_case : test_case {
    int width, rows;
    ggml_glu_op op;
    bool split = false, swapped = false;

    void read(field_reader & f) override {
        f.required("width", width);
        f.required("rows", rows);
        f.required("op", op);
        f.optional("split", split);
        f.optional("swapped", swapped);
    }

    ggml_tensor * build(graph_builder & b) const override {
        if (split) {
            return ggml_glu_split(b.g(), b.result(width, rows), b.result(width, rows), op);
        }
        return ggml_glu(b.g(), b.result(2 * width, rows), op, swapped);
    }
};

struct unary_case : test_case {
    int width, rows;
    ggml_unary_op op;

    void read(field_reader & f) override {
        f.required("width", width);
        f.required("rows", rows);
        f.required("op", op);
    }

    ggml_tensor * build(graph_builder & b) const override {
        return ggml_unary(b.g(), b.result(width, rows), op);
    }
};

struct binary_case : test_case {
    int width, rows;
    bool multiply = false;
    bool one_row = false;  // the second operand has one row, for all

    void read(field_reader & f) override {
        f.required("width", width);
        f.required("rows", rows);
        f.optional("multiply", multiply);
        f.optional("one_row", one_row);
    }

    ggml_tensor * build(graph_builder & b) const override {
        ggml_tensor *x = b.result(width, rows), *y = b.result(width, one_row ? 1 : rows);
        return multiply ? ggml_mul(b.g(), x, y) : ggml_add(b.g(), x, y);
    }
};

// The mean of each text of a pack, as llama.cpp computes it.
struct pool_case : test_case {
    int width;
    std::vector<int> lengths;

    void read(field_reader & f) override {
        f.required("width", width);
        f.required("lengths", lengths);
    }

    ggml_tensor * build(graph_builder & b) const override {
        ggml_context * g = b.g();
        const int tokens = sum(lengths);
        std::vector<float> means(tokens * lengths.size());
        for (size_t text = 0, first = 0; text < lengths.size(); first += lengths[text++]) {
            for (int i = 0; i < lengths[text]; i++) {
                means[text * tokens + first + i] = 1.0f / lengths[text];
            }
        }
        ggml_tensor * x = b.result(width, tokens);
        return ggml_mul_mat(g, ggml_cont(g, ggml_transpose(g, x)),
                            b.input(GGML_TYPE_F32, tokens, lengths.size(), means));
    }
};

struct get_rows_case : test_case {
    int width, rows;
    std::vector<int> chosen;

    void read(field_reader & f) override {
        f.required("width", width);
        f.required("rows", rows);
        f.required("chosen", chosen);
    }

    ggml_tensor * build(graph_builder & b) const override {
        return ggml_get_rows(b.g(), b.result(width, rows), b.input(chosen));
    }
};

// A tensor [width, heads, tokens], its heads and tokens swapped by a copy.
struct copy_case : test_case {
    int width, heads, tokens;

    void read(field_reader & f) override {
        f.required("width", width);
        f.required("heads", heads);
        f.required("tokens", tokens);
    }

    ggml_tensor * build(graph_builder & b) const override {
        ggml_context * g = b.g();
        ggml_tensor * x = b.result(width * heads, tokens);
        x = ggml_reshape_3d(g, x, width, heads, tokens);
        return ggml_cont(g, ggml_permute(g, x, 0, 2, 1, 3));
    }
};

// A product, a sum that is not to be computed, and what reads that sum.
struct skipped_case : test_case {
    int rows, width;

    void read(field_reader & f) override {
        f.required("rows", rows);
        f.required("width", width);
    }

    ggml_tensor * build(graph_builder & b) const override {
        ggml_tensor * y = linear(b, b.result(width, rows), GGML_TYPE_F32, width, false);
        ggml_set_output(y);  // so that the sum has memory of its own
        ggml_tensor * sum = b.skipped(ggml_add(b.g(), y, b.row(width)), 2.0f);
        ggml_set_output(sum);
        return ggml_mul(b.g(), sum, b.row(width));
    }
};

template <class T>
static std::unique_ptr<test_case> make() {
    return std::make_unique<T>();
}

static std::unique_ptr<test_case> make_case(const std::string & kind, field_reader fields) {
    static const std::map<std::string, std::unique_ptr<test_case> (*)()> kinds = {
        {"linear", make<linear_case>},
        {"attention", make<attention_case>},
        {"layer", make<layer_case>},
        {"norm", make<norm_case>},
        {"rope", make<rope_case>},
        {"glu", make<glu_case>},
        {"unary", make<unary_case>},
        {"binary", make<binary_case>},
        {"pool", make<pool_case>},
        {"get_rows", make<get_rows_case>},
        {"copy", make<copy_case>},
        {"skipped", make<skipped_case>},
        {"cached_attention", make<cached_attention_case>},
    };
    const auto found = kinds.find(kind);
    if (found == kinds.end()) {
        throw std::invalid_argument("no such kind of case: " + kind);
    }
    auto made = found->second();
    made->read(fields);
    fields.end();
    return made;
}

// ----------------------------------------------------------------------------------- comparison

static void set_n_threads(ggml_backend_t backend, int n) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    const auto set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        reg, "ggml_backend_set_n_threads");
    set(backend, n);
}

double compare_with_ggml(const std::string & kind,
                         const std::map<std::string, field_value> & fields) {
    const std::unique_ptr<test_case> test = make_case(kind, field_reader(fields));
    using backend = std::unique_ptr<ggml_backend, void (*)(ggml_backend_t)>;
    ggml_backend_dev_t device = ggml_backend_dev_by_name("llamacrab");
    const backend ours(ggml_backend_dev_init(device, nullptr), ggml_backend_free);
    const backend cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr),
                      ggml_backend_free);
    // ggml's threads spin while they wait for each other: one is faster for graphs as small as
    // these.
    set_n_threads(cpu.get(), 1);
    set_n_threads(ours.get(), 3);
    ggml_backend_buffer_type_t packed_type;
    {
        const loading_for scope(test->int8 ? cpu_backend::int8 : cpu_backend::llamacrab);
        packed_type = ggml_backend_dev_buffer_type(device);
    }
    graph_builder our_graph, their_graph;
    const std::vector<float> found =
        our_graph.compute(test->build(our_graph), ours.get(), packed_type);
    if (!our_graph.taken) {
        return -1;
    }
    const std::vector<float> wanted =
        their_graph.compute(test->build(their_graph), cpu.get(), ggml_backend_cpu_buffer_type());
    double difference = 0, total = 0;
    for (size_t i = 0; i < wanted.size(); i++) {
        difference += (double) (found[i] - wanted[i]) * (found[i] - wanted[i]);
        total += (double) wanted[i] * wanted[i];
    }
    return difference / total;
}

std::string complaint_about_backend() {
    ggml_backend_dev_t device = ggml_backend_dev_by_name("llamacrab");
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(device, &props);
    if (!props.caps.async || !props.caps.events) {
        return "llama.cpp would give up pipelines over several GPUs";
    }
    ggml_backend_event_t event = ggml_backend_event_new(device);
    if (!event) {
        return "the device says that it has events, but gives none";
    }
    const std::unique_ptr<ggml_backend, void (*)(ggml_backend_t)> backend(
        ggml_backend_dev_init(device, nullptr), ggml_backend_free);
    ggml_backend_event_record(event, backend.get());
    ggml_backend_event_wait(backend.get(), event);
    ggml_backend_event_synchronize(event);
    ggml_backend_event_free(event);

    using context = std::unique_ptr<ggml_context, void (*)(ggml_context *)>;
    const context c(ggml_init({ggml_tensor_overhead() * 4, nullptr, true}), ggml_free);
    ggml_tensor * weight = ggml_new_tensor_2d(c.get(), GGML_TYPE_F32, 64, 64);
    const loading_for scope(cpu_backend::llamacrab);
    const std::unique_ptr<ggml_backend_buffer, void (*)(ggml_backend_buffer_t)> buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(c.get(), ggml_backend_dev_buffer_type(device)),
        ggml_backend_buffer_free);
    std::vector<float> values(64 * 64, 1.0f);
    ggml_backend_tensor_set(weight, values.data(), 0, ggml_nbytes(weight));
    ggml_tensor * part = ggml_view_2d(c.get(), weight, 32, 64, weight->nb[1], 0);
    ggml_backend_view_init(part);
    try {
        ggml_backend_tensor_get(part, values.data(), 0, 32 * sizeof(float));
        return "a view of a packed weight can be read";
    } catch (const std::runtime_error &) {
    }
    try {
        ggml_backend_tensor_set(part, values.data(), 0, 32 * sizeof(float));
        return "a view of a packed weight can be written";
    } catch (const std::runtime_error &) {
    }
    return "";
}

}  // namespace llamacrab::kernels
