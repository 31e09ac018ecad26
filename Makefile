PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A client that wants other versions than ours, for a test.
KSERVE := $(VENV)/kserve

# Options of pytest for tests in PROCESSES processes, each with ports and temporary files of its own.
# None where that is not allowed: it needs Linux and root.
PROCESSES ?= 2
ISOLATED := $(CURDIR)/tests/isolated_python.sh
PARALLEL = $(shell $(ISOLATED) --check && echo --dist loadfile --no-loadscope-reorder \
	--max-worker-restart 0 \
	--tx '$(PROCESSES)*popen//python=$(ISOLATED)')

.PHONY: setup demo test test-all chaos check docs clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	# Ray's own commands send the token only where this is set.
	echo 'export RAY_AUTH_MODE="$${RAY_AUTH_MODE:-token}"' >> $(BIN)/activate
	touch $@

# KEEP=1 leaves the server up.
demo: setup
	$(BIN)/python tests/demo.py $(if $(KEEP),--keep)

# The tests that run in a few minutes.
test: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not chaos"

# All tests but those that lose nodes.
test-all: setup $(KSERVE)/.installed
	KSERVE_PYTHON=$(abspath $(KSERVE)/bin/python) $(BIN)/python -m pytest $(PARALLEL)

$(KSERVE)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(KSERVE)
	$(KSERVE)/bin/pip install --quiet 'kserve==0.21.0'
	touch $@

# The tests that lose nodes; minutes each.
chaos: setup
	$(BIN)/python -m pytest -m chaos

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Fails on warnings, such as a link that leads nowhere or an option without a description.
docs: setup
	$(BIN)/python docs/reference_pages.py
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build
	@echo "open docs/_build/index.html"

clean:
	rm -rf $(VENV) docs/_build runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
