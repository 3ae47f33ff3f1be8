// The ggml backend: a device of type ACCEL, its buffer types and its registration.
//
// llama.cpp offers an ACCEL device's buffer type for every weight that stays on the CPU, before the
// CPU's own, and gives every context a backend of the device. ggml's scheduler then runs a node
// where its weights lie, and what surrounds it there too, if the backend can. So a model uses these
// kernels when its weights are in our buffers; the graph of any other model has nothing that draws
// us in.
//
// A device has one buffer type, and llama.cpp asks for it in two places. While a model loads it is
// that of packed weights, or the CPU's own (which llama.cpp skips), as `loading_for` says for this
// thread. For a context it is plain host memory, of a type of its own: with the CPU's, the
// scheduler would move other models' nodes to us.
#include "ggml_backend.hpp"

#include <atomic>
#include <cstring>
#include <stdexcept>

#include "executor.hpp"
#include "kernels.hpp"
#include "op_support.hpp"

namespace llamacrab::kernels {

constexpr int not_loading = -1;

static int & loading() {
    static thread_local int value = not_loading;
    return value;
}

loading_for::loading_for(cpu_backend wanted) : before(loading()) { loading() = (int) wanted; }
loading_for::~loading_for() { loading() = before; }

const char * active_name() { return active_kernels().name; }
bool preferred_over_ggml() { return active_kernels().bf16; }

// ------------------------------------------------------------------------------------- buffers

static ggml_backend_device device;

static ggml_backend_buffer_type packed_type, packed_int8_type, host_type;

static bool is_packed(const ggml_backend_buffer * buffer) {
    return buffer && (buffer->buft == &packed_type || buffer->buft == &packed_int8_type);
}

bool is_packed_weight(const ggml_tensor * w) { return is_packed(w->buffer); }

weight_layout layout_of(const ggml_tensor * w) {
    return choose_layout(w, w->buffer->buft == &packed_int8_type);
}

static size_t alignment(ggml_backend_buffer_type_t) { return 64; }

static size_t packed_size(ggml_backend_buffer_type_t type, const ggml_tensor * w) {
    return packed_bytes(w, choose_layout(w, type == &packed_int8_type));
}

// Whole rows of a weight that bytes [offset, offset + size) are, in ggml's layout.
static bool rows_of(const ggml_tensor * w, size_t offset, size_t size, int64_t & row0,
                    int64_t & row1) {
    const size_t row = ggml_row_size(w->type, w->ne[0]);
    row0 = offset / row;
    row1 = (offset + size) / row;
    return offset % row == 0 && size % row == 0;
}

static void set_tensor(ggml_backend_buffer_t, ggml_tensor * w, const void * data, size_t offset,
                       size_t size) {
    const weight_layout layout = layout_of(w);
    int64_t row0, row1;
    if (layout == weight_layout::unpacked) {
        std::memcpy((char *) w->data + offset, data, size);
    } else if (rows_of(w, offset, size, row0, row1)) {
        pack_rows(w, layout, data, row0, row1, w->data);
    } else {
        throw std::runtime_error(std::string("parts of rows of ") + w->name + " cannot be packed");
    }
}

static void get_tensor(ggml_backend_buffer_t, const ggml_tensor * w, void * data, size_t offset,
                       size_t size) {
    const weight_layout layout = layout_of(w);
    int64_t row0, row1;
    if (layout == weight_layout::unpacked) {
        std::memcpy(data, (const char *) w->data + offset, size);
    } else if (rows_of(w, offset, size, row0, row1)) {
        unpack_rows(w, layout, w->data, row0, row1, data);
    } else {
        throw std::runtime_error(std::string("parts of rows of ") + w->name +
                                 " cannot be unpacked");
    }
}

// Memory of the CPU's own buffer type, under our name.
static ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer =
        ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        buffer->buft = type;
    }
    return buffer;
}

static ggml_backend_buffer_t allocate_packed(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = allocate(type, size);
    if (buffer) {
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = get_tensor;
        buffer->iface.memset_tensor = nullptr;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

// ------------------------------------------------------------------------------------- backend

struct backend_state {
    executor graph_executor;
};

static backend_state & state_of(ggml_backend_t backend) {
    return *(backend_state *) backend->context;
}

static void free_backend(ggml_backend_t backend) {
    delete &state_of(backend);
    delete backend;
}

static ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) try {
    return state_of(backend).graph_executor.run(graph);
} catch (const std::bad_alloc &) {
    return GGML_STATUS_ALLOC_FAILED;
} catch (const std::exception &) {
    return GGML_STATUS_FAILED;
}

static void set_n_threads(ggml_backend_t backend, int n) {
    state_of(backend).graph_executor.set_n_threads(n);
}

static void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void * data) {
    state_of(backend).graph_executor.set_abort(callback, data);
}

