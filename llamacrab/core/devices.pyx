# The devices that llama.cpp can use.

_DEVICE_TYPES = {
    c.GGML_BACKEND_DEVICE_TYPE_CPU: "CPU",
    c.GGML_BACKEND_DEVICE_TYPE_GPU: "GPU",
    c.GGML_BACKEND_DEVICE_TYPE_IGPU: "IGPU",
    c.GGML_BACKEND_DEVICE_TYPE_ACCEL: "ACCEL",
}


cdef c.ggml_backend_dev_t find_device(str name) except NULL:
    """Return the device with this name, in any case."""
    cdef c.ggml_backend_dev_t device
    names = []
    for i in range(c.ggml_backend_dev_count()):
        device = c.ggml_backend_dev_get(i)
        if c.ggml_backend_dev_get_type(device) == c.GGML_BACKEND_DEVICE_TYPE_ACCEL:
            continue  # it helps the CPU, and cannot hold a model
        device_name = c.ggml_backend_dev_name(device).decode()
        if device_name.lower() == name.lower():
            return device
        names.append(device_name)
    raise DeviceError(
        f"there is no device {name!r}; this build and machine have {', '.join(names)}"
    )


def devices():
    """Return the devices that llama.cpp can use, as a list of dicts.

    Keys: name, description, type ("CPU", "GPU", "IGPU" or "ACCEL"), memory_free and memory_total
    (bytes).
    """
    cdef c.ggml_backend_dev_t device
    cdef size_t free, total
    all_devices = []
    for i in range(c.ggml_backend_dev_count()):
        device = c.ggml_backend_dev_get(i)
        free = total = 0
        c.ggml_backend_dev_memory(device, &free, &total)
        all_devices.append({
            "name": c.ggml_backend_dev_name(device).decode(),
            "description": c.ggml_backend_dev_description(device).decode("utf-8", "replace"),
            "type": _DEVICE_TYPES.get(<int>c.ggml_backend_dev_get_type(device), "?"),
            "memory_free": free,
            "memory_total": total,
        })
    return all_devices
