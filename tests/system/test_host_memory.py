"""Free memory under limits tighter than the machine, on trees of files like the kernel's."""

import os
import resource
import subprocess
import sys

import psutil
import pytest

from qmoe.system import host_memory
from qmoe.system.host_memory import room


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=64 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)


def tree(root, membership, groups):
    """groups: by folder below /sys/fs/cgroup, the files in it."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for folder, files in groups.items():
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (path / name).write_text(f"{text}\n")
    return root


def v2(limit, used, files=0):
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"inactive_file {files}"}


def v1(limit, used, files=0):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    return dict(zip(names, (limit, used), strict=True)) | {
        "memory.stat": f"inactive_file 7\ntotal_inactive_file {files}"
    }


def test_without_limits_it_is_the_machine(tmp_path):
    groups = {".": {}, "a": v2("max", 5)}
    found = room(tree(tmp_path, "0::/a\n", groups))
    assert found.nbytes == 64 << 30 and found.reason == "on this machine"


def test_the_process_own_group(tmp_path):
    found = room(tree(tmp_path, "0::/a/b\n", {"a": v2("max", 5), "a/b": v2(1000, 400, 30)}))
    assert found.nbytes == 630
    assert found.reason == "under the limit of 1000 bytes of control group /a/b (memory.max)"


def test_a_tighter_group_around_it(tmp_path):
    groups = {"a": v2(900, 800), "a/b": v2(1000, 400), "a/b/c": v2("max", 300)}
    found = room(tree(tmp_path, "0::/a/b/c\n", groups))
    assert found.nbytes == 100 and "group /a (" in found.reason


def test_a_container_that_sees_its_own_group_at_the_top(tmp_path):
    found = room(tree(tmp_path, "0::/docker/123\n", {".": v2(5000, 1000)}))
    assert found.nbytes == 4000 and "group / (" in found.reason


def test_version_1_and_a_group_around_it(tmp_path):
    membership = "9:name=systemd:/x\n4:cpu,memory:/a/b\n0::/\n"
    unlimited = 9223372036854771712
    groups = {"memory/a": v1(700, 500, 60), "memory/a/b": v1(unlimited, 300), "unified": {}}
    found = room(tree(tmp_path, membership, groups))
    assert found.nbytes == 260
    assert "700 bytes of control group /a (memory.limit_in_bytes)" in found.reason


def test_version_2_beside_version_1(tmp_path):
    groups = {"memory": v1(10**15, 1), "unified/a": v2(800, 100)}
    assert room(tree(tmp_path, "4:memory:/\n0::/a\n", groups)).nbytes == 700


def test_more_used_than_allowed_leaves_nothing(tmp_path):
    assert room(tree(tmp_path, "0::/a\n", {"a": v2(100, 400)})).nbytes == 0


def test_the_limit_of_the_address_space():
    """In a process of its own, whose limit is 20 GB and the machine's memory may be less."""
    code = (
        "import resource, psutil; resource.setrlimit(resource.RLIMIT_AS, (20 * 10**9,) * 2)\n"
        "psutil.virtual_memory = lambda m=psutil.virtual_memory(): m._replace(available=10**15)\n"
        "from pathlib import Path; from qmoe.system.host_memory import room\n"
        "found = room(Path('/nowhere')); print(found.nbytes, found.reason)"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env
    )
    nbytes, reason = done.stdout.strip().split(" ", 1)
    assert 15 * 10**9 < int(nbytes) < 20 * 10**9 and reason.endswith("(ulimit -v)")


def test_free_is_what_room_has(monkeypatch):
    monkeypatch.setattr(host_memory, "room", lambda: host_memory.Room(42, ""))
    assert host_memory.free() == 42
