// The ggml backend: a device of type ACCEL, its buffer types and its registration.
//
// llama.cpp tries the buffer type of an ACCEL device, before that of the CPU, for every weight that
// stays on the CPU, and gives every context a backend of the device. ggml's scheduler then assigns
// a node to the backend whose buffers hold its weights, and assigns the nodes around it to the same
// backend if it supports them. So a model uses these kernels if its weights are in buffers of this
// backend; the graphs of all other models stay on ggml's CPU backend.
//
// A device has one buffer type, and llama.cpp asks for it in two places. While a model is loaded,
// `loading_for` decides for this thread: the type for packed weights, or the CPU's own type (which
// llama.cpp skips). For a context it is a type for unpacked host memory. That must not be the CPU's
// type: the scheduler would then assign nodes of other models to this backend.
#include "ggml_backend.hpp"

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

// Matrices that this thread has packed in 8 bits.
static int & int8_matrices() {
    static thread_local int value = 0;
    return value;
}

loading_for::loading_for(cpu_backend wanted) : before(loading()), int8_before(int8_matrices()) {
    loading() = (int) wanted;
}
loading_for::~loading_for() { loading() = before; }
int loading_for::n_int8_matrices() const { return int8_matrices() - int8_before; }

const char * active_name() { return active_kernels().name; }
bool have_int8() { return active_kernels().int8; }
bool can_pack(int type) { return is_packable((ggml_type) type); }
bool have_bf16() { return active_kernels().has_bf16(); }
bool preferred_over_ggml() { return &active_kernels() != generic_kernels(); }

// ------------------------------------------------------------------------------------- buffers

static ggml_backend_device device;

static ggml_backend_buffer_type packed_type, packed_int8_type, host_type;

bool is_packed_weight(const ggml_tensor * w) {
    const ggml_backend_buffer * buffer = w->buffer;
    return buffer && (buffer->buft == &packed_type || buffer->buft == &packed_int8_type);
}

weight_layout layout_of(const ggml_tensor * w) {
    return choose_layout(w, w->buffer->buft == &packed_int8_type);
}

static size_t alignment(ggml_backend_buffer_type_t) { return 64; }

static size_t packed_size(ggml_backend_buffer_type_t type, const ggml_tensor * w) {
    return packed_bytes(w, choose_layout(w, type == &packed_int8_type));
}

// The rows of a weight in bytes [offset, offset + size) of ggml's layout. False if these bytes are
// not whole rows.
static bool rows_of(const ggml_tensor * w, size_t offset, size_t size, int64_t & row0,
                    int64_t & row1) {
    const size_t row = ggml_row_size(w->type, w->ne[0]);
    row0 = offset / row;
    row1 = (offset + size) / row;
    return offset % row == 0 && size % row == 0;
}

// A view has the shape and the offset of a part in ggml's layout, which say nothing about where
// that part lies in panels.
static weight_layout layout_of_whole(const ggml_tensor * w) {
    const weight_layout layout = layout_of(w->view_src ? w->view_src : w);
    if (w->view_src && layout != weight_layout::unpacked) {
        throw std::runtime_error(std::string("a view of ") + w->view_src->name +
                                 " cannot be read or written: its weights are packed");
    }
    return layout;
}

static void set_tensor(ggml_backend_buffer_t, ggml_tensor * w, const void * data, size_t offset,
                       size_t size) {
    const weight_layout layout = layout_of_whole(w);
    int64_t row0, row1;
    if (layout == weight_layout::unpacked) {
        std::memcpy((char *) w->data + offset, data, size);
    } else if (rows_of(w, offset, size, row0, row1)) {
        pack_rows(w, layout, data, row0, row1, w->data);
        int8_matrices() += layout == weight_layout::int8_panels && row0 == 0;
    } else {
        throw std::runtime_error(std::string("parts of rows of ") + w->name + " cannot be packed");
    }
}

static void get_tensor(ggml_backend_buffer_t, const ggml_tensor * w, void * data, size_t offset,
                       size_t size) {
    const weight_layout layout = layout_of_whole(w);
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

// A buffer of the CPU's type, labelled with another type.
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

static executor & executor_of(ggml_backend_t backend) { return *(executor *) backend->context; }

static void free_backend(ggml_backend_t backend) {
    delete &executor_of(backend);
    delete backend;
}

static ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) try {
    return executor_of(backend).run(graph);
} catch (const std::bad_alloc &) {
    return GGML_STATUS_ALLOC_FAILED;
} catch (const std::exception &) {
    return GGML_STATUS_FAILED;
}

static void set_n_threads(ggml_backend_t backend, int n) { executor_of(backend).set_n_threads(n); }

static void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void * data) {
    executor_of(backend).set_abort(callback, data);
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
    backend->iface.event_record = [](ggml_backend_t, ggml_backend_event_t) {};
    backend->iface.event_wait = [](ggml_backend_t, ggml_backend_event_t) {};
    backend->device = &device;
    try {
        backend->context = new executor();
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

// A graph is computed when graph_compute returns, so an event has always happened. Without events
// llama.cpp would give up pipelines over several GPUs, also for models that do not use this device.
static ggml_backend_event_t new_event(ggml_backend_dev_t device) {
    return new ggml_backend_event{device, nullptr};
}

static void device_props(ggml_backend_dev_t, ggml_backend_dev_props * props) {
    std::memset(props, 0, sizeof *props);
    props->caps.async = true;
    props->caps.events = true;
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
    device.iface.event_new = new_event;
    device.iface.event_free = [](ggml_backend_dev_t, ggml_backend_event_t event) { delete event; };
    device.iface.event_synchronize = [](ggml_backend_dev_t, ggml_backend_event_t) {};
    device.reg = &reg;

    reg.api_version = GGML_BACKEND_API_VERSION;
    reg.iface.get_name = [](ggml_backend_reg_t) { return name(); };
    reg.iface.get_device_count = [](ggml_backend_reg_t) -> size_t { return 1; };
    reg.iface.get_device = [](ggml_backend_reg_t, size_t) { return &device; };
    reg.iface.get_proc_address = proc_address;
    ggml_backend_register(&reg);
}

}  // namespace llamacrab::kernels
