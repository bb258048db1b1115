# Every target sets up what it needs: a virtual environment in .venv with pinned versions.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-all lint types kernels gpu-dry-run families check clean

quickstart: .venv/ready
	$(BIN)/python scripts/quickstart.py

# Processes of one thread each: small models gain nothing from threads. A file's tests stay together,
# so that what they share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 8 --dist loadfile

test: .venv/ready
	$(PYTEST) -m "not slow"

# With the full products of which `make test` runs a sample: ranks, kills, every width and dtype.
test-all: .venv/ready
	$(PYTEST)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the editable install's mapping of kernels/ and calibration/, so it gets a copy.
types: .venv/ready
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy

# No GPU needed: compiles the Triton kernels for nine GPUs and checks what came out.
kernels: .venv/ready
	$(BIN)/python -P scripts/kernel_report.py

# All steps of the kit for GPUs on a CPU, in Triton's interpreter, at toy sizes.
gpu-dry-run: .venv/ready
	rm -rf build/gpu
	$(BIN)/python -P scripts/gpu_check.py --out build/gpu --dry-run --minutes 6

# Every MoE family of the installed transformers: a tiny random model, there and back.
families: .venv/ready
	$(BIN)/qmoe families --check

check: lint types kernels gpu-dry-run test-all families

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
