# `make demo` runs the main job, `make test` the tests; both set up .venv themselves. Needs Python 3.10+ and its venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --editable '.[cpu,rtx,triton,bench,dev]'
	touch $@

# a real tritonserver for the tests (55 MB); without it they are skipped
.triton/ready: tests/server-setup.sh
	PYTHON=$(PYTHON) sh tests/server-setup.sh

demo: .venv/ready
	$(BIN)/neck-export onnx --checkpoint random --precision fp16 --output build/sam3-encoder.onnx
	$(BIN)/neck-export trt build/sam3-encoder.onnx --fp16

# a process a core, a file in one process (its traces are shared), the longest files first, one thread each
test: .venv/ready .triton/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .triton build
