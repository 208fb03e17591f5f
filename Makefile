# make run | test | test-slow | lint | bench | bench-readme | kernels | cuda | clean
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
comma := ,
VENV ?= .venv
BIN := $(VENV)/bin
# The GPU and CPU flavours of onnxruntime overwrite each other, so exactly one goes in.
EXTRA ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
# CUDA kernels: by default where there are both a GPU and nvcc.
ONNXQ_CUDA ?= $(if $(filter gpu,$(EXTRA)),$(shell command -v nvcc >/dev/null && echo 1))
export ONNXQ_CUDA
OUT ?= out
SHARED := $(shell if [ -n "$${ONNXQ_SHARED:-}" ]; then echo "$$ONNXQ_SHARED"; else echo ../shared; fi)

# What a rebuild of the environment depends on; Python files are used in place.
CXX_SOURCES := $(shell find custom_ops tests -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	| sort)
# A change of the CUDA kernels reinstalls only where they are built.
BUILD_INPUTS := pyproject.toml CMakeLists.txt custom_ops/CMakeLists.txt custom_ops/ops.def \
	$(if $(filter 1,$(ONNXQ_CUDA)),custom_ops/cuda/CMakeLists.txt $(CXX_SOURCES), \
	  $(filter-out custom_ops/cuda/%,$(filter custom_ops/%,$(CXX_SOURCES))))
RUN_STAMP := $(VENV)/.installed-$(EXTRA)
DEV_STAMP := $(VENV)/.installed-$(EXTRA)-dev

.PHONY: help run test test-slow lint bench bench-readme kernels cuda cuda-proof clean
help:
	@echo "make run        quantize a real model end to end and print the table"
	@echo "make test       lint-free tests (under 15 minutes on two cores)"
	@echo "make test-slow  the long tests, with the sanitizer build of the kernels"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make bench      every file in benchmarks/"
	@echo "make bench-readme  measure the README's table anew"
	@echo "make kernels    build the operator library into the source tree"
	@echo "make cuda       build the library of CUDA kernels into the source tree; needs nvcc"
	@echo "make cuda-proof  on a machine with a GPU: check and time the CUDA kernels, fill docs/cuda.md"
	@echo "make clean      remove everything that was built"

# $(call install,EXTRAS): one environment; emptied first when it holds the other onnxruntime.
define install
	@if [ -d $(VENV) ] && ! ls $(VENV)/.installed-$(EXTRA)* >/dev/null 2>&1; then rm -rf $(VENV); fi
	@if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(PYTHON) -m virtualenv $(VENV); } || \
	  { echo "onnxq: cannot make a virtual environment; install python3-venv or virtualenv" >&2; exit 1; }; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(1)]'
	@$(BIN)/python -m onnxq.runtime
endef

$(RUN_STAMP): $(BUILD_INPUTS)
	$(call install,$(EXTRA))
	@touch $@

$(DEV_STAMP): $(BUILD_INPUTS)
	$(call install,$(EXTRA)$(comma)dev)
	@touch $(RUN_STAMP) $@

# The main job: build MiniLM, quantize it, print the table. Calibrates on STS-B train sentences
# where the shared data is at hand, otherwise on the sentences that the project ships.
run: $(RUN_STAMP)
	@mkdir -p $(OUT)
	@if [ -f "$(SHARED)/data/stsb/sts-train.csv" ]; then \
	  awk -F'\t' 'NR % 89 == 1 && n++ < 64 { print $$6 }' "$(SHARED)/data/stsb/sts-train.csv" \
	    > $(OUT)/calibration.txt; \
	else \
	  head -n 64 models/sentences.txt > $(OUT)/calibration.txt; \
	fi
	$(BIN)/onnxq models build minilm -o $(OUT)/minilm.onnx
	$(BIN)/onnxq run $(OUT)/minilm.onnx -o $(OUT)/minilm-w8a8.onnx --passes w8a8 --force \
	  --calib $(OUT)/calibration.txt --tokenizer $(OUT)/minilm.tokenizer.json

test: $(DEV_STAMP)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q

test-slow: $(DEV_STAMP)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

bench: $(DEV_STAMP)
	for file in benchmarks/[!_]*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

# Measures MiniLM anew and writes the table into README.md; wants a quiet machine.
bench-readme: $(DEV_STAMP)
	$(BIN)/python benchmarks/minilm_w8a8.py --readme README.md

# For work without an installed package (PYTHONPATH=.): the library lands in custom_ops/lib.
kernels:
	cmake -S . -B build/kernels -DONNXQ_REQUIRE_KERNELS=ON >/dev/null
	cmake --build build/kernels -j2
	cmake --install build/kernels --prefix . >/dev/null

# The same for the CUDA kernels, with nvcc; no GPU is needed to build them.
cuda:
	cmake -G Ninja -S . -B build/cuda -DONNXQ_REQUIRE_KERNELS=ON -DONNXQ_CUDA=ON >/dev/null
	cmake --build build/cuda -j2
	cmake --install build/cuda --prefix . >/dev/null

# On a machine with a GPU, in one environment with onnxruntime-gpu and PyTorch: build the CUDA kernels,
# prove them on the device (under compute-sanitizer where it is installed), time them, run a decoder,
# and write the table of docs/cuda.md. PYTHON names the environment.
SANITIZER := $(shell command -v compute-sanitizer)
cuda-proof: kernels cuda
	@mkdir -p $(OUT)
	nvidia-smi
	PYTHONPATH=. $(PYTHON) -m pytest -q -rs --import-mode=importlib tests/cuda
	$(if $(SANITIZER),PYTHONPATH=. $(SANITIZER) --error-exitcode 1 $(PYTHON) -m pytest -q \
	  --import-mode=importlib tests/cuda/test_device.py -k "not graph and not onnxruntime",\
	  @echo "compute-sanitizer is not installed; left out")
	PYTHONPATH=. $(PYTHON) benchmarks/cuda.py --results $(OUT)/cuda.json --docs docs/cuda.md
	PYTHONPATH=. $(PYTHON) benchmarks/cuda_decoder.py --json | tee $(OUT)/cuda_decoder.json

clean:
	rm -rf $(VENV) build dist $(OUT) custom_ops/lib .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
