# Everything happens in .venv; `make test ARGS="-k lsq"` hands arguments on. Works with GNU make 3.81 and later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# One process a core, at most 8: each of them takes about a gigabyte. A debugger wants ARGS="-n 0 ...".
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# "ok", the version if it is not one of ours, or nothing if there is no such Python.
python_is = $(shell $(PYTHON) -c 'import sys; v = sys.version_info[:2]; print("ok" if (3, 11) <= v <= (3, 13) else "%d.%d" % v)' 2>/dev/null)
python_hint = qatbench needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is $(if $(python_is),$(python_is),not there); try: make $(MAKECMDGOALS) PYTHON=python3.12

.PHONY: help venv quickstart test test-fast nightly lint perf constraints wheel clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

venv: $(BIN)/.installed  ## create .venv and install qatbench in it, with the tested versions

$(BIN)/python:
	$(if $(filter ok,$(python_is)),,$(error $(python_hint)))
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Written last, so that an interrupted installation is taken up again.
$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); the first time this takes minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: venv  ## train and compare nine small networks, then say where the leaderboard is
	@$(BIN)/qatbench quickstart $(ARGS)

test: venv  ## the tests, but for the nightly ones
	$(PYTEST) $(ARGS)

test-fast: venv  ## the tests that take less than ten seconds each
	$(PYTEST) -m "not slow and not nightly" $(ARGS)

nightly: venv  ## the tests that take minutes and do in full what others do in part
	$(PYTEST) -m nightly $(ARGS)

lint: venv  ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

perf: venv  ## speed and memory beside their targets
	$(BIN)/python tests/perf/perf.py $(ARGS)

constraints: venv  ## write the versions that are in .venv to constraints.txt (after the tests have passed)
	{ grep '^#' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)=='; } > constraints.txt.new
	mv constraints.txt.new constraints.txt

# A stale build/ would put deleted files into the wheel.
wheel: venv  ## build the wheel in dist/
	rm -rf build
	$(BIN)/python -m build --wheel

clean:  ## remove what was built (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
