PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
READY := .venv/ready
# More than one thread per process only slows down many small processes; it also changes the order of float sums.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install browser demo test test-faults lint format bench bench-loader tables clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY) ## Make .venv (PYTHON=python3.12 picks the interpreter) and install the package, editable, with all it needs.

$(READY): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d found, 3.11 or newer needed: make install PYTHON=python3.11" % sys.version_info[:2])'
	@$(PY) -c pass 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --editable '.[dali,demo,parquet,remote,test,dev]'
	@touch $@

browser: ## Install the Chromium that the report's tests look through, where there is none (Debian, as root).
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; }

demo: $(READY) ## Train on handwritten digits with 2 processes, kill one on the way, compare with full training.
	$(PY) launch/demo.py $(ARGS)

test: $(READY) ## Run all tests but the faults; ARGS='-k gate' picks some.
	$(PY) -m pytest -n 2 --dist loadfile -m "not faults" $(ARGS)

# One after another: they assert how soon a killed run steps again, which a neighbour on the same cores would delay.
test-faults: $(READY) ## Kill, stop and starve real processes; ARGS='--faults-seed 1' does so at other moments.
	$(PY) -m pytest -m faults --durations=10 $(ARGS)

lint: $(READY) ## Check style, format, types and layering.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Format the code and mend what ruff can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Measure this machine; results land in benchmarks/results.
	$(PY) -m benchmarks.gpu $(ARGS)

# The peers' pins hold numpy and others back, so they get an environment of their own.
.venv-bench/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv --clear .venv-bench
	.venv-bench/bin/python -m pip install --disable-pip-version-check --progress-bar off --editable '.[bench,dali]'
	@touch $@

bench-loader: .venv-bench/ready ## Measure loaders side by side; IMAGES=… holds one folder of JPEGs per class.
	@test -n "$(IMAGES)" || { echo "IMAGES is missing: make bench-loader IMAGES=PATH/TO/IMAGES"; exit 2; }
	.venv-bench/bin/python -m benchmarks.loader $(IMAGES) $(ARGS)

tables: $(READY) ## Write the tables of README from benchmarks/results.
	$(PY) -m benchmarks.tables $(ARGS)

clean: ## Remove what builds, tests and linters left; .venv, .venv-bench and runs stay.
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
