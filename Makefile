# make demo, make test: each sets up everything it needs in .venv, once.
# The torch of development stands here and nowhere else; pyproject.toml holds the range that users may have.
TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
PIP_ARGS ?=
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist loadfile
# Compiling kernels is what takes the time.
GPU_ARGS ?= -n 4
DEMO_ARGS ?=
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu

VENV := .venv
PIP := $(VENV)/bin/python -m pip install $(PIP_ARGS)
# The stamp's name depends on TORCH, so that another TORCH is another set-up.
STAMP := $(VENV)/.ready-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)

.PHONY: help setup demo test check gpu clean
help:
	@echo 'make setup   a virtual environment in $(VENV) with $(TORCH) and the development tools'
	@echo 'make demo    find the heads of the pocket model and write report.html (DEMO_ARGS=...)'
	@echo 'make test    the test suite on the CPU (PYTEST_ARGS=...)'
	@echo 'make check   style and types: ruff, mypy'
	@echo 'make gpu     the tests that need a CUDA device (GPU_ARGS=...)'
	@echo 'make clean   remove $(VENV) and what the tools left'
	@echo
	@echo 'Settings: TORCH=torch==2.11.0 (another torch), PYTHON=python3.12, PIP_ARGS=...'
	@echo 'Without an NVIDIA GPU on Linux the small CPU build of torch is taken. With one, torch comes from'
	@echo 'the default index; if your driver needs another CUDA build, say so yourself, for example'
	@echo '  make gpu TORCH=torch==2.13.0+cu128 PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cu128"'

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "duohead needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name a newer one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@rm -f $(VENV)/.ready-*
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@# --no-deps: the rest comes from the usual index, and one failed look-up there is enough to know.
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) --no-deps --retries 1 --timeout 20 --index-url $(CPU_WHEELS) '$(TORCH)' || { \
	  echo 'No CPU build of $(TORCH) at $(CPU_WHEELS): taking the default build.'; $(PIP) '$(TORCH)'; }; \
	else $(PIP) '$(TORCH)'; fi
	$(PIP) '$(TORCH)' -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/duohead demo $(DEMO_ARGS)

test: $(STAMP)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

gpu: $(STAMP)
	$(VENV)/bin/python -m pytest -m gpu $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis report.html
