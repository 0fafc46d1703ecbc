# `make demo` and `make test` each work as the only command on a fresh clone: they need python3
# (3.11 or later, with venv and pip) and make, and put everything else into .venv.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# A folder of real models and data. Tests that need it are skipped, and say so, when it is unset.
DITHER_DATA ?=
export DITHER_DATA

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS)
CODE := src tests $(wildcard benchmarks examples)

.DEFAULT_GOAL := help
.PHONY: help demo test lint pytest bench docs format clean

help:
	@echo "make demo    show what dither does, in a few minutes"
	@echo "make test    all checks: lint, types, tests, doctests, README, coverage"
	@echo "make lint    ruff and mypy only;  make pytest: tests only"
	@echo "make bench   the quick benchmarks"
	@echo "make docs    the documentation as HTML, in docs/_build/html"
	@echo "make format  rewrite the code in the house style"
	@echo "make clean   remove what these commands made, .venv included"

demo: $(VENV)/.installed-demo
	$(BIN)/dither demo

test: lint pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE)

pytest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --cov

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.quick

# Every warning is an error; --keep-going shows them all.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist docs/_build out dither-demo .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch comes first and alone, at an exact version: an open range can pull in gigabytes of CUDA
# packages where a CPU build would do. The stamps make every later run start at once, and are
# older than the files they depend on when something must be installed anew.
$(VENV)/.installed-torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dither needs Python 3.11 or later; try: make PYTHON=python3.13"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed-torch pyproject.toml
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-torch pyproject.toml
	$(PIP) -e '.[docs]'
	touch $@
