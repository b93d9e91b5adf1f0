# `make help` lists the targets. Everything runs inside .venv, which `make env` sets up; nothing is registered outside it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# A Python of at least 3.11 for the environment: `make env PYTHON=python3.12` chooses one.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
BUILD := book/_build
PAGE := $(BUILD)/html/index.html
CODE := detr_nb nbs tests tools results book/_ext

# Kernels come from the environment and read nobody's personal start-up files.
export JUPYTER_PREFER_ENV_PATH := 1
export JUPYTER_PLATFORM_DIRS := 1
export IPYTHONDIR := $(CURDIR)/$(VENV)/ipython
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore
export PYTHONUNBUFFERED := 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV MPLBACKEND

say = @printf '\n==> %s\n' "$(1)"
# Two processes of one thread each; tests/conftest.py says which tests stay together.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadscope
EXECUTE := $(BIN)/python tools/execute.py
BOOK := $(BIN)/jupyter-book build . --config book/_config.yml --toc book/_toc.yml --path-output book -W --keep-going

.PHONY: help env book pdf test check lint export check-export outputs colab oldest clean clean-book

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## set up .venv from constraints.txt (again only when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt
	$(call say,environment: $(VENV) with the versions of constraints.txt (some minutes the first time))
	@if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  found=; \
	  for name in $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python); do \
	    if command -v $$name >/dev/null && $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then found=$$name; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "No Python of at least 3.11 with its venv module was found. On Debian: apt-get install python3-venv." >&2; \
	    echo "Or name one: make env PYTHON=/path/to/python3.12" >&2; exit 1; \
	  fi; \
	  $$found -m venv --clear $(VENV); \
	fi
	@$(BIN)/python -m pip install --quiet --prefer-binary -c constraints.txt -e ".[book,dev]"
	@$(BIN)/python -m pip check
	@mkdir -p $(IPYTHONDIR)/profile_default
	@echo 'get_config().IPKernelApp.log_level = 40' > $(IPYTHONDIR)/profile_default/ipython_kernel_config.py
	@touch $@

book: env ## execute the chapters that changed and build the book
	$(call say,book: executing what changed; the first time takes about a quarter of an hour on two cores)
	@$(EXECUTE)
	@$(BOOK)
	@printf '\nThe book is ready. Open it in a browser: %s\n' "$(PAGE)"

pdf: book ## print the book as one PDF (wants a Chromium)
	$(call say,pdf: one page of all pages, printed)
	@$(BIN)/python tools/pdf.py

test: env ## everything: lint, export, every notebook in a clean build, tests
	@$(MAKE) lint
	@$(MAKE) check-export
	@$(MAKE) clean-book
	$(call say,book: clean build that executes every notebook once; a warning is an error)
	@$(EXECUTE)
	@$(BOOK)
	@$(EXECUTE) --table
	$(call say,tests: pytest)
	@$(PYTEST) --durations=10

check: env ## the quick part: lint, export, the fast tests
	@$(MAKE) lint
	@$(MAKE) check-export
	$(call say,tests: pytest without the slow ones)
	@$(PYTEST) -m "not slow"

lint: env ## ruff over the code and the notebooks
	$(call say,lint: ruff on $(CODE))
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check nbs

check-export: env ## is detr_nb/ what the notebooks export?
	$(call say,export: comparing detr_nb/ with a fresh export of the notebooks)
	@$(BIN)/python tools/check_export.py

export: env ## write detr_nb/ from the notebooks
	$(call say,export: nbs/ to detr_nb/)
	@$(BIN)/nbdev_export

outputs: book ## write the outputs of that build into the notebooks, as GitHub shows them
	$(call say,outputs: from the book into nbs/)
	@$(BIN)/python tools/outputs.py
	@$(EXECUTE) --note

colab: ## run the first cell and all notebooks with Colab's versions, in .venv-colab (an hour; not part of `make test`)
	@python3 tools/environments.py colab $(if $(PYTHON),--python $(PYTHON))

oldest: ## run all notebooks and the quick tests with the oldest versions allowed, in .venv-oldest (an hour)
	@python3 tools/environments.py oldest $(if $(PYTHON),--python $(PYTHON))

clean-book:
	@rm -rf $(BUILD)

clean: clean-book ## remove what was built and cached, except .venv
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis _docs _proc
	@find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
