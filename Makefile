# Every target sets up what it needs in .venv: the first run installs it, later ones do not call pip.
# Variables: PYTHON is the interpreter for the environment, ARGS are further arguments for the tool.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
# No byte code is compiled in advance, because most of the installed code is never imported. What is
# imported is kept in .venv: compiling torch again costs every process 10 seconds.
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/bytecode
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(RUN) pip --disable-pip-version-check -qq install --no-compile -c constraints.txt
# The stamp has the checkout's path, because an environment breaks when it is moved or copied.
STAMP := $(VENV)/installed
SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
NATIVE := $(SOURCES) $(foreach end,h cuh cpp cu,\
  $(wildcard tests/native/*.$(end) tests/native/*/*.$(end) tests/c/*.$(end) examples/*/*.$(end)))
# The extensions are rebuilt when a source changed; without a compiler, each run tries again.
BUILT := $(VENV)/built
# The tests of the Triton kernels also need the newest supported Triton, which constraints.txt pins; the
# weekly tests need the oldest, too, in its own folder. Triton does not support macOS. If it cannot
# be installed, the tests skip and say so.
TRITON := $(VENV)/triton
OLDEST_TRITON := $(VENV)/oldest-triton
# A compiler for macOS, 100 MB, for two of the weekly tests.
ZIG := $(VENV)/zig
# Ray, 250 MB, for batches and servers on several workers, in some of the weekly tests.
RAY := $(VENV)/ray
# MkDocs, for the pages only. The line about its future is not about this site.
DOCS := $(VENV)/docs
export NO_MKDOCS_2_WARNING := 1
# Date and commit of the last run of the weekly tests in which all passed.
WEEKLY := .ci/weekly
export BIPER_REQUIRE_NATIVE ?= auto
# Compiling the CUDA kernels for all architectures takes minutes. Without a GPU nothing runs them, and
# the deep tests compile them once anyway.
ifndef BIPER_CUDA
BIPER_CUDA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo auto || echo 0)
endif
export BIPER_CUDA

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-deep test-weekly lint format bench docs clean FORCE

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(BUILT)  ## Create .venv with everything for development

demo: $(BUILT)  ## Train, convert, verify, save and run a BiPer net on real digits
	@$(BIN)/biper demo $(ARGS)

# Tests run in processes of one thread each.
test: $(BUILT) $(TRITON)  ## Run the tests
	@echo "==> Tests"
	@OMP_NUM_THREADS=1 $(RUN) pytest tests --no-header -n auto --maxprocesses 8 --dist worksteal -p no:benchmark $(ARGS)

# pytest exits with 5 if it selects no test.
test-deep: $(BUILT) $(TRITON)  ## Run the slow tests, and those that need a compiler or a build
	@echo "==> Deep tests"
	@OMP_NUM_THREADS=1 $(RUN) pytest tests --no-header -m "deep and not weekly" -n 2 --dist loadfile -p no:benchmark -rs $(ARGS) || \
	  { status=$$?; [ $$status -eq 5 ] && echo "No deep test to run."; }

# Whoever sees it pass commits the new record.
test-weekly: $(BUILT) $(TRITON) $(OLDEST_TRITON) $(ZIG) $(RAY)  ## Run the long and rare tests, and record that they passed
	@echo "==> Weekly tests; they last passed: $$(cat $(WEEKLY))"
	@OMP_NUM_THREADS=1 $(RUN) pytest tests --no-header -m weekly -n 2 --dist loadfile -p no:benchmark -rs $(ARGS)
	@test -n "$(ARGS)" || printf '%s at %s\n' "$$(date -u +%F)" "$$(git describe --always --dirty --abbrev=12)" > $(WEEKLY)

lint: $(STAMP)  ## Check style, formatting and types
	@echo "==> ruff check"
	@$(RUN) ruff check --quiet .
	@echo "==> ruff format --check"
	@$(RUN) ruff format --quiet --check . || { echo "Run: make format"; exit 1; }
	@echo "==> mypy --strict biper_engine"
	@$(RUN) mypy --strict --no-error-summary biper_engine
