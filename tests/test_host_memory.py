"""Free memory of nodes and jobs, read from files as Linux shows them."""

import pytest

from longnet_hpc import host_memory
from longnet_hpc.host_memory import free_host_memory

MEMINFO = "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:    1000 kB\n"
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def write_group(root, folder, names, limit, used, cached):
    for name, value in ((names[0], limit), (names[1], used), ("memory.stat", f"anon 5\n{names[2]} {cached}")):
        write(root, f"sys/fs/cgroup/{folder}/{name}", f"{value}\n")


@pytest.fixture
def root(tmp_path, monkeypatch):
    write(tmp_path, "proc/meminfo", MEMINFO)
    monkeypatch.setattr(host_memory, "_ROOT", tmp_path)
    return tmp_path


def test_what_is_cached_of_files_counts_as_free(root):
    assert free_host_memory() == 1000 * 1024


@pytest.mark.parametrize(
    ("groups", "folder", "names"),
    [
        ("0::/slurm/job_1/step_0\n", "slurm/job_1", VERSION_2),
        ("5:cpu:/x\n4:freezer,memory:/slurm/job_1/step_0\n0::/x\n", "memory/slurm/job_1", VERSION_1),
    ],
)
def test_limit_of_a_job_around_the_process_holds(root, groups, folder, names):
    write(root, "proc/self/cgroup", groups)
    write_group(root, folder, names, 50_000, 30_000, 8_000)
    write_group(root, f"{folder}/step_0", names, "max" if names == VERSION_2 else 1 << 62, 30_000, 8_000)
    assert free_host_memory() == 28_000
    write_group(root, folder, names, 50_000, 60_000, 8_000)
    assert free_host_memory() == 0


def test_wide_limit_leaves_what_the_node_has(root):
    write(root, "proc/self/cgroup", "0::/\n")
    write_group(root, ".", VERSION_2, 1 << 40, 0, 0)
    assert free_host_memory() == 1000 * 1024
