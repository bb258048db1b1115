"""Which instructions are chosen, and what happens without the extension."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import slow

from qmoe.errors import ConfigError
from qmoe.kernels.cpu import library
from qmoe.kernels.cpu.stack import CpuStack, uses_cpu_kernels


@pytest.fixture
def fresh(monkeypatch):
    library.tier.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.tier.cache_clear()


def test_off_takes_torch(fresh, capsys):
    fresh.setenv(library.VARIABLE, "off")
    assert library.tier() is None and not uses_cpu_kernels(torch.device("cpu"))
    assert capsys.readouterr().err == ""


def test_without_the_extension_one_line_says_so(fresh, capsys):
    fresh.delenv(library.VARIABLE, raising=False)
    fresh.setattr(library, "library", lambda: None)
    assert [uses_cpu_kernels(torch.device("cpu")) for _ in range(3)] == [False] * 3
    assert (
        capsys.readouterr().err.count("warning: this installation of qmoe has no CPU kernels") == 1
    )
    library.tier.cache_clear()
    fresh.setenv(library.VARIABLE, "avx2")
    with pytest.raises(ConfigError, match="has no CPU kernels"):
        library.tier()


def test_wrong_names_are_errors(fresh):
    fresh.setenv(library.VARIABLE, "avx1024")
    with pytest.raises(ConfigError, match="'avx1024': expected off or one of avx512vnni, "):
        library.tier()


@pytest.mark.skipif(library.library() is None, reason="installed without a C compiler")
def test_instructions_of_other_processors_are_errors(fresh):
    lib = library.library()
    for name in library.NAMES:
        library.tier.cache_clear()
        fresh.setenv(library.VARIABLE, name)
        if lib.qmoe_find_tier(name.encode()) >= 0:
            assert library.tier_name() == name
        else:
            with pytest.raises(ConfigError, match=f"this processor cannot run {name}"):
                library.tier()


def test_without_a_compiler_the_extension_is_left_out(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    folders = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    environment = {**os.environ, "CC": "false", "LDSHARED": "false"}
    done = subprocess.run(
        command + folders, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


STATE = """
import re, sys, threading, torch
def state():
    def alive(out):
        tiny = torch.tensor([1e-7], dtype=torch.float16)
        out.append((5e-324 > 0, float(tiny.float() * 1e-36) > 0))
    out = []
    thread = threading.Thread(target=alive, args=(out,)); thread.start(); thread.join(); alive(out)
    maps = open("/proc/self/maps").read()
    return out, sorted(set(re.findall(r"/\\S*lib[gi]?omp\\S*", maps))), torch.get_num_threads()
before = state()
from qmoe.kernels.cpu.stack import CpuStack
from qmoe.kernels.activation import Activation
from qmoe.kernels.reference import random_matrices
cpu = torch.device("cpu")
stacks = [random_matrices(4, n, k, 4, 32, torch.bfloat16, cpu) for n, k in ((128, 64), (64, 64))]
stack = CpuStack(stacks, torch.bfloat16, Activation("silu"))
stack.experts(torch.randn(9, 64).bfloat16(), torch.randint(0, 4, (9, 2)), torch.rand(9, 2), None)
after = state()
assert before == after and len(after[1]) <= 1, (before, after)
"""


@pytest.mark.skipif(library.tier() is None, reason="installed without a C compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("variable", ["OMP_PROC_BIND=true", slow("GOMP_CPU_AFFINITY=0")])
def test_the_process_stays_as_it_was(variable):

    name, value = variable.split("=")
    environment = {**os.environ, name: value, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-P", "-c", STATE], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(library.tier() is None, reason="installed without a C compiler")
def test_float32_models_are_exact():
    from qmoe.kernels.reference import random_matrices

    for dtype, exact in ((torch.float32, True), (torch.bfloat16, False), (torch.float16, False)):
        matrices = random_matrices(1, 16, 32, 4, 32, dtype, torch.device("cpu"))
        assert CpuStack([matrices], dtype).exact is exact