ifneq ($(NATIVE),)
	@echo "==> clang-format --dry-run"
	@$(BIN)/clang-format --dry-run -Werror $(NATIVE)
endif

format: $(STAMP)  ## Format the code, and apply safe fixes
	@$(RUN) ruff check --quiet --fix-only .
	@$(RUN) ruff format .
ifneq ($(NATIVE),)
	@$(BIN)/clang-format -i $(NATIVE)
endif

bench: $(BUILT)  ## Run the benchmarks
	@echo "==> Benchmarks"
	@$(RUN) pytest benchmarks --no-header --benchmark-only $(ARGS) || \
	  { status=$$?; [ $$status -eq 5 ] && echo "No benchmark to run."; }

docs: $(DOCS)  ## Write the documentation as a site to build/docs
	@echo "==> mkdocs build"
	@$(RUN) mkdocs build --quiet --strict $(ARGS)
	@echo "build/docs/index.html"

clean:  ## Remove builds and caches; .venv stays
	@echo "==> Removing builds and caches"
	@rm -rf build dist biper_engine/*.so $(BUILT) .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	@find . -name .venv -prune -o -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

# torch is installed first and alone: resolving everything at once may choose a different build. What
# is compiled meanwhile is not compiled again; if that fails, the install after it fails, and says why.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; \
	  exit 1; }
	@if [ "$$(cat $(STAMP) 2>/dev/null)" != "$(CURDIR)" ]; then \
	  echo "==> Creating $(VENV)"; \
	  $(PYTHON) -m venv --clear $(VENV); fi
	@rm -f $(STAMP)
	@echo "==> Installing torch (the largest download), and compiling beside it"
	@$(INSTALL) setuptools pybind11
	@$(BIN)/python setup.py -q build_ext >/dev/null 2>&1 & compiling=$$!; \
	  $(INSTALL) torch; installed=$$?; wait $$compiling; exit $$installed
	@echo "==> Installing biper-engine with its training and development tools"
	@$(INSTALL) --no-build-isolation -e ".[train,dev]"
	@printf '%s\n' "$(CURDIR)" > $(STAMP)

$(TRITON): $(STAMP) constraints.txt
	@echo "==> Installing triton"
	@$(INSTALL) triton && touch $(TRITON) || echo "triton cannot be installed here."

$(OLDEST_TRITON): $(STAMP)
	@echo "==> Installing the oldest triton that is supported"
	@rm -rf $(OLDEST_TRITON)
	@$(RUN) pip --disable-pip-version-check -qq install --no-compile --no-deps \
	  --target $(OLDEST_TRITON) triton==3.6.0 || echo "It cannot be installed here."

$(ZIG): $(STAMP) constraints.txt
	@echo "==> Installing ziglang"
	@$(INSTALL) ziglang && touch $(ZIG) || echo "ziglang cannot be installed here."

$(RAY): $(STAMP) constraints.txt
	@echo "==> Installing ray"
	@$(INSTALL) "ray[data,serve]" && touch $(RAY) || echo "ray cannot be installed here."

$(DOCS): $(STAMP) constraints.txt
	@echo "==> Installing mkdocs"
	@$(INSTALL) mkdocs-material "mkdocstrings[python]" && touch $(DOCS)

ifeq ($(wildcard biper_engine/_cpu*.so),)
$(BUILT): FORCE
endif
ifneq ($(BIPER_CUDA),0)
ifeq ($(wildcard biper_engine/_cuda*.so),)
$(BUILT): FORCE
endif
endif

$(BUILT): $(STAMP) $(SOURCES)
	@echo "==> Building biper_engine._cpu$(if $(filter 0,$(BIPER_CUDA)),, and biper_engine._cuda)"
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $(BUILT)
