# `make` alone prints what there is.

PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
VENV := .venv/installed
IS_3_11 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
CHECK_PYTHON = { $(PYTHON) -c '$(IS_3_11)' 2>/dev/null || { echo "kallos needs Python 3.11, but $(PYTHON) is:" \
  "$$($(PYTHON) --version 2>&1). Name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }; }

# Several processes of one thread each do more than one process with many threads on the same cores.
test check soak docs: export OMP_NUM_THREADS := 1
# Hundreds of processes are started: without the compiled files each would compile kallos anew.
test check soak docs: export PYTHONDONTWRITEBYTECODE :=
docs: ARGS ?= --execute
# A module's tests share what is costly to make, so one worker runs them all.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder

DEMO := reports/BTC/1d
DEMO_RUN := --model-name gru --asset-id BTC --end-date 2023-01-01 --output-path $(DEMO)

.DEFAULT_GOAL := help
.PHONY: help demo test check soak lab docs bench export clean python

help: ## what there is
	@echo "make TARGET [PYTHON=/path/to/python3.11]"
	@awk -F ':[^#]*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV) ## sample market, features, a short tune, a trained model and their reports, in minutes
	$(BIN)/kallos-run sample --asset-id BTC --timeframe 1d
	$(BIN)/kallos-run features --asset-id BTC --timeframe 1d
	$(BIN)/kallos-run tune $(DEMO_RUN) --study-name demo --n-trials 3 --folds 3 --max-epochs 8
	$(BIN)/kallos-run train $(DEMO_RUN) --params-file $(DEMO)/gru_BTC_best_params.json

test: $(VENV) ## everything that must hold: lint, sync, every module notebook, every test but the soak
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tools/sync.py --check
	$(BIN)/nbdev_test --file_re '^\d'
	$(PYTEST) -m "not soak" --durations 25 --durations-min 20

check: $(VENV) ## the quick part of test: lint, sync and the fast tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tools/sync.py --check
	$(PYTEST) -m "not soak and not slow and not browser"

soak: $(VENV) ## the long proofs at full size
	$(PYTEST) -m soak --timeout 0

lab: $(VENV) ## the notebooks in JupyterLab, explore.ipynb first; ARGS='--no-browser' and the like go to it
	$(BIN)/jupyter lab --notebook-dir nbs $(ARGS) nbs/explore.ipynb

docs: $(VENV) ## the documentation in build/docs; runs the tutorials before, unless given ARGS=
	$(BIN)/python tools/docs.py $(ARGS)

bench: .venv-bench/installed ## kallos against its peers, in an environment of their own
	@for benchmark in tests/benchmarks/bench_*.py; do echo "$$benchmark"; .venv-bench/bin/python $$benchmark || exit; done

export: $(VENV) ## notebooks formatted and cleaned; kallos/ and README.md made from them
	$(BIN)/ruff format
	$(BIN)/python tools/sync.py

clean: ## remove the environments, caches and builds; data, models and reports stay
	rm -rf .venv .venv-bench build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find nbs kallos tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

python:
	@$(CHECK_PYTHON)

.venv/installed: PACKAGES := -e '.[dev]'
.venv-bench/installed: PACKAGES := -e . -r tests/benchmarks/requirements.txt
.venv-bench/installed: tests/benchmarks/requirements.txt

# PYTHON is looked at where it is named, or where an environment must be made. An environment of another Python is made anew.
%/installed: constraints.txt setup.py settings.ini $(if $(filter-out file,$(origin PYTHON)),| python)
	@$*/bin/python -c 'import pip; $(IS_3_11)' 2>/dev/null || { $(CHECK_PYTHON) && $(PYTHON) -m venv --clear $*; }
	@echo "Installing into $*; the first time takes some minutes."
	@$*/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel
	@$*/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation $(PACKAGES)
	@touch $@