static ggml_guid guid = {0x6c, 0x6c, 0x61, 0x6d, 0x61, 0x63, 0x72, 0x61,
                         0x62, 0x2e, 0x6b, 0x65, 0x72, 0x6e, 0x65, 0x6c};

static const char * name() { return "llamacrab"; }

static ggml_backend_t init_backend(ggml_backend_dev_t, const char *) {
    auto * backend = new ggml_backend();
    backend->guid = &guid;
    backend->iface.get_name = [](ggml_backend_t) { return name(); };
    backend->iface.free = free_backend;
    backend->iface.graph_compute = compute;
    backend->device = &device;
    try {
        backend->context = new backend_state();
    } catch (...) {
        delete backend;
        throw;
    }
    return backend;
}

// -------------------------------------------------------------------------------------- device

static ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) {
    switch (loading()) {
        case (int) cpu_backend::ggml: return ggml_backend_cpu_buffer_type();
        case (int) cpu_backend::llamacrab: return &packed_type;
        case (int) cpu_backend::int8: return &packed_int8_type;
        default: return &host_type;
    }
}

static void device_props(ggml_backend_dev_t, ggml_backend_dev_props * props) {
    std::memset(props, 0, sizeof *props);
    props->name = name();
    props->description = active_kernels().name;
    props->type = GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

static bool supports_buffer_type(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
    return type == &packed_type || type == &packed_int8_type || ggml_backend_buft_is_host(type);
}

// ---------------------------------------------------------------------------------------- registry

static ggml_backend_reg reg;

static void * proc_address(ggml_backend_reg_t, const char * wanted) {
    if (std::strcmp(wanted, "ggml_backend_set_n_threads") == 0) {
        return (void *) set_n_threads;
    }
    if (std::strcmp(wanted, "ggml_backend_set_abort_callback") == 0) {
        return (void *) set_abort_callback;
    }
    return nullptr;
}

void install() {
    const auto make_type = [](ggml_backend_buffer_type & type,
                              const char * (*get_name)(ggml_backend_buffer_type_t)) {
        type.iface.get_name = get_name;
        type.iface.alloc_buffer = allocate_packed;
        type.iface.get_alignment = alignment;
        type.iface.get_alloc_size = packed_size;
        type.device = &device;
    };
    make_type(packed_type, [](ggml_backend_buffer_type_t) { return "llamacrab_packed"; });
    make_type(packed_int8_type, [](ggml_backend_buffer_type_t) { return "llamacrab_packed_int8"; });
    make_type(host_type, [](ggml_backend_buffer_type_t) { return "llamacrab_host"; });
    host_type.iface.alloc_buffer = allocate;
    host_type.iface.get_alloc_size = nullptr;
    host_type.iface.is_host = [](ggml_backend_buffer_type_t) { return true; };

    device.iface.get_name = [](ggml_backend_dev_t) { return name(); };
    device.iface.get_description = [](ggml_backend_dev_t) { return active_kernels().name; };
    device.iface.get_memory = [](ggml_backend_dev_t, size_t * free, size_t * total) {
        *free = *total = 0;
    };
    device.iface.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; };
    device.iface.get_props = device_props;
    device.iface.init_backend = init_backend;
    device.iface.get_buffer_type = device_buffer_type;
    device.iface.supports_op = [](ggml_backend_dev_t, const ggml_tensor * node) {
        return can_compute(node);
    };
    device.iface.supports_buft = supports_buffer_type;
    device.reg = &reg;

    reg.api_version = GGML_BACKEND_API_VERSION;
    reg.iface.get_name = [](ggml_backend_reg_t) { return name(); };
    reg.iface.get_device_count = [](ggml_backend_reg_t) -> size_t { return 1; };
    reg.iface.get_device = [](ggml_backend_reg_t, size_t) { return &device; };
    reg.iface.get_proc_address = proc_address;
    ggml_backend_register(&reg);
}

}  // namespace llamacrab::kernels
