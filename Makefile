# `make demo` runs the main job, `make test` the tests; both set up .venv themselves. Needs Python 3.10+ and its venv.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := cpu,rtx,triton,bench,sam3,dev

.PHONY: demo test test-oldest test-newest test-slow gpu-kit gpu lint lint-cpp lock clean

# the versions in requirements.lock and no others; as constraints, so that a CPU build of torch brings no CUDA packages
.venv/ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint requirements.lock pip setuptools
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --build-constraint requirements.lock \
	  --editable '.[$(EXTRAS)]'
	touch $@

# renews requirements.lock and those of the two folders below: what is newest today (needs network)
lock: .venv/ready
	sh tests/lock.sh

# a real tritonserver for the tests (55 MB); without it they are skipped
.triton/ready: tests/server-setup.sh tests/setup-folder.sh tests/server.lock
	PYTHON=$(PYTHON) sh tests/server-setup.sh

# Meta's and Ultralytics' packages for the tests (220 MB on disk); without them they are skipped
.families/ready: tests/families-setup.sh tests/setup-folder.sh tests/families.lock .venv/ready
	sh tests/families-setup.sh

demo: .venv/ready
	$(BIN)/neck-export onnx --checkpoint random --precision fp16 --output build/sam3-encoder.onnx
	$(BIN)/neck-export trt build/sam3-encoder.onnx --fp16

# a process a core, a file in one process, the longest files first, one thread each; bytecode is kept wherever the
# environment says otherwise: without, each of the hundred processes that tests start compiles our modules for 0.5 s, and
# in a new environment torch as well, for 5 s (torch 2.15)
RUN = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(1)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test: .venv/ready .triton/ready .families/ready
	$(call RUN,$(BIN))

# the tests with other versions than the lock's, each in an environment of its own: the oldest that pyproject allows, and
# the newest of everything; without what needs a server, a browser, a C++ compiler or SAM 3's packages. Several GB: the
# package index has torch for Linux with CUDA only. PYTHON= names the Python, UV= an uv.
UV ?= $(BIN)/uv
oldest := --resolution lowest-direct
newest := --upgrade
PART := --ignore-glob='tests/test_cpp_*' --ignore-glob='tests/test_server*' --ignore=tests/test_browser.py \
  --ignore=tests/test_families.py

test-oldest test-newest: test-%: .venv/ready
	$(UV) venv --quiet --clear --seed --python '$(PYTHON)' build/$*
	$(UV) pip install --quiet --python build/$* $($*) --editable '.[$(EXTRAS)]'
	$(UV) pip freeze --python build/$* > build/$*.txt
	$(call RUN,build/$*/bin) $(PART)

test-slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow

# where there is network: wheels of what a bare GPU machine lacks, for its Python
gpu-kit: .venv/ready
	$(BIN)/python -m benchmarks.gpu.kit --output build/gpu-kit

# there: all that a GPU is asked for, from the kit alone; a second call goes on where the first stopped
GPU_MINUTES ?= 9
GPU_DEVICE ?= cuda
GPU_OUTPUT ?= build/gpu
gpu:
	$(PYTHON) -m benchmarks.gpu.start --kit build/gpu-kit --output $(GPU_OUTPUT) --minutes $(GPU_MINUTES) \
	  --device $(GPU_DEVICE) $(GPU_OPTIONS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# gcc and clang with warnings as errors, and clang-tidy, on each C++ file: minutes
lint-cpp: .venv/ready
	$(BIN)/python -m pytest -q -m slow tests/test_cpp_style.py

clean:
	rm -rf .venv .triton .families build
