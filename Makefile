# `make demo` and `make test` set up everything they need; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# Asked for PyTorch without CUDA where there is no NVIDIA driver. Where it cannot be reached, the package
# index that pip is set up with serves instead, and pip says so.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_CPU ?= torch==2.13.0
TORCH_CUDA ?= torch
# One thread a worker: pytest-xdist starts as many workers as there are cores.
WORKERS ?= auto
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
PYTHON_STAMP := $(VENV)/.python
TORCH_STAMP := $(VENV)/.torch
DEMO_STAMP := $(VENV)/.quamba
TEST_STAMP := $(VENV)/.quamba-test
# The CPU kernels are compiled when the package is installed.
NATIVE := native/CMakeLists.txt $(wildcard native/*.h native/*.cpp native/kernels/*.cpp)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test check heavy lint format types bench clean distclean

help:
	@echo 'make demo [FULL=1]  quantize the bundled Mamba2 model to W4A8, measure it, generate from it'
	@echo 'make test           lint, types and the whole test suite'
	@echo 'make check          lint, types and the fast tests'
	@echo 'make heavy          the tests of the largest sizes: minutes, gigabytes'
	@echo 'make lint           ruff: rules and formatting, changing nothing'
	@echo 'make format         ruff: apply both'
	@echo 'make types          mypy on the package'
	@echo 'make bench          every script in benchmarks/'
	@echo 'make clean          remove caches and build output'
	@echo 'make distclean      that, and $(VENV)'
	@echo 'Each sets up $(VENV) first if need be. PYTHON=... picks the interpreter (3.10 or newer).'

demo: $(DEMO_STAMP)
	$(VENV)/bin/quamba demo $(if $(filter-out 0,$(FULL)),--full)

test: lint types
	$(PYTEST) -n $(WORKERS) --dist loadfile

check: lint types
	$(PYTEST) -n $(WORKERS) --dist loadfile -m 'not slow'

heavy: $(TEST_STAMP)
	$(PYTEST) -m heavy

lint: $(TEST_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(TEST_STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(TEST_STAMP)
	$(PY) -m mypy src/quamba

bench: $(DEMO_STAMP)
	@set -e; for script in benchmarks/*.py; do \
	  test -e "$$script" || { echo 'benchmarks/ holds no script yet.'; exit 1; }; \
	  echo "$(PY) $$script"; $(PY) "$$script"; \
	done

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache src/quamba/kernels/cpu/_quamba_cpu.so
	rm -f $(DEMO_STAMP) $(TEST_STAMP)
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(PYTHON_STAMP):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no '$(PYTHON)' here; Quamba needs Python 3.10 or newer: name yours with make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "'$(PYTHON)' is $$($(PYTHON) --version 2>&1), Quamba needs Python 3.10 or newer: name yours with make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments; install its venv module (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# --no-deps: one look-up at the CPU index, so that an unreachable one costs seconds. The packages torch
# itself needs come with the next step.
$(TORCH_STAMP): $(PYTHON_STAMP)
	@if nvidia-smi -L 2>/dev/null | grep -q GPU; then \
	  echo 'Installing PyTorch with CUDA into $(VENV): several GB, once.'; \
	  $(PIP) '$(TORCH_CUDA)'; \
	else \
	  echo 'Installing PyTorch for the CPU into $(VENV): about 200 MB, once.'; \
	  $(PIP) --no-deps --retries 1 --timeout 15 '$(TORCH_CPU)' --extra-index-url '$(TORCH_CPU_INDEX)'; \
	fi
	@touch $@

$(DEMO_STAMP): $(TORCH_STAMP) pyproject.toml $(NATIVE)
	@echo 'Installing Quamba and what it needs into $(VENV).'
	@$(PIP) --editable .
	@touch $@

$(TEST_STAMP): $(TORCH_STAMP) pyproject.toml $(NATIVE)
	@echo 'Installing Quamba and what its tests need into $(VENV).'
	@$(PIP) --editable '.[test]'
	@touch $(DEMO_STAMP) $@
