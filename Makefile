# Every target sets up what it needs: a virtual environment in .venv with pinned versions.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CC ?= cc
CROSS ?= aarch64-linux-gnu-gcc
SANITIZED := -std=c11 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -Ikernels/cpu/csrc \
	tests/kernels/cpu/sanitize.c $(wildcard kernels/cpu/csrc/*.c) -lm -lpthread

.PHONY: quickstart test test-all lint types rooms sanitize kernels gpu-dry-run families docs smoke wheels check clean

quickstart: .venv/ready
	$(BIN)/python scripts/quickstart.py

# Processes of one thread each: small models gain nothing from threads. Each gets a stretch of the
# files, so that what a file's tests share is made once, and takes over tests of others at the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 8 --dist worksteal

# Without the checks of shapes and types at every call, which take a quarter of the time.
test: .venv/ready
	JAXTYPING_DISABLE=1 $(PYTEST) -m "not slow"

# With those checks, and with the full products of which `make test` runs a sample: ranks, kills,
# every width and dtype.
test-all: .venv/ready
	$(PYTEST)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the editable install's mapping of kernels/ and calibration/, so it gets a copy (of
# the Python alone).
types: .venv/ready
	rm -rf build
	CC=false $(BIN)/pip install --quiet --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy

# The folders of the library and what each imports, drawn here and in ARCHITECTURE.md.
rooms: .venv/ready
	$(BIN)/python -P scripts/rooms.py --write

# No GPU needed: compiles the Triton kernels for nine GPUs and checks what came out.
kernels: .venv/ready
	$(BIN)/python -P scripts/kernel_report.py

# The C kernels under sanitizers, every instruction set of this processor against the scalar one; NEON
# in an emulator if there is a cross compiler. Says what it leaves out.
sanitize:
	mkdir -p build/sanitize
	@command -v $(CC) >/dev/null || { echo "no C compiler: the C kernels are not checked"; exit 0; }; set -ex; \
	$(CC) -O1 -fsanitize=address,undefined -fno-sanitize-recover=all $(SANITIZED) -o build/sanitize/memory; \
	build/sanitize/memory 100; \
	$(CC) -O1 -fsanitize=thread $(SANITIZED) -o build/sanitize/threads; \
	build/sanitize/threads 40
	@command -v $(CROSS) >/dev/null && command -v qemu-aarch64 >/dev/null || { \
	echo "no $(CROSS) and qemu-aarch64: NEON is not checked"; exit 0; }; set -ex; \
	$(CROSS) -O2 -static $(SANITIZED) -o build/sanitize/neon; \
	qemu-aarch64 build/sanitize/neon 50

# All steps of the kit for GPUs on a CPU, in Triton's interpreter, at toy sizes.
gpu-dry-run: .venv/ready
	rm -rf build/gpu
	$(BIN)/python -P scripts/gpu_check.py --out build/gpu --dry-run --minutes 12

# sdist and wheels in dist/, each wheel used in a clean environment outside of the repository.
smoke: .venv/ready
	$(BIN)/python -P scripts/smoke_test.py --dist dist --borrow

# What goes to a package index, in dist/; a wheel for aarch64 too if there is a cross compiler.
wheels: .venv/ready
	$(BIN)/python -P scripts/wheels.py --dist dist $$(command -v $(CROSS) >/dev/null && echo --cross $(CROSS))

# The site, in build/site; a warning is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Every MoE family of the installed transformers: a tiny random model, there and back.
families: .venv/ready
	$(BIN)/qmoe families --check

check: lint types sanitize kernels gpu-dry-run test-all families docs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
