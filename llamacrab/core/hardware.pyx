# What this process may use of the machine: its CPUs and its memory, with the limits of its cgroups.
# `root` is for tests: a folder that holds `proc` and `sys`.


def _cgroup_folders(str controller, str root):
    """Yield the folders of this process's cgroup and of all above it, of both versions of cgroups.

    Each of them may have a limit. A container may not see the folders that /proc/self/cgroup names;
    what it sees as the root is then its own.
    """
    base = os.path.join(root, "sys/fs/cgroup")
    own = {"": "/", controller: "/"}  # by controller; the second version has no names
    names = {controller: controller}  # of folders: controllers may share one
    try:
        with open(os.path.join(root, "proc/self/cgroup"), encoding="utf-8") as file:
            for line in file:
                _, controllers, path = line.rstrip("\n").split(":", 2)
                for name in controllers.split(","):
                    own[name], names[name] = path, controllers
    except (OSError, ValueError):
        pass
    for name, mounts in (
        ("", (base, os.path.join(base, "unified"))),
        (controller, (os.path.join(base, controller), os.path.join(base, names[controller]))),
    ):
        parts = own[name].strip("/").split("/")
        if ".." in parts:  # outside of what this process's namespace can see
            parts = []
        for mount in dict.fromkeys(mounts):
            for n in range(len(parts), -1, -1):
                yield os.path.join(mount, *parts[:n])


cdef object _first_word(str folder, str name):
    """Return the first word of a file of a cgroup; None where it is not there."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read().split()[0]
    except (OSError, IndexError):
        return None


cdef object _number_in(str folder, str name):
    """Return the number that a file of a cgroup holds; None where there is none, or no limit."""
    word = _first_word(folder, name)
    return int(word) if word is not None and word.isdigit() else None


def cgroup_cpus(str root="/"):
    """Return the CPUs that the quotas of the cgroups allow, rounded up; None without a quota."""
    allowed = []
    for folder in dict.fromkeys(_cgroup_folders("cpu", root)):
        try:
            with open(os.path.join(folder, "cpu.max"), encoding="utf-8") as file:
                quota, period = file.read().split()
        except (OSError, ValueError):
            quota = _first_word(folder, "cpu.cfs_quota_us") or "max"
            period = _first_word(folder, "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:
            allowed.append(-(-int(quota) // int(period)))
    return min(allowed, default=None)


def usable_cpus(str root="/"):
    """Return how many CPUs this process may use: its affinity, and the quotas of its cgroups."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    quota = cgroup_cpus(root)
    return max(1, cpus if quota is None else min(cpus, quota))


cdef object _left_in_cgroup(str folder):
    """Return the bytes that a cgroup may still take; None where it has no limit.

    Cached files count as used, but the system drops those that nothing has used lately.
    """
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _number_in(folder, limit_name), _number_in(folder, usage_name)
        if limit is None or usage is None:
            continue
        cached = 0
        try:
            with open(os.path.join(folder, "memory.stat"), encoding="utf-8") as file:
                cached = next(int(line.split()[1]) for line in file
                              if line.startswith(cache_name + " "))
        except (OSError, ValueError, IndexError, StopIteration):
            pass
        return max(0, limit - max(0, usage - cached))
    return None


def available_memory(str root="/"):
    """Return the bytes of memory that this process can still get; None where nothing tells.

    The least of what the system has available and what each of its cgroups leaves.
    """
    left = []
    try:
        with open(os.path.join(root, "proc/meminfo"), encoding="ascii") as file:
            left += [int(line.split()[1]) * 1024 for line in file
                     if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass  # no Linux
    for folder in dict.fromkeys(_cgroup_folders("memory", root)):
        bytes_left = _left_in_cgroup(folder)
        if bytes_left is not None:
            left.append(bytes_left)
    return min(left, default=None)
