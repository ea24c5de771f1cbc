# What a newcomer runs: `make demo`, then `make test`. Everything else is for development.
PYTHON ?= python3
VENV ?= .venv
# transformers releases at which something that we build on changed, and the newest.
VERSIONS ?= 5.0.0 5.9.0 5.15.1 newest no-torchvision
# Two workers of one thread each: small models gain nothing from more. A file stays on one worker, so that its module
# fixtures are built once.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile
PIP = $(VENV)/bin/python -m pip install --quiet

.PHONY: demo test test-long test-gpu test-versions bench bench-gpu notebooks docs dist lint clean

# Fine-tunes the model in the package on drawn images, in about 4 minutes on 2 cores; everything it writes is in demo/.
demo: $(VENV)/.train
	$(VENV)/bin/python -m transformers_rfdetr.cli.demo

test: $(VENV)/.dev
	$(PYTEST) -m "not long"

test-long: $(VENV)/.dev
	$(PYTEST) -m long

# On a machine with CUDA.
test-gpu: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m gpu tests/gpu

# Ours, transformers' port and rfdetr in the same runs; half an hour on 2 cores. Writes benchmarks/RESULTS.md.
bench: $(VENV)/.dev
	$(VENV)/bin/python benchmarks/run_all.py

# The same on a GPU, in about 20 minutes. Writes benchmarks/RESULTS_GPU.md.
bench-gpu: $(VENV)/.dev
	$(VENV)/bin/python benchmarks/run_all.py --device cuda

# Runs the notebooks and stores their outputs.
notebooks: $(VENV)/.dev
	$(VENV)/bin/python notebooks/execute.py

# The site, in site/. `.venv/bin/mkdocs serve` shows it while it is written.
docs: $(VENV)/.docs
	$(VENV)/bin/mkdocs build --strict

# The wheel and the sdist, checked and tried in an empty environment, for which PyTorch is downloaded (6 GB, removed).
dist: $(VENV)/bin/python
	$(PIP) build twine
	rm -rf dist
	$(VENV)/bin/python -m build
	$(VENV)/bin/python -m twine check --strict dist/*
	$(VENV)/bin/python .ci/check_dist.py

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Each version in an environment of its own, one after the other: 6 GB each, kept for the next time.
test-versions: $(VERSIONS:%=test-version-%)

test-version-%:
	$(MAKE) test-one VENV=.venvs/$* LANE=$*

.PHONY: test-one
test-one: $(VENV)/.lane
	LANE=$(LANE) $(PYTEST) -m "not long"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python >= 3.11, not %s; try make PYTHON=python3.12" % sys.version)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.core: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.train: $(VENV)/.core
	$(PIP) -e ".[train]"
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e ".[dev,parity]"
	touch $@

$(VENV)/.docs: $(VENV)/.core
	$(PIP) -e ".[docs]"
	touch $@

# rfdetr cannot be installed beside the oldest transformers, so tests/parity runs in `make test` only.
$(VENV)/.lane: pyproject.toml | $(VENV)/bin/python
	$(PIP) --upgrade -e ".[dev]" "transformers$(if $(filter-out newest no-torchvision,$(LANE)),==$(LANE))" $(if $(filter-out no-torchvision,$(LANE)),torchvision)
	touch $@

clean:
	rm -rf $(VENV) .venvs build dist demo site
