# What a fresh machine needs: make and Python 3.11 or newer. Everything goes into .venv.

# the first of these that runs and is new enough; PYTHON=/usr/bin/python3.12 chooses
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo "$$python"; break; fi; done)
PIP_ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint types pytest bench docs clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" spares the CUDA libraries on Linux;'
	@echo 'PYTHON=python3.12 chooses the interpreter, WORKERS=4 the processes of the tests.'

demo: $(VENV)/demo.stamp ## install and run the demonstration: a real model on real text, offline, a few minutes
	$(BIN)/kilobayes demo
	@echo "open it in a browser: $(CURDIR)/runs/demo/report.html"

test: $(VENV)/test.stamp ## install, check style and types, run all tests
	@$(MAKE) --no-print-directory lint types pytest

lint: $(VENV)/test.stamp ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

types: $(VENV)/test.stamp ## check types
	$(BIN)/mypy

# one thread a worker: with more they wait for each other
pytest: $(VENV)/test.stamp ## run the tests alone
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=15 -n $(WORKERS) --dist loadscope $(TESTS)

bench: $(VENV)/test.stamp ## run the benchmarks that take --quick
	@set -e; for file in $$(grep -ls -e '"--quick"' benchmarks/*.py); do \
	  echo "$$file --quick"; $(BIN)/python "$$file" --quick; done

docs: $(VENV)/docs.stamp ## build the documentation into docs/_build/html, warnings as errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open it in a browser: $(CURDIR)/docs/_build/html/index.html"

clean: ## remove .venv, caches and what was built; runs/ stays
	rm -rf $(VENV) dist docs/_build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; name one: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) does not run or is older than Python 3.11; name another: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# a stamp is newer than the files that the installation depends on, so a second make installs nothing
PIP_INSTALL = $(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e

$(VENV)/demo.stamp: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt Makefile
	$(PIP_INSTALL) '.[demo]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt Makefile
	$(PIP_INSTALL) '.[demo,test,conformal,trl,quantised,serve,docs]'
	@touch $@ $(VENV)/demo.stamp $(VENV)/docs.stamp

$(VENV)/docs.stamp: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt Makefile
	$(PIP_INSTALL) '.[demo,docs]'
	@touch $@
