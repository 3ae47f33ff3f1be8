# How many CPUs and how much memory this process may use, considering the limits of its cgroups.
# `root` is for tests: a folder that contains `proc` and `sys`.


def _cgroup_folders(str controller, str root):
    """Yield the folders of this process's cgroup and of its parents, for both versions of cgroups.

    Each folder may have a limit. A container may not see the folders that /proc/self/cgroup names;
    then the root that it sees is its own cgroup.
    """
    base = os.path.join(root, "sys/fs/cgroup")
    own = {"": "/", controller: "/"}  # by controller; version 2 has no controller names
    names = {controller: controller}  # of folders; controllers may share one
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
        if ".." in parts:  # outside of this process's namespace
            parts = []
        for mount in dict.fromkeys(mounts):
            for n in range(len(parts), -1, -1):
                yield os.path.join(mount, *parts[:n])


cdef object _first_word(str folder, str name):
    """Return the first word of a file of a cgroup, or None if there is none."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read().split()[0]
    except (OSError, IndexError):
        return None


cdef object _number_in(str folder, str name):
    """Return the number in a file of a cgroup, or None if there is none or no limit."""
    word = _first_word(folder, name)
    return int(word) if word is not None and word.isdigit() else None


def cgroup_cpus(str root="/"):
    """Return how many CPUs the quotas of the cgroups allow, rounded up; None without a quota."""
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
    """Return how many CPUs this process may use: those of its affinity, and of its quotas."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    quota = cgroup_cpus(root)
    return max(1, cpus if quota is None else min(cpus, quota))


cdef object _left_in_cgroup(str folder):
    """Return how many bytes a cgroup can still allocate; None without a limit.

    Cached files count as used, but the system can drop those that were not used recently.
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
    """Return how many bytes this process can still allocate; None if it is unknown.

    This is the smallest of what the system has available and what each of its cgroups allows.
    """
    left = []
    try:
        with open(os.path.join(root, "proc/meminfo"), encoding="ascii") as file:
            left += [int(line.split()[1]) * 1024 for line in file
                     if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass  # not Linux
    for folder in dict.fromkeys(_cgroup_folders("memory", root)):
        bytes_left = _left_in_cgroup(folder)
        if bytes_left is not None:
            left.append(bytes_left)
    return min(left, default=None)
